#include "operators.h"

namespace alexnet_fast {
namespace {

LrnParams make_params(const Tensor& x, bool channels_last, int64_t size, double alpha, double beta, double k,
                      int64_t groups, const char* op) {
  const LrnWindow lrn{static_cast<int32_t>(size), static_cast<int32_t>(groups), alpha, beta, k};
  check_lrn(lrn, x.size(1), op);
  LrnParams params{};
  params.dtype = dtype_of(x);
  params.channels_last = channels_last;
  params.batch = x.size(0);
  params.channels = x.size(1);
  params.pixels = x.size(2) * x.size(3);
  params.lrn = lrn;
  return params;
}

}  // namespace

Tensor lrn(const Tensor& input, int64_t size, double alpha, double beta, double k, int64_t groups) {
  check_4d(input, "lrn", "x");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);
  Tensor y = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
  LrnParams params = make_params(x, channels_last, size, alpha, beta, k, groups, "lrn");
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  if (x.numel() > 0) {
    launch("lrn", x, params, cpu::kernels().lrn_fwd, ALEXNET_FAST_CUDA_LAUNCHER(lrn_fwd));
  }
  return y;
}

Tensor lrn_backward(const Tensor& grad, const Tensor& input, int64_t size, double alpha, double beta, double k,
                    int64_t groups) {
  check_4d(input, "lrn_backward", "x");
  check_like(grad, input, "lrn_backward", "dy");
  check_dtype(grad, input.scalar_type(), "lrn_backward", "dy");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), dy = dense(grad, channels_last);
  Tensor dx = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), channels_last);
  LrnParams params = make_params(x, channels_last, size, alpha, beta, k, groups, "lrn_backward");
  params.x = x.const_data_ptr();
  params.dy = dy.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  if (x.numel() > 0) {
    launch("lrn_backward", x, params, cpu::kernels().lrn_bwd, ALEXNET_FAST_CUDA_LAUNCHER(lrn_bwd));
  }
  return dx;
}

namespace {

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("lrn", TORCH_BOX(&lrn));
  m.impl("lrn_backward", TORCH_BOX(&lrn_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
