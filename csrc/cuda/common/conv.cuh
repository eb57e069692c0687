// Convolutions as the launchers hand them to one another: operands brought into the form that the kernels read.
//
// The kernels copy channels in chunks of 16 bytes. Where a group's channels do not fill whole chunks, or a tensor does
// not begin at a multiple of 16 bytes, fold_image() first writes a copy for which both hold. It can do more: a
// convolution of stride f reads the same numbers as one of stride 1 over f x f times as many channels (space to depth),
// and those fill whole chunks. AlexNet's first convolution, 11 x 11 over 3 channels with stride 4, becomes 3 x 3 over
// 48: a depth of 432, of which 363 is useful. Padding 3 channels to 8 would take 968.
//
// The folded weight is filled up with zeros, which are multiplied with real pixels. So an output is NaN where its
// window, rounded up to a multiple of the stride, holds a NaN or an infinity.
#pragma once

#include "cuda/common/conv_gather.cuh"

namespace alexnet_fast::cuda {

// ---------------------------------------------------------------- the product

struct Convolution {
  DType dtype;
  bool allow_tf32;
  int32_t tile;
  bool relu;
  int32_t groups;
  int64_t columns;  // output channels of one group
  Gather gather;
  const void* x;            // 16-byte aligned, a group's channels whole chunks
  const void* relu_output;  // null, or what masks x
  const void* weight;       // (groups * columns, depth), 16-byte aligned
  const void* bias;         // (groups * columns) or null
  void* y;                  // (pixels, groups * columns)
  float* partial;           // null, or room for what the depth's pieces give, where a kernel splits it
  const void* mask;         // of sm90 alone: null, or a ReLU's output like y, which is 0 where that is not positive
};

int convolve(const Convolution& convolution, void* stream);

namespace sm90 {
int convolve(const Convolution& convolution, void* stream);  // cudaErrorNotSupported for what it does not take
int64_t partial_bytes(const Convolution& convolution);       // at Convolution::partial
}  // namespace sm90

// ---------------------------------------------------------------- operands

inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

// The workspace is handed out in pieces, each aligned as the whole is.
inline int64_t workspace_piece(int64_t bytes) { return round_up(bytes, 256); }

// out(n, i, j, group, (a, b, channel)) = x(n, i factor_h + a - pad_h, j factor_w + b - pad_w, group, channel), masked
// by `relu_output` if that is given, and 0 outside of the image and past the last channel.
struct Fold {
  int32_t factor_h, factor_w, pad_h, pad_w;
  int64_t height, width;  // of out
  int32_t chunks;         // of 16 bytes in a group's channels of out
};

struct Image {
  DType dtype;
  int64_t batch, height, width;
  int32_t groups, channels;  // of one group
  const void* data;
  const void* relu_output;
};

inline int64_t folded_bytes(const Image& image, const Fold& fold) {
  return image.batch * fold.height * fold.width * image.groups * fold.chunks * kChunkBytes;
}

int fold_image(const Image& image, const Fold& fold, void* out, void* stream);

// weight (rows, R, S, channels) -> (rows, ceil(R / factor_h), ceil(S / factor_w), fold.chunks), to go with fold_image.
struct Kernel {
  DType dtype;
  int64_t rows;
  int32_t height, width, channels;
  const void* data;
};

inline int64_t folded_bytes(const Kernel& kernel, const Fold& fold) {
  return kernel.rows * ceil_div(kernel.height, fold.factor_h) * ceil_div(kernel.width, fold.factor_w) * fold.chunks *
         kChunkBytes;
}

int fold_kernel(const Kernel& kernel, const Fold& fold, void* out, void* stream);

// weight (groups, K, R, S, C) -> (groups, C, R, S, chunks), turned by 180 degrees, K filled up to whole chunks with
// zeros: the weight of the input gradient.
int transpose_kernel(const Kernel& kernel, int32_t groups, int32_t chunks, void* out, void* stream);

// p's dweight and dbias, where they are wanted, from what runs of pixels gave: (splits, K, depth of the folded kernel)
// and (splits, K). Runs are added in their order.
int add_splits(const ConvParams& p, const Fold& fold, int64_t splits, const float* dweight, const float* dbias,
               void* stream);

// ---------------------------------------------------------------- planning

// Whether 32-bit coordinates and depths hold the convolution and its gradients, and its dtype has a kernel.
inline bool covers(const ConvParams& p) {
  const Window& w = p.window;
  if (p.dtype == DType::f64 || p.groups < 1 || p.channels < 1 || p.out_channels < 1 || p.out_height < 1 ||
      p.out_width < 1) {
    return false;
  }
  const int64_t widest = (p.channels > p.out_channels ? p.channels : p.out_channels) / p.groups + 8;
  return p.channels % p.groups == 0 && p.out_channels % p.groups == 0 && p.height + int64_t{2} * w.pad_h <= INT32_MAX &&
         p.width + int64_t{2} * w.pad_w <= INT32_MAX && widest <= INT32_MAX / w.kernel_h / w.kernel_w;
}

inline int32_t chunks_of(DType dtype, int64_t channels) {
  return static_cast<int32_t>(ceil_div(channels * element_bytes(dtype), int64_t{kChunkBytes}));
}

inline bool needs_fold(DType dtype, int64_t channels, const void* data) {
  return channels * element_bytes(dtype) % 16 != 0 || !aligned_16(data);
}

inline Image input_of(const ConvParams& p) {
  return {p.dtype, p.batch, p.height, p.width, p.groups, static_cast<int32_t>(p.channels / p.groups), p.x, nullptr};
}

inline Kernel kernel_of(const ConvParams& p) {
  return {p.dtype, p.out_channels, p.window.kernel_h, p.window.kernel_w, static_cast<int32_t>(p.channels / p.groups),
          p.weight};
}

// The fold that fills up chunks and moves no pixel.
inline Fold padding_fold(const Image& image) {
  return {1, 1, 0, 0, image.height, image.width, chunks_of(image.dtype, image.channels)};
}

// The fold with which the convolution's depth is the smallest. Where x begins says whether x has to be copied at all,
// and makes no difference to the fold: one of whole chunks is never smaller.
inline Fold input_fold(const ConvParams& p) {
  const Image image = input_of(p);
  Fold padded = padding_fold(image);
  const Window& w = p.window;
  if (p.dilation_h != 1 || p.dilation_w != 1 || !needs_fold(p.dtype, image.channels, p.x)) {
    return padded;
  }
  const int64_t pixels = int64_t{w.stride_h} * w.stride_w;
  if (pixels > INT32_MAX / 4 / image.channels) {
    return padded;
  }
  const int64_t taps_h = ceil_div<int64_t>(w.kernel_h, w.stride_h), taps_w = ceil_div<int64_t>(w.kernel_w, w.stride_w);
  const int64_t channels = pixels * image.channels;
  if (taps_h * taps_w * chunks_of(p.dtype, channels) >= int64_t{w.kernel_h} * w.kernel_w * padded.chunks) {
    return padded;
  }
  return {w.stride_h,
          w.stride_w,
          w.pad_h,
          w.pad_w,
          p.out_height + taps_h - 1,
          p.out_width + taps_w - 1,
          chunks_of(p.dtype, channels)};
}

// Rows are the output pixels of p, the depth is its window over x as folded.
inline Gather input_gather(const ConvParams& p, const Fold& fold) {
  const Window& w = p.window;
  const bool space_to_depth = fold.factor_h != 1 || fold.factor_w != 1;
  Gather gather{};
  gather.pixels = p.batch * p.out_height * p.out_width;
  gather.image = Divider(p.out_height * p.out_width);
  gather.row = Divider(p.out_width);
  gather.pixel_stride = int64_t{fold.chunks} * kChunkBytes * p.groups;
  gather.line_stride = gather.pixel_stride * fold.width;
  gather.image_stride = gather.line_stride * fold.height;
  gather.height = static_cast<int32_t>(fold.height);
  gather.width = static_cast<int32_t>(fold.width);
  gather.stride_h = space_to_depth ? 1 : w.stride_h;
  gather.stride_w = space_to_depth ? 1 : w.stride_w;
  gather.pad_h = space_to_depth ? 0 : w.pad_h;
  gather.pad_w = space_to_depth ? 0 : w.pad_w;
  gather.dilation_h = w.kernel_h == 1 ? 1 : p.dilation_h;
  gather.dilation_w = w.kernel_w == 1 ? 1 : p.dilation_w;
  gather.spread_h = gather.spread_w = 1;
  gather.chunks = fold.chunks;
  gather.kernel_h = ceil_div(w.kernel_h, fold.factor_h);
  gather.kernel_w = ceil_div(w.kernel_w, fold.factor_w);
  return gather;
}

inline bool prepares(const ConvParams& p, bool folded) { return !p.prepared && (folded || !aligned_16(p.weight)); }

// A convolution's operands, prepared: what forward launchers share. `workspace` holds forward_workspace_bytes().
inline int64_t forward_workspace_bytes(const ConvParams& p) {
  if (!covers(p)) {
    return 0;
  }
  const Fold fold = input_fold(p);
  const bool folded = needs_fold(p.dtype, p.channels / p.groups, p.x);
  return (folded ? workspace_piece(folded_bytes(input_of(p), fold)) : 0) +
         (prepares(p, folded) ? workspace_piece(folded_bytes(kernel_of(p), fold)) : 0);
}

// With operands that are not prepared.
inline Convolution shape_of(const ConvParams& p, const Fold& fold) {
  return {
      p.dtype,  p.allow_tf32, p.tile, true,    p.groups, p.out_channels / p.groups, input_gather(p, fold), p.x, nullptr,
      p.weight, p.bias,       p.y,    nullptr, nullptr};
}

inline int prepare(const ConvParams& p, void* stream, Convolution& out) {
  if (!covers(p)) {
    return cudaErrorInvalidValue;
  }
  const Fold fold = input_fold(p);
  const bool folded = needs_fold(p.dtype, p.channels / p.groups, p.x);
  out = shape_of(p, fold);
  char* workspace = static_cast<char*>(p.workspace);
  if (folded) {
    out.x = workspace;
    if (const int error = fold_image(input_of(p), fold, workspace, stream)) {
      return error;
    }
    workspace += workspace_piece(folded_bytes(input_of(p), fold));
  }
  if (prepares(p, folded)) {
    out.weight = workspace;
    return fold_kernel(kernel_of(p), fold, workspace, stream);
  }
  return cudaSuccess;
}

}  // namespace alexnet_fast::cuda
