#include "torch_compat.h"

namespace alexnet_fast {
namespace {

// All tensors dense with the same strides; weight and velocity float32; grad float32, or of copy's 16-bit dtype.
void sgd_(Tensor weight, const Tensor& grad, std::optional<Tensor> velocity, std::optional<Tensor> copy, double lr,
          double momentum, double dampening, double weight_decay, bool nesterov, bool rule_2012, bool first) {
  SgdParams params{};
  const auto check = [&](const Tensor& x, ScalarType dtype, const char* name) {
    check_like(x, weight, "sgd_", name);
    check_dtype(x, dtype, "sgd_", name);
    for (int64_t axis = 0; axis < x.dim(); ++axis) {
      STD_TORCH_CHECK(x.stride(axis) == weight.stride(axis), "sgd_: ", name, " has other strides than weight");
    }
  };
  check(weight, ScalarType::Float, "weight");
  check(grad, copy ? copy->scalar_type() : ScalarType::Float, "grad");
  params.dtype = dtype_of(grad);
  STD_TORCH_CHECK(params.dtype != DType::f64, "sgd_: float64 is not supported");
  STD_TORCH_CHECK(velocity || !(momentum != 0 || rule_2012), "sgd_: momentum needs a velocity");
  params.count = weight.numel();
  params.lr = static_cast<float>(lr);
  params.momentum = static_cast<float>(momentum);
  params.keep = static_cast<float>(1 - dampening);
  params.weight_decay = static_cast<float>(weight_decay);
  params.decayed_lr = static_cast<float>(weight_decay * lr);
  params.nesterov = nesterov;
  params.rule_2012 = rule_2012;
  params.first = first;
  params.weight = static_cast<float*>(weight.mutable_data_ptr());
  params.grad = grad.const_data_ptr();
  if (velocity) {
    check(*velocity, ScalarType::Float, "velocity");
    params.velocity = static_cast<float*>(velocity->mutable_data_ptr());
  }
  if (copy) {
    check(*copy, grad.scalar_type(), "copy");
    params.copy = copy->mutable_data_ptr();
  }
  if (params.count > 0) {
    launch("sgd_", weight, params, cpu::kernels().sgd, nullptr);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CPU, m) { m.impl("sgd_", TORCH_BOX(&sgd_)); }

}  // namespace alexnet_fast
