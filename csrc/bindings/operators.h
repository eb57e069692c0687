// The operators that other bindings are made of. Results that are not asked for are none; the operators themselves
// return them empty (see or_empty).
#pragma once

#include <tuple>

#include "torch_compat.h"

namespace alexnet_fast {

using Maybe = std::optional<Tensor>;

inline Tensor or_empty(const Maybe& x, const Tensor& like, ScalarType dtype) {
  return x ? *x : empty1d(like, 0, dtype);
}

// (y, code, r); code and r are none unless training asks for them. lrn_size 0: no normalization. pool_kernel
// {0, 0}: no pooling.
std::tuple<Tensor, Maybe, Maybe> epilogue(const Tensor& z, const std::optional<Tensor>& bias, int64_t lrn_size,
                                          double alpha, double beta, double k, int64_t lrn_groups,
                                          const Ints& pool_kernel, const Ints& pool_stride, const Ints& pool_padding,
                                          bool ceil_mode, bool training);

// (dz, db); code: what forward returned (read when pooling). r: the ReLU's output (forward's r with LRN, its y with
// neither). db is none unless want_bias.
std::tuple<Tensor, Maybe> epilogue_backward(const Tensor& dy, const Tensor& code, const Tensor& r, int64_t height,
                                            int64_t width, bool want_bias, int64_t lrn_size, double alpha, double beta,
                                            double k, int64_t lrn_groups, const Ints& pool_kernel,
                                            const Ints& pool_stride, const Ints& pool_padding);

// The epilogue's of a ReLU alone, of matrices (rows, channels).
std::tuple<Tensor, Maybe> relu_backward(const Tensor& dy, const Tensor& y, bool want_bias);

Tensor lrn(const Tensor& x, int64_t size, double alpha, double beta, double k, int64_t groups);
Tensor lrn_backward(const Tensor& dy, const Tensor& x, int64_t size, double alpha, double beta, double k,
                    int64_t groups);

// (y, code); code is none unless keep_code.
std::tuple<Tensor, Maybe> max_pool(const Tensor& x, const Ints& kernel, const Ints& stride, const Ints& padding,
                                   bool ceil_mode, bool keep_code);
Tensor max_pool_backward(const Tensor& dy, const Tensor& code, int64_t height, int64_t width, const Ints& kernel,
                         const Ints& stride, const Ints& padding);

// The library's convolution, and what follows it in our kernels.
Tensor library_conv_relu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride,
                         const Ints& padding, const Ints& dilation, int64_t groups);
// (dx, dweight, dbias). y: forward's, or none where dy is masked already.
std::tuple<Maybe, Maybe, Maybe> library_conv_relu_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                           const std::optional<Tensor>& y, const Ints& stride,
                                                           const Ints& padding, const Ints& dilation, int64_t groups,
                                                           std::array<bool, 3> wanted);
// As epilogue().
std::tuple<Tensor, Maybe, Maybe> library_conv_stage(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, int64_t lrn_size, double alpha, double beta, double k, int64_t lrn_groups,
    const Ints& pool_kernel, const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode, bool training);

// By oneDNN, of weights that it has packed; see packed.cpp.
Tensor packed_stage(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, const Ints& stride,
                    const Ints& padding, const Ints& dilation, int64_t groups, int64_t lrn_size, double alpha,
                    double beta, double k, int64_t lrn_groups, const Ints& pool_kernel, const Ints& pool_stride,
                    const Ints& pool_padding, bool ceil_mode, bool weight_is_channels_last);
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool relu);

}  // namespace alexnet_fast
