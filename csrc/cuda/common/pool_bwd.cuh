// max_pool_bwd.cu's kernels for epilogue_bwd.cu: the gradient through a pool, summed on the way.
#pragma once

#include "cuda/common/pool.cuh"

namespace alexnet_fast::cuda {

// Rows that pool_bwd leaves in `partial`. They depend on shapes, and on whether the tensors begin at multiples of 16
// bytes.
int64_t pool_bwd_rows(const PoolParams& params);

// As max_pool_bwd; `partial`: null, or (rows, channels) for sums of dx over parts of the batch and of the image.
int pool_bwd(const PoolParams& params, float* partial, void* stream);

}  // namespace alexnet_fast::cuda
