#include <algorithm>

#include "conv.h"
#include "linear.h"
#include "sums.h"

namespace alexnet_fast {
namespace {

// With many rows the library's product is faster than the CPU kernel, but wants weights as floats before it begins: of
// so many outputs at a time, which are 9.4 MB of fc6's 9216 inputs where all of them are 151.
constexpr int64_t kMostRows = 64, kOutputs = 256;

// A dense matrix or vector in another dtype, or itself.
Tensor converted(const Tensor& x, ScalarType dtype) {
  if (x.scalar_type() == dtype) {
    return x;
  }
  Tensor y = x.dim() == 1 ? empty1d(x, x.size(0), dtype) : empty2d(x, x.size(0), x.size(1), dtype);
  torch::stable::copy_(y, x);
  return y;
}

// Writes y by the library's product on a CPU, in the scales' dtype. All tensors are dense.
void product_by_blocks(const Tensor& input, Tensor weight, Tensor scales, const std::optional<Tensor>& bias, Tensor y) {
  const ScalarType dtype = scales.scalar_type();
  const Tensor x = converted(input, dtype);
  std::optional<Tensor> added;
  if (bias) {
    added = converted(*bias, dtype);
  }
  const int64_t outputs = weight.size(0);
  Tensor all = y.scalar_type() == dtype ? y : empty2d(y, y.size(0), outputs, dtype);
  Tensor floats = empty2d(weight, std::min(kOutputs, outputs), weight.size(1), dtype);
  for (int64_t first = 0; first < outputs; first += kOutputs) {
    const auto part = [first, n = std::min(kOutputs, outputs - first)](Tensor& of, int64_t dim) {
      return torch::stable::narrow(of, dim, first, n);
    };
    const Tensor block = part(weight, 0), out = part(all, 1);
    Tensor w = torch::stable::narrow(floats, 0, 0, block.size(0));
    torch::stable::copy_(w, block);
    const Tensor scale = part(scales, 0);
    std::array<StableIValue, 2> stack{torch::stable::detail::from(w),
                                      torch::stable::detail::from(torch::stable::unsqueeze(scale, 1))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // owned by whoever called
    const Tensor turned = torch::stable::transpose(w, 0, 1);
    STABLE_TORCH_ERROR_CODE_CHECK(
        added ? aoti_torch_cpu_addmm_out(out.get(), part(*added, 0).get(), x.get(), turned.get(), 1, 1)
              : aoti_torch_cpu_mm_out(out.get(), x.get(), turned.get()));
  }
  if (y.scalar_type() != dtype) {
    torch::stable::copy_(y, all);
  }
}

Tensor linear_int8(const Tensor& input, const Tensor& kernel, const Tensor& scale, const std::optional<Tensor>& bias) {
  constexpr const char* op = "linear_int8";
  LinearInt8Params params{};
  const auto added = begin_linear(op, input, kernel, bias, params);
  check_dtype(kernel, ScalarType::Char, op, "weight");
  check_dtype(scale, params.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float, op, "scales");
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == kernel.size(0), op, ": scales must have one element a row");
  STD_TORCH_CHECK(scale.device() == input.device(), op, ": scales must be on x's device");
  const Tensor x = torch::stable::contiguous(input), weight = torch::stable::contiguous(kernel),
               scales = torch::stable::contiguous(scale);
  params.x = x.const_data_ptr();
  params.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  params.scales = scales.const_data_ptr();
  const int64_t size[] = {params.rows, params.outputs}, strides[] = {params.outputs, 1};
  Tensor y = empty_strided(x, 2, size, strides, x.scalar_type());
  params.y = y.mutable_data_ptr();
  if (runs_cpu_kernels(x) && params.rows > kMostRows && y.numel() > 0) {
    product_by_blocks(x, weight, scales, added, y);
  } else if (y.numel() > 0) {
    launch(op, x, params, cpu::kernels().linear_int8_fwd, ALEXNET_FAST_CUDA_LAUNCHER(linear_int8_fwd));
  }
  return y;
}

void register_all(torch::stable::detail::StableLibrary& m) { m.impl("linear_int8", TORCH_BOX(&linear_int8)); }

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
