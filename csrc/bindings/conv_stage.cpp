#include "conv.h"
#include "operators.h"

namespace alexnet_fast {

#if ALEXNET_FAST_CUDA
namespace {

// By this package's own kernel.
// As epilogue(): code and r come back empty unless training asks for them.
std::tuple<Tensor, Tensor, Tensor> run_conv_stage(
    const char* op, int64_t (*workspace_bytes)(const StageParams&), CudaLauncher<StageParams> launcher,
    const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, const Ints& stride,
    const Ints& padding, const Ints& dilation, int64_t groups, int64_t lrn_size, double alpha, double beta, double k,
    int64_t lrn_groups, const Ints& pool_kernel, const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode,
    bool training, bool allow_tf32, int64_t tile, const std::optional<Tensor>& prepared) {
  StageParams params{};
  ConvParams& conv = params.conv;
  conv = conv_params(input, kernel, stride, padding, dilation, groups, allow_tf32, tile, op);
  const bool pooling = pool_kernel[0] != 0, normalizing = lrn_size != 0;
  STD_TORCH_CHECK(pooling || normalizing, op, ": without LRN and pooling it is conv_relu");
  params.lrn = {static_cast<int32_t>(lrn_size), static_cast<int32_t>(lrn_groups), alpha, beta, k};
  if (normalizing) {
    check_lrn(params.lrn, conv.out_channels, op);
  }
  params.pooled_height = conv.out_height;
  params.pooled_width = conv.out_width;
  if (pooling) {
    check_window(pool_kernel, pool_stride, pool_padding, op);
    params.pool = make_window(pool_kernel, pool_stride, pool_padding);
    params.pooled_height = out_side(conv.out_height, pool_kernel[0], pool_stride[0], pool_padding[0], ceil_mode);
    params.pooled_width = out_side(conv.out_width, pool_kernel[1], pool_stride[1], pool_padding[1], ceil_mode);
    STD_TORCH_CHECK(params.pooled_height > 0 && params.pooled_width > 0, op,
                    ": the pooling window is larger than the convolution's padded output");
  }
  const Tensor x = dense(input, true), weight = set_weight(kernel, prepared, conv, op);
  const std::optional<Tensor> b = set_bias(bias, x, conv, op);
  const std::array<int64_t, 4> size{conv.batch, conv.out_channels, params.pooled_height, params.pooled_width};
  const bool keep_code = training && pooling, keep_r = training && normalizing;
  Tensor y = empty(x, size, x.scalar_type(), true);
  Tensor code = keep_code ? empty(x, size, ScalarType::Byte, true) : empty1d(x, 0, ScalarType::Byte);
  Tensor r = keep_r ? empty(x, {conv.batch, conv.out_channels, conv.out_height, conv.out_width}, x.scalar_type(), true)
                    : empty1d(x, 0, x.scalar_type());
  conv.x = x.const_data_ptr();
  params.pooled = y.mutable_data_ptr();
  params.code = keep_code ? static_cast<uint8_t*>(code.mutable_data_ptr()) : nullptr;
  params.r = keep_r ? r.mutable_data_ptr() : nullptr;
  if (y.numel() > 0) {
    launch_with_workspace(op, x, params, conv.workspace, workspace_bytes, launcher);
  }
  const bool channels_last = result_is_channels_last(input, kernel);
  return {in_layout(y, channels_last), keep_code ? in_layout(code, channels_last) : code,
          keep_r ? in_layout(r, channels_last) : r};
}

std::tuple<Tensor, Tensor, Tensor> conv_stage(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Ints& stride, const Ints& padding, const Ints& dilation,
                                              int64_t groups, int64_t lrn_size, double alpha, double beta, double k,
                                              int64_t lrn_groups, const Ints& pool_kernel, const Ints& pool_stride,
                                              const Ints& pool_padding, bool ceil_mode, bool training, bool allow_tf32,
                                              int64_t tile, const std::optional<Tensor>& prepared) {
  return run_conv_stage("conv_stage", &cuda::conv_stage_fwd_workspace_bytes, &cuda::conv_stage_fwd, x, weight, bias,
                        stride, padding, dilation, groups, lrn_size, alpha, beta, k, lrn_groups, pool_kernel,
                        pool_stride, pool_padding, ceil_mode, training, allow_tf32, tile, prepared);
}

// Refuses what it does not take, and every card but those of compute capability 9.0.
std::tuple<Tensor, Tensor, Tensor> conv_stage_sm90(const Tensor& x, const Tensor& weight,
                                                   const std::optional<Tensor>& bias, const Ints& stride,
                                                   const Ints& padding, const Ints& dilation, int64_t groups,
                                                   int64_t lrn_size, double alpha, double beta, double k,
                                                   int64_t lrn_groups, const Ints& pool_kernel, const Ints& pool_stride,
                                                   const Ints& pool_padding, bool ceil_mode, bool training,
                                                   bool allow_tf32, const std::optional<Tensor>& prepared) {
  return run_conv_stage("conv_stage_sm90", &cuda::sm90::conv_stage_fwd_workspace_bytes, &cuda::sm90::conv_stage_fwd, x,
                        weight, bias, stride, padding, dilation, groups, lrn_size, alpha, beta, k, lrn_groups,
                        pool_kernel, pool_stride, pool_padding, ceil_mode, training, allow_tf32, 0, prepared);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, ALEXNET_FAST_CUDA_KEY, m) {
  m.impl("conv_stage_kernel", TORCH_BOX(&conv_stage));
  m.impl("conv_stage_sm90", TORCH_BOX(&conv_stage_sm90));
}
#endif

#ifndef ALEXNET_FAST_HOST_SIMT

// The library's convolution, then everything else in one pass. oneDNN adds the bias before it rounds; on GPUs torch
// would add it in a pass of its own.
std::tuple<Tensor, Maybe, Maybe> library_conv_stage(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, int64_t lrn_size, double alpha, double beta, double k, int64_t lrn_groups,
    const Ints& pool_kernel, const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode, bool training) {
  std::optional<Tensor> with, after;
  (x.is_cpu() ? with : after) = bias;
  const Tensor z = library_convolution(x, weight, with, stride, padding, dilation, groups);
  return epilogue(z, after, lrn_size, alpha, beta, k, lrn_groups, pool_kernel, pool_stride, pool_padding, ceil_mode,
                  training);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> boxed_conv_stage(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                                    const Ints& stride, const Ints& padding, const Ints& dilation,
                                                    int64_t groups, int64_t lrn_size, double alpha, double beta,
                                                    double k, int64_t lrn_groups, const Ints& pool_kernel,
                                                    const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode,
                                                    bool training) {
  const auto [y, code, r] =
      library_conv_stage(x, weight, bias, stride, padding, dilation, groups, lrn_size, alpha, beta, k, lrn_groups,
                         pool_kernel, pool_stride, pool_padding, ceil_mode, training);
  return {y, or_empty(code, y, ScalarType::Byte), or_empty(r, y, y.scalar_type())};
}

void register_library(torch::stable::detail::StableLibrary& m) { m.impl("conv_stage", TORCH_BOX(&boxed_conv_stage)); }

}  // namespace

ALEXNET_FAST_REGISTER(register_library)
#endif

}  // namespace alexnet_fast
