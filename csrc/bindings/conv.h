// What the bindings of the convolutions share. This package's own CUDA kernels read and write channels_last alone:
// other layouts are converted on the way in and out.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "torch_compat.h"

namespace alexnet_fast {

// torch's rule for a convolution's result.
inline bool result_is_channels_last(const Tensor& x, const Tensor& weight) {
  return is_channels_last(x) || is_channels_last(weight);
}

inline Tensor in_layout(const Tensor& result, bool channels_last) {
  return channels_last ? result : dense(result, false);
}

// Calls an operator of torch's through its dispatcher. The stack holds the arguments, then the results.
template <size_t N>
void call_torch(const char* name, std::array<StableIValue, N>& stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

// ReLU in the memory of x, a dense result of a convolution or a product. Not oneDNN's post-operation, which turns NaN
// into 0: a run that diverged would look alive.
inline Tensor relu_(const Tensor& x) {
  if (!x.is_cpu()) {
    std::array<StableIValue, 1> stack{torch::stable::detail::from(x)};
    call_torch("aten::relu_", stack);
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  EpilogueParams params{};
  params.dtype = dtype_of(x);
  params.batch = params.channels = params.height = params.out_height = 1;
  params.width = params.out_width = x.numel();
  params.z = x.const_data_ptr();
  params.y = x.mutable_data_ptr();
  if (x.numel() > 0) {
    launch("relu", x, params, cpu::kernels().epilogue_fwd, nullptr);
  }
  return x;
}

// Of a tensor, or null: how torch's C functions take what is optional.
inline AtenTensorHandle* optional_handle(const std::optional<Tensor>& x, AtenTensorHandle& handle) {
  handle = x ? x->get() : nullptr;
  return x ? &handle : nullptr;
}

// The convolution of the library that torch carries, by torch's own rules: oneDNN's on CPUs, cuDNN's on GPUs.
inline Tensor library_convolution(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups) {
  using torch::stable::detail::from;
  const bool channels_last = result_is_channels_last(x, weight), transposed = false;
  if (x.is_cpu()) {  // past the dispatcher, whose conversion of the arguments takes as long as a small layer
    const int64_t none[] = {0, 0};
    AtenTensorHandle result = nullptr, bias_handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
        dense(x, channels_last).get(), weight.get(), optional_handle(bias, bias_handle), stride.data(), stride.size(),
        padding.data(), padding.size(), dilation.data(), dilation.size(), transposed, none, 2, groups, &result));
    return dense(Tensor(result), channels_last);
  }
  std::array<StableIValue, 9> stack{from(dense(x, channels_last)),
                                    from(weight),
                                    from(bias),
                                    from(stride),
                                    from(padding),
                                    from(dilation),
                                    from(transposed),
                                    from(Ints{0, 0}),
                                    from(groups)};
  call_torch("aten::convolution", stack);
  return dense(torch::stable::detail::to<Tensor>(stack[0]), channels_last);
}

// Everything but pointers, checked. tile: a row of the kernel's table, from 1, which the launcher checks; 0 for its own
// choice.
inline ConvParams conv_params(const Tensor& x, const Tensor& weight, const Ints& stride, const Ints& padding,
                              const Ints& dilation, int64_t groups, bool allow_tf32, int64_t tile, const char* op) {
  check_4d(x, op, "x");
  check_4d(weight, op, "weight");
  check_dtype(weight, x.scalar_type(), op, "weight");
  STD_TORCH_CHECK(weight.device() == x.device(), op, ": weight is on another device than x");
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, op, ": no kernel takes float64");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
                  ": stride, padding and dilation must have two elements each");
  STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0, op, ": x has images without pixels");
  STD_TORCH_CHECK(groups > 0 && groups <= INT32_MAX && weight.size(0) > 0 && weight.size(1) > 0 &&
                      weight.size(0) % groups == 0 && x.size(1) == weight.size(1) * groups,
                  op, ": a weight of ", weight.size(0), " x ", weight.size(1), " channels and ", groups,
                  " groups do not go with ", x.size(1), " input channels");
  ConvParams params{};
  params.dtype = dtype_of(x);
  params.allow_tf32 = allow_tf32;
  params.tile = static_cast<int32_t>(std::clamp<int64_t>(tile, -1, INT32_MAX));
  params.batch = x.size(0);
  params.channels = x.size(1);
  params.height = x.size(2);
  params.width = x.size(3);
  params.out_channels = weight.size(0);
  const Ints kernel{weight.size(2), weight.size(3)};
  std::array<int64_t, 2> out;
  for (int axis = 0; axis < 2; ++axis) {
    STD_TORCH_CHECK(kernel[axis] > 0 && stride[axis] > 0 && stride[axis] <= INT32_MAX && padding[axis] >= 0 &&
                        padding[axis] <= INT32_MAX && dilation[axis] > 0 && dilation[axis] <= INT32_MAX,
                    op, ": kernel size ", kernel[axis], ", stride ", stride[axis], ", padding ", padding[axis],
                    ", dilation ", dilation[axis], " is no convolution");
    const int64_t extent = dilation[axis] * (kernel[axis] - 1) + 1;
    out[axis] = out_side(x.size(2 + axis), extent, stride[axis], padding[axis], false);
    STD_TORCH_CHECK(out[axis] > 0, op, ": the kernel is larger than the padded input");
    STD_TORCH_CHECK(x.size(2 + axis) + 2 * padding[axis] <= INT32_MAX, op, ": the padded input has sides beyond 2^31");
  }
  STD_TORCH_CHECK(std::max(weight.size(0) / groups, weight.size(1)) + 8 <= INT32_MAX / kernel[0] / kernel[1], op,
                  ": the weight of one output channel has more than 2^31 elements");
  params.out_height = out[0];
  params.out_width = out[1];
  params.window = make_window(kernel, stride, padding);
  params.dilation_h = static_cast<int32_t>(dilation[0]);
  params.dilation_w = static_cast<int32_t>(dilation[1]);
  params.groups = static_cast<int32_t>(groups);
  return params;
}

// The bias, contiguous, with its pointer in `params`; nothing without one.
inline std::optional<Tensor> set_bias(const std::optional<Tensor>& bias, const Tensor& x, ConvParams& params,
                                      const char* op) {
  if (!bias) {
    return std::nullopt;
  }
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == params.out_channels && bias->device() == x.device(), op,
                  ": bias must be on x's device, with one element an output channel");
  check_dtype(*bias, x.scalar_type(), op, "bias");
  const Tensor dense_bias = torch::stable::contiguous(*bias);
  params.bias = dense_bias.const_data_ptr();
  return dense_bias;
}

#if ALEXNET_FAST_CUDA
// How many elements conv_prepare returns.
inline int64_t prepared_elements(const Tensor& weight, const ConvParams& params) {
  return cuda::conv_prepare_workspace_bytes(params) / static_cast<int64_t>(weight.element_size());
}

// The weight as the kernels read it, with its pointer in `params`: what conv_prepare returned, or channels_last.
inline Tensor set_weight(const Tensor& kernel, const std::optional<Tensor>& prepared, ConvParams& params,
                         const char* op) {
  const Tensor weight = prepared ? *prepared : dense(kernel, true);
  params.weight = weight.const_data_ptr();
  if (prepared) {
    params.prepared = true;
    check_dtype(weight, kernel.scalar_type(), op, "prepared");
    STD_TORCH_CHECK(weight.device() == kernel.device() && weight.is_contiguous() &&
                        weight.numel() == prepared_elements(weight, params) &&
                        reinterpret_cast<uintptr_t>(params.weight) % 16 == 0,
                    op, ": prepared is not what conv_prepare returns for this weight, stride and dilation");
  }
  return weight;
}

// Enqueues a launcher with the workspace that it asks for; `to` is where `params` keeps the workspace's pointer. The
// allocator hands memory on in the order of this same stream, so the workspace may go when this function returns.
template <class Params>
void launch_with_workspace(const char* op, const Tensor& x, const Params& params, void*& to,
                           int64_t (*workspace_bytes)(const Params&), CudaLauncher<Params> launcher) {
  Tensor workspace = empty1d(x, workspace_bytes(params), ScalarType::Byte);
  to = workspace.mutable_data_ptr();
  enqueue(op, x, params, launcher);
}
#endif

}  // namespace alexnet_fast
