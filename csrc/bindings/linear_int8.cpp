#include "torch_compat.h"

namespace alexnet_fast {
namespace {

Tensor linear_int8(const Tensor& input, const Tensor& kernel, const Tensor& scale, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear_int8";
  LinearInt8Params params{};
  params.dtype = dtype_of(input);
  STD_TORCH_CHECK(input.dim() == 2 && kernel.dim() == 2 && input.size(1) == kernel.size(1), op,
                  ": x and weight must be matrices with as many columns");
  check_dtype(kernel, ScalarType::Char, op, "weight");
  check_dtype(scale, params.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float, op, "scales");
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == kernel.size(0), op, ": scales must have one element a row");
  STD_TORCH_CHECK(kernel.device() == input.device() && scale.device() == input.device(), op,
                  ": weight and scales must be on x's device");
  const Tensor x = torch::stable::contiguous(input), weight = torch::stable::contiguous(kernel),
               scales = torch::stable::contiguous(scale);
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
  params.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  params.scales = scales.const_data_ptr();
  const int64_t size[] = {params.rows, params.outputs}, strides[] = {params.outputs, 1};
  Tensor y = empty_strided(x, 2, size, strides, x.scalar_type());
  params.y = y.mutable_data_ptr();
  if (y.numel() > 0) {
    launch(op, x, params, cpu::kernels().linear_int8_fwd, ALEXNET_FAST_CUDA_LAUNCHER(linear_int8_fwd));
  }
  return y;
}

void register_all(torch::stable::detail::StableLibrary& m) { m.impl("linear_int8", TORCH_BOX(&linear_int8)); }

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
