#include "sums.h"

namespace alexnet_fast {
namespace {

LpipsParams make_params(const Tensor& x, const Tensor& weight, bool channels_last, bool spatial, const char* op) {
  STD_TORCH_CHECK(x.size(0) % 2 == 0, op, ": x must have an even batch, got ", x.size(0));
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1) && weight.device() == x.device(), op,
                  ": weight must be on x's device, with one element a channel");
  check_dtype(weight, accumulation(x), op, "weight");
  LpipsParams params{};
  params.dtype = dtype_of(x);
  params.channels_last = channels_last;
  params.spatial = spatial;
  params.pairs = x.size(0) / 2;
  params.channels = x.size(1);
  params.pixels = x.size(2) * x.size(3);
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  return params;
}

std::array<int64_t, 4> distances(const Tensor& x, bool spatial) {
  return {x.size(0) / 2, 1, spatial ? x.size(2) : 1, spatial ? x.size(3) : 1};
}

// y = the mean of each row's units.
template <class Acc>
void average(const LpipsParams& params) {
  const int64_t units = lpips_units(params);
  for (int64_t pair = 0; pair < params.pairs; ++pair) {
    const Acc* const row = static_cast<const Acc*>(params.partial) + pair * units;
    double total = 0;
    for (int64_t unit = 0; unit < units; ++unit) {
      total += row[unit];
    }
    static_cast<Acc*>(params.y)[pair] = static_cast<Acc>(total / static_cast<double>(params.pixels));
  }
}

int64_t partial_units([[maybe_unused]] const Tensor& x, const LpipsParams& params) {
#if ALEXNET_FAST_CUDA
  if (!runs_cpu_kernels(x)) {
    return cuda::lpips_layer_fwd_partial_units(params);
  }
#endif
  return lpips_units(params);
}

Tensor lpips_layer(const Tensor& input, const Tensor& weights, bool spatial) {
  check_4d(input, "lpips_layer", "x");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), weight = torch::stable::contiguous(weights);
  LpipsParams params = make_params(x, weight, channels_last, spatial, "lpips_layer");
  Tensor y = empty(x, distances(x, spatial), accumulation(x), false);
  Tensor partial = empty2d(x, spatial ? 0 : params.pairs, partial_units(x, params), accumulation(x));
  params.y = y.mutable_data_ptr();
  params.partial = partial.mutable_data_ptr();
  if (x.numel() > 0) {
    launch("lpips_layer", x, params, cpu::kernels().lpips_layer_fwd, ALEXNET_FAST_CUDA_LAUNCHER(lpips_layer_fwd));
    if (!spatial && runs_cpu_kernels(x)) {
      params.dtype == DType::f64 ? average<double>(params) : average<float>(params);
    }
  }
  return y;
}

int64_t partial_rows([[maybe_unused]] const Tensor& x, const LpipsParams& params) {
#if ALEXNET_FAST_CUDA
  if (!runs_cpu_kernels(x)) {
    return cuda::lpips_layer_bwd_partial_rows(params);
  }
#endif
  return 2 * cpu::kernels().lpips_layer_bwd.items(params);
}

std::tuple<Tensor, Tensor> lpips_layer_backward(const Tensor& grad, const Tensor& input, const Tensor& weights,
                                                bool spatial, bool want_weight) {
  check_4d(input, "lpips_layer_backward", "x");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last), weight = torch::stable::contiguous(weights),
               dy = torch::stable::contiguous(grad);
  LpipsParams params = make_params(x, weight, channels_last, spatial, "lpips_layer_backward");
  check_like(dy, empty(x, distances(x, spatial), accumulation(x), false), "lpips_layer_backward", "dy");
  check_dtype(dy, accumulation(x), "lpips_layer_backward", "dy");
  Tensor dx = torch::stable::empty_like(x), dweight = empty1d(x, want_weight ? x.size(1) : 0, accumulation(x));
  if (x.numel() == 0) {
    torch::stable::zero_(dweight);
    return {dx, dweight};
  }
  params.dy = dy.const_data_ptr();
  params.dx = dx.mutable_data_ptr();
  Tensor partial;
  if (want_weight) {
    partial = empty2d(x, partial_rows(x, params), x.size(1), accumulation(x));
    params.partial = partial.mutable_data_ptr();
    params.dweight = dweight.mutable_data_ptr();
  }
  launch("lpips_layer_backward", x, params, cpu::kernels().lpips_layer_bwd,
         ALEXNET_FAST_CUDA_LAUNCHER(lpips_layer_bwd));
  if (want_weight && runs_cpu_kernels(x)) {
    add_rows(partial, dweight);
  }
  return {dx, dweight};
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("lpips_layer", TORCH_BOX(&lpips_layer));
  m.impl("lpips_layer_backward", TORCH_BOX(&lpips_layer_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
