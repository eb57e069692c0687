#include "conv.h"
#include "operators.h"

namespace alexnet_fast {

#if ALEXNET_FAST_CUDA
namespace {

// ---- This package's own kernels -------------------------------------------------------------------------------------

Tensor run_conv_relu(const char* op, int64_t (*workspace_bytes)(const ConvParams&), CudaLauncher<ConvParams> launcher,
                     const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, const Ints& stride,
                     const Ints& padding, const Ints& dilation, int64_t groups, bool allow_tf32, int64_t tile,
                     const std::optional<Tensor>& prepared) {
  ConvParams params = conv_params(input, kernel, stride, padding, dilation, groups, allow_tf32, tile, op);
  const Tensor x = dense(input, true), weight = set_weight(kernel, prepared, params, op);
  const std::optional<Tensor> b = set_bias(bias, x, params, op);
  Tensor y = empty(x, {params.batch, params.out_channels, params.out_height, params.out_width}, x.scalar_type(), true);
  params.x = x.const_data_ptr();
  params.y = y.mutable_data_ptr();
  if (y.numel() > 0) {
    launch_with_workspace(op, x, params, params.workspace, workspace_bytes, launcher);
  }
  return in_layout(y, result_is_channels_last(input, kernel));
}

Tensor conv_relu(const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, const Ints& stride,
                 const Ints& padding, const Ints& dilation, int64_t groups, bool allow_tf32, int64_t tile,
                 const std::optional<Tensor>& prepared) {
  return run_conv_relu("conv_relu", &cuda::conv_relu_fwd_workspace_bytes, &cuda::conv_relu_fwd, input, kernel, bias,
                       stride, padding, dilation, groups, allow_tf32, tile, prepared);
}

// Refuses what it does not take, and every card but those of compute capability 9.0.
Tensor conv_relu_sm90(const Tensor& input, const Tensor& kernel, const std::optional<Tensor>& bias, const Ints& stride,
                      const Ints& padding, const Ints& dilation, int64_t groups, bool allow_tf32,
                      const std::optional<Tensor>& prepared) {
  return run_conv_relu("conv_relu_sm90", &cuda::sm90::conv_relu_fwd_workspace_bytes, &cuda::sm90::conv_relu_fwd, input,
                       kernel, bias, stride, padding, dilation, groups, allow_tf32, 0, prepared);
}

// output: forward's, or none where grad is masked already. What is not wanted comes back empty.
std::tuple<Tensor, Tensor, Tensor> run_conv_relu_backward(const char* op, int64_t (*workspace_bytes)(const ConvParams&),
                                                          CudaLauncher<ConvParams> launcher, const Tensor& grad,
                                                          const Tensor& input, const Tensor& kernel,
                                                          const std::optional<Tensor>& output, const Ints& stride,
                                                          const Ints& padding, const Ints& dilation, int64_t groups,
                                                          const std::vector<bool>& wanted, bool allow_tf32,
                                                          int64_t tile, bool mask_dx) {
  ConvParams params = conv_params(input, kernel, stride, padding, dilation, groups, allow_tf32, tile, op);
  STD_TORCH_CHECK(wanted.size() == 3, op, ": wanted must have three elements");
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == params.batch && grad.size(1) == params.out_channels &&
                      grad.size(2) == params.out_height && grad.size(3) == params.out_width &&
                      grad.device() == input.device(),
                  op, ": dy must be on x's device, of the convolution's output size");
  check_dtype(grad, input.scalar_type(), op, "dy");
  const Tensor x = dense(input, true), weight = dense(kernel, true), dy = dense(grad, true);
  std::optional<Tensor> y;
  if (output) {
    check_like(*output, grad, op, "y");
    check_dtype(*output, input.scalar_type(), op, "y");
    y = dense(*output, true);
    params.y = const_cast<void*>(y->const_data_ptr());
  }
  const auto gradient = [&](bool want, const Tensor& like) {
    return want ? empty(x, {like.size(0), like.size(1), like.size(2), like.size(3)}, x.scalar_type(), true)
                : empty1d(x, 0, x.scalar_type());
  };
  Tensor dx = gradient(wanted[0], x), dweight = gradient(wanted[1], weight);
  Tensor dbias = empty1d(x, wanted[2] ? params.out_channels : 0, x.scalar_type());
  const auto pointer = [](Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; };
  params.x = x.const_data_ptr();
  params.weight = weight.const_data_ptr();
  params.dy = dy.const_data_ptr();
  params.dx = pointer(dx);
  params.dweight = pointer(dweight);
  params.dbias = pointer(dbias);
  params.mask_dx = mask_dx;
  launch_with_workspace(op, x, params, params.workspace, workspace_bytes, launcher);
  const bool channels_last = result_is_channels_last(input, kernel);
  return {wanted[0] ? in_layout(dx, channels_last) : dx, wanted[1] ? in_layout(dweight, channels_last) : dweight,
          dbias};
}

std::tuple<Tensor, Tensor, Tensor> conv_relu_backward(const Tensor& grad, const Tensor& input, const Tensor& kernel,
                                                      const std::optional<Tensor>& output, const Ints& stride,
                                                      const Ints& padding, const Ints& dilation, int64_t groups,
                                                      std::vector<bool> wanted, bool allow_tf32, int64_t tile) {
  return run_conv_relu_backward("conv_relu_backward", &cuda::conv_relu_bwd_workspace_bytes, &cuda::conv_relu_bwd, grad,
                                input, kernel, output, stride, padding, dilation, groups, wanted, allow_tf32, tile,
                                false);
}

// As conv_relu_sm90. The bias's gradient without the weight's it refuses as well, and in float32 the weight's.
std::tuple<Tensor, Tensor, Tensor> conv_relu_backward_sm90(const Tensor& grad, const Tensor& input,
                                                           const Tensor& kernel, const std::optional<Tensor>& output,
                                                           const Ints& stride, const Ints& padding,
                                                           const Ints& dilation, int64_t groups,
                                                           std::vector<bool> wanted, bool allow_tf32, bool mask_dx) {
  return run_conv_relu_backward("conv_relu_backward_sm90", &cuda::sm90::conv_relu_bwd_workspace_bytes,
                                &cuda::sm90::conv_relu_bwd, grad, input, kernel, output, stride, padding, dilation,
                                groups, wanted, allow_tf32, 0, mask_dx);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, ALEXNET_FAST_CUDA_KEY, m) {
  m.impl("conv_relu_kernel", TORCH_BOX(&conv_relu));
  m.impl("conv_relu_sm90", TORCH_BOX(&conv_relu_sm90));
  m.impl("conv_relu_backward_sm90", TORCH_BOX(&conv_relu_backward_sm90));
  m.impl("conv_relu_backward_kernel", TORCH_BOX(&conv_relu_backward));
}
#endif

#ifndef ALEXNET_FAST_HOST_SIMT

// ---- The library's convolutions -------------------------------------------------------------------------------------

// No pooling window, with lrn_size 0: bias and ReLU alone.
static const Ints NONE{0, 0}, ONE{1, 1};

// On CPUs oneDNN adds the bias before it rounds. On GPUs torch's bias pass and ReLU pass would be two: the epilogue is
// one.
Tensor library_conv_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                         const Ints& padding, const Ints& dilation, int64_t groups) {
  if (x.is_cpu()) {
    return relu_(library_convolution(x, weight, bias, stride, padding, dilation, groups));
  }
  const Tensor z = library_convolution(x, weight, std::nullopt, stride, padding, dilation, groups);
  return std::get<0>(epilogue(z, bias, 0, 0, 0, 0, 1, NONE, ONE, NONE, false, false));
}

// As conv_relu_backward().
std::tuple<Maybe, Maybe, Maybe> library_conv_relu_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                           const Maybe& output, const Ints& stride, const Ints& padding,
                                                           const Ints& dilation, int64_t groups,
                                                           std::array<bool, 3> wanted) {
  using torch::stable::detail::from, torch::stable::detail::to;
  Tensor masked = grad;
  Maybe dbias;
  if (output) {
    std::tie(masked, dbias) = epilogue_backward(grad, grad, *output, output->size(2), output->size(3), wanted[2], 0, 0,
                                                0, 0, 1, NONE, ONE, NONE);
    wanted[2] = false;
  }
  const bool transposed = false;
  std::array<AtenTensorHandle, 3> handles{};
  if (x.is_cpu()) {
    const int64_t none[] = {0, 0}, channels = weight.size(0);
    const int64_t* bias_size = &channels;
    const int32_t mask[] = {wanted[0], wanted[1], wanted[2]};
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
        masked.get(), x.get(), weight.get(), &bias_size, 1, stride.data(), stride.size(), padding.data(),
        padding.size(), dilation.data(), dilation.size(), transposed, none, 2, groups, mask, 3, &handles[0],
        &handles[1], &handles[2]));
  } else {
    const bool mask[] = {wanted[0], wanted[1], wanted[2]};
    std::array<StableIValue, 11> stack{from(masked),
                                       from(x),
                                       from(weight),
                                       from(std::make_optional(Ints{weight.size(0)})),
                                       from(stride),
                                       from(padding),
                                       from(dilation),
                                       from(transposed),
                                       from(Ints{0, 0}),
                                       from(groups),
                                       from(torch::headeronly::HeaderOnlyArrayRef<bool>(mask, 3))};
    call_torch("aten::convolution_backward", stack);
    for (size_t i = 0; i < 3; ++i) {
      handles[i] = to<AtenTensorHandle>(stack[i]);
    }
  }
  const bool channels_last = result_is_channels_last(x, weight);
  const Tensor gradients[] = {Tensor(handles[0]), Tensor(handles[1]), Tensor(handles[2])};
  const auto if_wanted = [&](int at) { return wanted[at] ? Maybe(dense(gradients[at], channels_last)) : std::nullopt; };
  return {if_wanted(0), if_wanted(1), wanted[2] ? gradients[2] : dbias};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> boxed_conv_relu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                            const Maybe& y, const Ints& stride, const Ints& padding,
                                                            const Ints& dilation, int64_t groups,
                                                            std::vector<bool> wanted) {
  STD_TORCH_CHECK(wanted.size() == 3, "conv_relu_backward: wanted must have three elements");
  const auto [dx, dweight, dbias] = library_conv_relu_backward(dy, x, weight, y, stride, padding, dilation, groups,
                                                               {wanted[0], wanted[1], wanted[2]});
  const ScalarType dtype = x.scalar_type();
  return {or_empty(dx, x, dtype), or_empty(dweight, x, dtype), or_empty(dbias, x, dtype)};
}

void register_library(torch::stable::detail::StableLibrary& m) {
  m.impl("conv_relu", TORCH_BOX(&library_conv_relu));
  m.impl("conv_relu_backward", TORCH_BOX(&boxed_conv_relu_backward));
}

}  // namespace

ALEXNET_FAST_REGISTER(register_library)
#endif

}  // namespace alexnet_fast
