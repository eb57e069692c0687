#include "linear.h"

// This package's kernel alone: the library's product is torch's operator, which alexnet_fast/ops/linear_relu.py calls.
#if ALEXNET_FAST_CUDA
namespace alexnet_fast {
namespace {

Tensor linear_relu(const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, bool relu) {
  constexpr const char* op = "linear_relu";
  LinearParams params{};
  params.relu = relu;
  const auto added = begin_linear(op, input, kernel, bias, params);
  check_dtype(kernel, input.scalar_type(), op, "weight");
  const Tensor x = torch::stable::contiguous(input), weight = torch::stable::contiguous(kernel);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  const int64_t size[] = {params.rows, params.outputs}, strides[] = {params.outputs, 1};
  const Tensor y = empty_strided(x, 2, size, strides, x.scalar_type());
  params.y = y.mutable_data_ptr();
  if (y.numel() > 0) {
    enqueue(op, x, params, &cuda::linear_relu_fwd);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, ALEXNET_FAST_CUDA_KEY, m) {
  m.impl("linear_relu_cuda", TORCH_BOX(&linear_relu));
}

}  // namespace alexnet_fast
#endif
