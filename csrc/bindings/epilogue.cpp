#include <algorithm>
#include <memory>

#include "operators.h"
#include "sums.h"

namespace alexnet_fast {
namespace {

// Everything but pointers; z is the convolution output's shape, whichever tensor stands for it.
EpilogueParams make_params(DType dtype, bool channels_last, std::array<int64_t, 4> z, std::array<int64_t, 2> out,
                           const LrnWindow& lrn, const Ints& kernel, const Ints& stride, const Ints& padding) {
  EpilogueParams params{};
  params.dtype = dtype;
  params.channels_last = channels_last;
  params.batch = z[0];
  params.channels = z[1];
  params.height = z[2];
  params.width = z[3];
  params.out_height = out[0];
  params.out_width = out[1];
  params.lrn = lrn;
  params.window = make_window(kernel, stride, padding);
  return params;
}

LrnWindow make_lrn(int64_t size, double alpha, double beta, double k, int64_t groups, int64_t channels,
                   const char* op) {
  const LrnWindow lrn{static_cast<int32_t>(size), static_cast<int32_t>(groups), alpha, beta, k};
  if (size != 0) {
    check_lrn(lrn, channels, op);
  }
  return lrn;
}

int64_t partial_rows([[maybe_unused]] const Tensor& dy, const EpilogueParams& params) {
#if ALEXNET_FAST_CUDA
  if (!runs_cpu_kernels(dy)) {
    return cuda::epilogue_bwd_partial_rows(params);
  }
#endif
  return 2 * cpu::kernels().epilogue_bwd.items(params);
}

// The kernel, whose pointers but those for db are set; db unless it is not wanted.
Maybe launch_backward(const Tensor& dy, EpilogueParams& params, bool want_bias) {
  Maybe db;
  if (want_bias) {
    db = empty1d(dy, params.channels, dy.scalar_type());
  }
  if (params.batch * params.channels * params.height * params.width == 0) {
    if (db) torch::stable::zero_(*db);
    return db;
  }
  // Partial sums in the accumulation type, rows for each piece of work, are added in order: the same for any number of
  // threads.
  Maybe partial;
  std::unique_ptr<char[]> host_partial;  // a CPU's: a tensor takes longer than what a small layer has to compute
  const int64_t rows = want_bias ? partial_rows(dy, params) : 0;
  const ScalarType accumulate = accumulation(dy);
  if (want_bias) {
    params.db = db->mutable_data_ptr();
    if (runs_cpu_kernels(dy)) {
      host_partial.reset(
          new char[rows * params.channels * (accumulate == ScalarType::Double ? sizeof(double) : sizeof(float))]);
      params.db_partial = host_partial.get();
    } else {
      const std::array<int64_t, 2> size{rows, params.channels}, strides{params.channels, 1};
      partial = empty_strided(dy, 2, size.data(), strides.data(), accumulate);
      params.db_partial = partial->mutable_data_ptr();
    }
  }
  launch("epilogue_backward", dy, params, cpu::kernels().epilogue_bwd, ALEXNET_FAST_CUDA_LAUNCHER(epilogue_bwd));
  if (host_partial) {
    add_rows(host_partial.get(), accumulate, rows, *db);
  }
  return db;
}

}  // namespace

std::tuple<Tensor, Maybe, Maybe> epilogue(const Tensor& input, const std::optional<Tensor>& bias, int64_t lrn_size,
                                          double alpha, double beta, double k, int64_t lrn_groups,
                                          const Ints& pool_kernel, const Ints& pool_stride, const Ints& pool_padding,
                                          bool ceil_mode, bool training) {
  check_4d(input, "epilogue", "z");
  const bool channels_last = is_channels_last(input);
  const Tensor z = dense(input, channels_last);
  const bool pooling = pool_kernel[0] != 0;
  std::array<int64_t, 2> out{z.size(2), z.size(3)};
  if (pooling) {
    check_window(pool_kernel, pool_stride, pool_padding, "epilogue");
    for (int axis = 0; axis < 2; ++axis) {
      out[axis] = out_side(out[axis], pool_kernel[axis], pool_stride[axis], pool_padding[axis], ceil_mode);
      STD_TORCH_CHECK(out[axis] > 0, "epilogue: the window is larger than the padded input");
    }
  }
  const LrnWindow lrn = make_lrn(lrn_size, alpha, beta, k, lrn_groups, z.size(1), "epilogue");
  const std::array<int64_t, 4> shape{z.size(0), z.size(1), z.size(2), z.size(3)};
  EpilogueParams params =
      make_params(dtype_of(z), channels_last, shape, out, lrn, pool_kernel, pool_stride, pool_padding);

  const std::array<int64_t, 4> out_shape{shape[0], shape[1], out[0], out[1]};
  Tensor y = empty(z, out_shape, z.scalar_type(), channels_last);
  const bool keep_code = training && pooling, keep_r = training && lrn_size != 0;
  Maybe code, r;
  std::optional<Tensor> b;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == shape[1] && bias->device() == z.device(),
                    "epilogue: bias must be on z's device, with one element a channel");
    check_dtype(*bias, z.scalar_type(), "epilogue", "bias");
    b = torch::stable::contiguous(*bias);
    params.bias = b->const_data_ptr();
  }
  params.z = z.const_data_ptr();
  params.y = y.mutable_data_ptr();
  if (keep_code) {
    code = empty(z, out_shape, ScalarType::Byte, channels_last);
    params.code = static_cast<uint8_t*>(code->mutable_data_ptr());
  }
  if (keep_r) {
    r = empty(z, shape, z.scalar_type(), channels_last);
    params.r = r->mutable_data_ptr();
  }
  if (z.numel() > 0) {
    launch("epilogue", z, params, cpu::kernels().epilogue_fwd, ALEXNET_FAST_CUDA_LAUNCHER(epilogue_fwd));
  }
  return {y, code, r};
}

std::tuple<Tensor, Maybe> epilogue_backward(const Tensor& grad, const Tensor& codes, const Tensor& kept, int64_t height,
                                            int64_t width, bool want_bias, int64_t lrn_size, double alpha, double beta,
                                            double k, int64_t lrn_groups, const Ints& pool_kernel,
                                            const Ints& pool_stride, const Ints& pool_padding) {
  check_4d(grad, "epilogue_backward", "dy");
  const bool pooling = pool_kernel[0] != 0, reads_r = lrn_size != 0 || !pooling;
  const bool channels_last = is_channels_last(reads_r ? kept : codes);
  const Tensor dy = dense(grad, channels_last);
  const std::array<int64_t, 4> shape{dy.size(0), dy.size(1), height, width};
  const LrnWindow lrn = make_lrn(lrn_size, alpha, beta, k, lrn_groups, shape[1], "epilogue_backward");
  EpilogueParams params = make_params(dtype_of(dy), channels_last, shape, {dy.size(2), dy.size(3)}, lrn, pool_kernel,
                                      pool_stride, pool_padding);

  Tensor dz = empty(dy, shape, dy.scalar_type(), channels_last);
  Tensor code = codes, r = kept;
  if (pooling) {
    check_window(pool_kernel, pool_stride, pool_padding, "epilogue_backward");
    check_pooled(grad, height, width, pool_kernel, pool_stride, pool_padding, "epilogue_backward");
    check_like(codes, dy, "epilogue_backward", "code");
    check_dtype(codes, ScalarType::Byte, "epilogue_backward", "code");
    code = dense(codes, channels_last);
    params.code = static_cast<uint8_t*>(const_cast<void*>(code.const_data_ptr()));
  }
  if (!pooling) {
    check_like(grad, dz, "epilogue_backward", "dy");
  }
  if (reads_r) {
    check_like(kept, dz, "epilogue_backward", "r");
    check_dtype(kept, dy.scalar_type(), "epilogue_backward", "r");
    r = dense(kept, channels_last);
    params.r = const_cast<void*>(r.const_data_ptr());
  }
  params.dy = dy.const_data_ptr();
  params.dz = dz.mutable_data_ptr();

  return {dz, launch_backward(dy, params, want_bias)};
}

std::tuple<Tensor, Maybe> relu_backward(const Tensor& grad, const Tensor& kept, bool want_bias) {
  check_like(kept, grad, "relu_backward", "y");
  check_dtype(kept, grad.scalar_type(), "relu_backward", "y");
  const Tensor dy = dense(grad, false), y = dense(kept, false);
  // As one image of so many pixels in channels_last: its sums are over pixels, and its vectors along channels.
  const int64_t rows = dy.size(0), columns = dy.size(1), size[] = {rows, columns}, strides[] = {columns, 1};
  const Ints none{0, 0}, one{1, 1};
  EpilogueParams params =
      make_params(dtype_of(dy), true, {1, columns, rows, 1}, {rows, 1}, {0, 1, 0, 0, 0}, none, one, none);
  Tensor dz = empty_strided(dy, 2, size, strides, dy.scalar_type());
  params.dy = dy.const_data_ptr();
  params.r = const_cast<void*>(y.const_data_ptr());
  params.dz = dz.mutable_data_ptr();
  return {dz, launch_backward(dy, params, want_bias)};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> boxed_epilogue(const Tensor& z, const Maybe& bias, int64_t lrn_size, double alpha,
                                                  double beta, double k, int64_t lrn_groups, const Ints& pool_kernel,
                                                  const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode,
                                                  bool training) {
  const auto [y, code, r] = epilogue(z, bias, lrn_size, alpha, beta, k, lrn_groups, pool_kernel, pool_stride,
                                     pool_padding, ceil_mode, training);
  return {y, or_empty(code, y, ScalarType::Byte), or_empty(r, y, y.scalar_type())};
}

std::tuple<Tensor, Tensor> boxed_epilogue_backward(const Tensor& dy, const Tensor& code, const Tensor& r,
                                                   int64_t height, int64_t width, bool want_bias, int64_t lrn_size,
                                                   double alpha, double beta, double k, int64_t lrn_groups,
                                                   const Ints& pool_kernel, const Ints& pool_stride,
                                                   const Ints& pool_padding) {
  const auto [dz, db] = epilogue_backward(dy, code, r, height, width, want_bias, lrn_size, alpha, beta, k, lrn_groups,
                                          pool_kernel, pool_stride, pool_padding);
  return {dz, or_empty(db, dz, dz.scalar_type())};
}

void register_all(torch::stable::detail::StableLibrary& m) {
  m.impl("epilogue", TORCH_BOX(&boxed_epilogue));
  m.impl("epilogue_backward", TORCH_BOX(&boxed_epilogue_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_all)

}  // namespace alexnet_fast
