#include "conv.h"

namespace alexnet_fast {

#if ALEXNET_FAST_CUDA
namespace {

// The weight of a convolution as this package's CUDA kernels read it, in one dimension.
Tensor conv_prepare(const Tensor& kernel, const Ints& stride, const Ints& dilation) {
  const char* const op = "conv_prepare";
  check_4d(kernel, op, "weight");
  // Of no images, padded beyond any kernel.
  const Tensor x = empty(kernel, {0, kernel.size(1), 1, 1}, kernel.scalar_type(), true);
  const int64_t padding = INT32_MAX / 2;
  ConvParams params = conv_params(x, kernel, stride, {padding, padding}, dilation, 1, false, 0, op);
  const Tensor weight = dense(kernel, true);
  params.weight = weight.const_data_ptr();
  Tensor prepared = empty1d(kernel, prepared_elements(kernel, params), kernel.scalar_type());
  params.workspace = prepared.mutable_data_ptr();
  enqueue(op, kernel, params, &cuda::conv_prepare);
  return prepared;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, ALEXNET_FAST_CUDA_KEY, m) { m.impl("conv_prepare", TORCH_BOX(&conv_prepare)); }
#endif

}  // namespace alexnet_fast
