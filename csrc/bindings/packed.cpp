// Inference on CPUs by oneDNN's own operators, for alexnet_fast.nn.packed.
#include "conv.h"
#include "operators.h"

namespace alexnet_fast {
namespace {

using torch::stable::detail::from, torch::stable::detail::to;

// oneDNN's operators take an operation to do afterwards: none.
const std::string NOTHING = "none";
const std::optional<std::string> NO_ALGORITHM;

// oneDNN's operators read a bias as dense, whatever its strides.
std::optional<Tensor> dense_bias(const std::optional<Tensor>& bias) {
  return bias ? std::make_optional(torch::stable::contiguous(*bias)) : std::nullopt;
}

}  // namespace

// The weight is in oneDNN's blocks, which say no more of its layout: the argument does. With neither LRN nor pooling it
// is conv_relu.
Tensor packed_stage(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Ints& stride,
                    const Ints& padding, const Ints& dilation, int64_t groups, int64_t lrn_size, double alpha,
                    double beta, double k, int64_t lrn_groups, const Ints& pool_kernel, const Ints& pool_stride,
                    const Ints& pool_padding, bool ceil_mode, bool weight_is_channels_last) {
  const bool channels_last = weight_is_channels_last || is_channels_last(x);
  std::array<StableIValue, 10> stack{from(dense(x, channels_last)),
                                     from(packed),
                                     from(dense_bias(bias)),
                                     from(padding),
                                     from(stride),
                                     from(dilation),
                                     from(groups),
                                     from(NOTHING),
                                     from(Ints{}),
                                     from(NO_ALGORITHM)};
  call_torch("mkldnn::_convolution_pointwise", stack);
  const Tensor z = dense(to<Tensor>(stack[0]), channels_last);
  if (lrn_size == 0 && pool_kernel[0] == 0) {
    return relu_(z);
  }
  return std::get<0>(epilogue(z, std::nullopt, lrn_size, alpha, beta, k, lrn_groups, pool_kernel, pool_stride,
                              pool_padding, ceil_mode, false));
}

// The weight may be in oneDNN's blocks or in plain order.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu) {
  std::array<StableIValue, 6> stack{from(x),       from(weight), from(dense_bias(bias)),
                                    from(NOTHING), from(Ints{}), from(NO_ALGORITHM)};
  call_torch("mkldnn::_linear_pointwise", stack);
  const Tensor y = to<Tensor>(stack[0]);
  return relu ? relu_(y) : y;
}

STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, MkldnnCPU, m) {
  m.impl("packed_stage", TORCH_BOX(&packed_stage));
  m.impl("onednn_linear", TORCH_BOX(&onednn_linear));
}
STABLE_TORCH_LIBRARY_IMPL(alexnet_fast, CPU, m) { m.impl("onednn_linear", TORCH_BOX(&onednn_linear)); }

}  // namespace alexnet_fast
