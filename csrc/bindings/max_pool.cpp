#include "operators.h"

namespace alexnet_fast {
// keep_code false (inference): there is no code; it is neither computed nor written.
std::tuple<Tensor, Maybe> max_pool(const Tensor& input, const Ints& kernel_size, const Ints& stride,
                                   const Ints& padding, bool ceil_mode, bool keep_code) {
  check_4d(input, "max_pool", "x");
  check_window(kernel_size, stride, padding, "max_pool");
  const bool channels_last = is_channels_last(input);
  const Tensor x = dense(input, channels_last);

  PoolParams params{};
  params.dtype = dtype_of(x);
  params.channels_last = channels_last;
  params.batch = x.size(0);
  params.channels = x.size(1);
  params.height = x.size(2);
  params.width = x.size(3);
  params.out_height = out_side(params.height, kernel_size[0], stride[0], padding[0], ceil_mode);
  params.out_width = out_side(params.width, kernel_size[1], stride[1], padding[1], ceil_mode);
  STD_TORCH_CHECK(params.out_height > 0 && params.out_width > 0,
                  "max_pool: the window is larger than the padded input");
  params.window = make_window(kernel_size, stride, padding);

  const std::array<int64_t, 4> size{params.batch, params.channels, params.out_height, params.out_width};
  Tensor y = empty(x, size, x.scalar_type(), channels_last);
  Maybe code;
  if (keep_code) {
    code = empty(x, size, ScalarType::Byte, channels_last);
    params.code = static_cast<uint8_t*>(code->mutable_data_ptr());
  }
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  if (y.numel() > 0) {
    launch("max_pool", x, params, cpu::kernels().max_pool_fwd, ALEXNET_FAST_CUDA_LAUNCHER(max_pool_fwd));
  }
  return {y, code};
}

Tensor max_pool_backward(const Tensor& grad, const Tensor& codes, int64_t height, int64_t width,
                         const Ints& kernel_size, const Ints& stride, const Ints& padding) {
  check_4d(codes, "max_pool_backward", "code");
  check_like(grad, codes, "max_pool_backward", "dy");
  check_dtype(codes, ScalarType::Byte, "max_pool_backward", "code");
  check_window(kernel_size, stride, padding, "max_pool_backward");
  check_pooled(grad, height, width, kernel_size, stride, padding, "max_pool_backward");
  const bool channels_last = is_channels_last(codes);
  const Tensor code = dense(codes, channels_last), dy = dense(grad, channels_last);

  PoolParams params{};
  params.dtype = dtype_of(dy);
  params.channels_last = channels_last;
  params.batch = dy.size(0);
  params.channels = dy.size(1);
  params.height = height;
  params.width = width;
  params.out_height = dy.size(2);
  params.out_width = dy.size(3);
  params.window = make_window(kernel_size, stride, padding);

  Tensor dx = empty(dy, {params.batch, params.channels, height, width}, dy.scalar_type(), channels_last);
  params.dy = dy.const_data_ptr();
  params.code = static_cast<uint8_t*>(const_cast<void*>(code.const_data_ptr()));
  params.dx = dx.mutable_data_ptr();
  if (dx.numel() > 0) {
    launch("max_pool_backward", dy, params, cpu::kernels().max_pool_bwd, ALEXNET_FAST_CUDA_LAUNCHER(max_pool_bwd));
  }
  return dx;
}

namespace {

std::tuple<Tensor, Tensor> boxed_max_pool(const Tensor& x, const Ints& kernel_size, const Ints& stride,
                                          const Ints& padding, bool ceil_mode, bool keep_code) {
  const auto [y, code] = max_pool(x, kernel_size, stride, padding, ceil_mode, keep_code);
  return {y, or_empty(code, y, ScalarType::Byte)};
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("max_pool", TORCH_BOX(&boxed_max_pool));
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
