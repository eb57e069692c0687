// The epilogue's operators, for the stages that end with it.
#pragma once

#include <tuple>

#include "torch_compat.h"

namespace alexnet_fast {

// (y, code, r); code and r come back empty unless training asks for them. lrn_size 0: no normalization. pool_kernel
// {0, 0}: no pooling.
std::tuple<Tensor, Tensor, Tensor> epilogue(const Tensor& z, std::optional<Tensor> bias, int64_t lrn_size, double alpha,
                                            double beta, double k, int64_t lrn_groups, Ints pool_kernel,
                                            Ints pool_stride, Ints pool_padding, bool ceil_mode, bool training);

// (dz, db); code: what forward returned (read when pooling). r: the ReLU's output (forward's r with LRN, its y with
// neither). db comes back empty unless want_bias.
std::tuple<Tensor, Tensor> epilogue_backward(const Tensor& dy, const Tensor& code, const Tensor& r, int64_t height,
                                             int64_t width, bool want_bias, int64_t lrn_size, double alpha, double beta,
                                             double k, int64_t lrn_groups, Ints pool_kernel, Ints pool_stride,
                                             Ints pool_padding);

}  // namespace alexnet_fast
