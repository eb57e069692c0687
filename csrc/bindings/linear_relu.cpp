#include "torch_compat.h"

// This package's kernel alone: the library's product is torch's operator, which alexnet_fast/ops/linear_relu.py calls.
#if ALEXNET_FAST_CUDA
namespace alexnet_fast {
namespace {

Tensor linear_relu(const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, bool relu) {
  constexpr const char* op = "linear_relu";
  LinearParams params{};
  params.dtype = dtype_of(input);
  params.relu = relu;
  STD_TORCH_CHECK(input.dim() == 2 && kernel.dim() == 2 && input.size(1) == kernel.size(1), op,
                  ": x and weight must be matrices with as many columns");
  check_dtype(kernel, input.scalar_type(), op, "weight");
  STD_TORCH_CHECK(kernel.device() == input.device(), op, ": weight must be on x's device");
  const Tensor x = torch::stable::contiguous(input), weight = torch::stable::contiguous(kernel);
  std::optional<Tensor> added;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == kernel.size(0) && bias->device() == input.device(), op,
                    ": bias must be on x's device, with one element an output");
    check_dtype(*bias, input.scalar_type(), op, "bias");
    added = torch::stable::contiguous(*bias);
    params.bias = added->const_data_ptr();
  }
  params.rows = x.size(0);
  params.inputs = x.size(1);
  params.outputs = weight.size(0);
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
