// Operands of convolutions in the form that the kernels read: see conv.cuh for the three transformations.
//
// fold_image reads each input element once and writes each output element once, 16 bytes a thread. AlexNet's first
// layer at batch 128 in bfloat16: 38.5 MB in, 39.9 MB out, 18 us at 4.3 TB/s; about ten instructions an element for its
// place take as long on 132 multiprocessors. Counted, not measured. That is nearly the convolution's own 23 us: the
// price of one product kernel for all convolutions. Weighed against it: copies of 4 bytes straight from the image into
// the product's slabs, four times as many of them, each with an address of its own, in the kernel that is bound by its
// issue slots.
//
// The weight's transformations move less than 3 MB each.
#include "cuda/common/conv.cuh"

namespace alexnet_fast::cuda {
namespace {

constexpr int kThreads = 256;

// ---------------------------------------------------------------- fold

struct FoldShape {
  int64_t chunks;
  Divider group_chunks, groups, width, height;  // of out, fastest axis first
  int32_t factor_w, pad_h, pad_w, factor_h;
  int32_t channels;                   // of x, a group
  int64_t line_stride, pixel_stride;  // of x
  int64_t in_height, in_width;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_fold_image(const T* __restrict__ x, const T* __restrict__ relu_output, T* __restrict__ out, FoldShape shape) {
  constexpr int V = kVector<T>;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= shape.chunks) {
    return;
  }
  int64_t chunk, group, j, i;
  int64_t rest = shape.group_chunks.divide(index, chunk);
  rest = shape.groups.divide(rest, group);
  rest = shape.width.divide(rest, j);
  const int64_t n = shape.height.divide(rest, i);
  // The chunk's first element is number `channel` of pixel (a, b) of the folded ones.
  const int32_t first = static_cast<int32_t>(chunk) * V;
  int32_t channel = first % shape.channels;
  int32_t a = first / shape.channels / shape.factor_w, b = first / shape.channels % shape.factor_w;
  const int64_t top = i * shape.factor_h - shape.pad_h, left = j * shape.factor_w - shape.pad_w;
  const int64_t image = n * shape.in_height * shape.line_stride + group * shape.channels;

  Pack<T, V> kept{};
  T* elements = reinterpret_cast<T*>(&kept);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const int64_t h = top + a, w = left + b;
    if (a < shape.factor_h && h >= 0 && h < shape.in_height && w >= 0 && w < shape.in_width) {
      const int64_t from = image + h * shape.line_stride + w * shape.pixel_stride + channel;
      if (relu_output == nullptr || !(to_float(relu_output[from]) <= 0)) {
        elements[e] = x[from];
      }
    }
    if (++channel == shape.channels) {
      channel = 0;
      if (++b == shape.factor_w) {
        b = 0;
        ++a;
      }
    }
  }
  store(out + index * V, kept);
}

struct FoldKernelShape {
  int64_t elements;
  Divider out_channels, out_width, out_height;
  int32_t factor_h, factor_w, channels, height, width;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_fold_kernel(const T* __restrict__ weight, T* __restrict__ out, FoldKernelShape shape) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= shape.elements) {
    return;
  }
  int64_t place, s, r;
  int64_t row = shape.out_channels.divide(index, place);
  row = shape.out_width.divide(row, s);
  row = shape.out_height.divide(row, r);
  const int64_t pixel = place / shape.channels;
  r = r * shape.factor_h + pixel / shape.factor_w;
  s = s * shape.factor_w + pixel % shape.factor_w;
  T kept{};
  if (pixel < shape.factor_h * shape.factor_w && r < shape.height && s < shape.width) {
    kept = weight[((row * shape.height + r) * shape.width + s) * shape.channels + place % shape.channels];
  }
  out[index] = kept;
}

// ---------------------------------------------------------------- transpose

constexpr int kSide = 32;  // of a square of K x C that passes through shared memory
constexpr int kStride = kThreads / kSide;

struct TransposeShape {
  Divider squares_k, squares_c, taps;  // the block's axes, fastest first; then groups
  int32_t rows, channels, columns;     // K and C of a group, and K as filled up
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    conv_transpose_kernel(const T* __restrict__ weight, T* __restrict__ out, TransposeShape shape) {
  ALEXNET_FAST_SHARED(T[kSide][kSide + 2], square);
  int64_t square_k, square_c, tap;
  int64_t group = shape.squares_k.divide(blockIdx.x, square_k);
  group = shape.squares_c.divide(group, square_c);
  group = shape.taps.divide(group, tap);
  const int64_t taps = shape.taps.divisor;
  const int64_t turned = taps - 1 - tap;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
#pragma unroll
  for (int i = y; i < kSide; i += kStride) {
    const int64_t k = square_k * kSide + i, c = square_c * kSide + x;
    T element{};
    if (k < shape.rows && c < shape.channels) {
      element = weight[((group * shape.rows + k) * taps + turned) * shape.channels + c];
    }
    square[i][x] = element;
  }
  __syncthreads();
#pragma unroll
  for (int i = y; i < kSide; i += kStride) {
    const int64_t c = square_c * kSide + i, k = square_k * kSide + x;
    if (k < shape.columns && c < shape.channels) {
      out[((group * shape.channels + c) * taps + tap) * shape.columns + k] = square[x][i];
    }
  }
}

}  // namespace

// ---------------------------------------------------------------- launchers

int fold_image(const Image& image, const Fold& fold, void* out, void* stream) {
  return with_dtype(image.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t pixel_stride = int64_t{image.groups} * image.channels;
    const int64_t chunks = folded_bytes(image, fold) / kChunkBytes;
    if (chunks == 0) {
      return static_cast<int>(cudaSuccess);
    }
    const FoldShape shape{chunks,
                          Divider(fold.chunks),
                          Divider(image.groups),
                          Divider(fold.width),
                          Divider(fold.height),
                          fold.factor_w,
                          fold.pad_h,
                          fold.pad_w,
                          fold.factor_h,
                          image.channels,
                          pixel_stride * image.width,
                          pixel_stride,
                          image.height,
                          image.width};
    return launch<conv_fold_image<T>>(dim3(ceil_div<int64_t>(chunks, kThreads)), dim3(kThreads), 0, stream,
                                      static_cast<const T*>(image.data), static_cast<const T*>(image.relu_output),
                                      static_cast<T*>(out), shape);
  });
}

int fold_kernel(const Kernel& kernel, const Fold& fold, void* out, void* stream) {
  return with_dtype(kernel.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t elements = folded_bytes(kernel, fold) / static_cast<int64_t>(sizeof(T));
    const FoldKernelShape shape{elements,
                                Divider(fold.chunks * kVector<T>),
                                Divider(ceil_div(kernel.width, fold.factor_w)),
                                Divider(ceil_div(kernel.height, fold.factor_h)),
                                fold.factor_h,
                                fold.factor_w,
                                kernel.channels,
                                kernel.height,
                                kernel.width};
    return launch<conv_fold_kernel<T>>(dim3(ceil_div<int64_t>(elements, kThreads)), dim3(kThreads), 0, stream,
                                       static_cast<const T*>(kernel.data), static_cast<T*>(out), shape);
  });
}

int transpose_kernel(const Kernel& kernel, int32_t groups, int32_t chunks, void* out, void* stream) {
  return with_dtype(kernel.dtype, [&](auto type) {
    using T = decltype(type);
    const int32_t columns = chunks * kVector<T>;
    const TransposeShape shape{Divider(ceil_div(columns, kSide)),
                               Divider(ceil_div(kernel.channels, kSide)),
                               Divider(int64_t{kernel.height} * kernel.width),
                               static_cast<int32_t>(kernel.rows / groups),
                               kernel.channels,
                               columns};
    const int64_t blocks = shape.squares_k.divisor * shape.squares_c.divisor * shape.taps.divisor * groups;
    return launch<conv_transpose_kernel<T>>(dim3(blocks), dim3(kThreads), 0, stream, static_cast<const T*>(kernel.data),
                                            static_cast<T*>(out), shape);
  });
}

}  // namespace alexnet_fast::cuda
