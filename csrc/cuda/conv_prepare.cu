// Brings the operands of convolutions into the form that the kernels read (conv.cuh has the three transformations), and
// adds up weight gradients that were summed in runs of pixels.
//
// fold_image reads each input element once and writes each output element once, 16 bytes a thread. AlexNet's first
// layer at batch 128 in bfloat16: 38.5 MB in, 39.9 MB out, 26 us at 3.0 TB/s. That is the price of having one product
// kernel for all convolutions. The alternative is to copy 4 bytes at a time straight from the image into the product's
// slabs: four times as many copies, each with an address of its own, in a kernel that is bound by its issue slots.
//
// The first version worked out the place of every element: 1,080 instructions of sm_90 for a thread's 8 elements. It
// was measured at 50 us, with 75% of the issue slots and 37% of DRAM's bandwidth in use (one H100 80GB HBM3,
// 2026-11-27). Now a place is counted from the beginning of its run, of which a thread meets at most two in that layer,
// and elements move in pairs: 456 instructions for 8 elements. At the first version's instructions per cycle those take
// 21 us, so that the bytes bind, though narrowly. Predicted, not measured: 30 us, 2.6 TB/s.
//
// The weight's transformations move less than 3 MB each. At batch 1 they are launches more than bytes: AlexNet's first
// weight is read and written in 0.1 MB, 0.03 us at 3.0 TB/s, and conv_fold_kernel was measured at 3.4 to 3.6 us (the
// same card and day). conv_prepare does it once for a weight that stays, and the calls launch nothing for it.
#include "cuda/common/conv.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

constexpr int kThreads = 256;

// ---------------------------------------------------------------- fold

// A folded pixel is a succession of runs, whose elements lie side by side in x as well. Without groups a run is
// factor_w pixels, a line of the factor_h x factor_w that a folded pixel is made of; with groups it is one pixel's
// channels.
struct FoldShape {
  int64_t chunks;
  Divider group_chunks, groups, width, height;  // of out, fastest axis first
  Divider run, runs_in_line;                    // units of a run, and runs of a line of a folded pixel
  int32_t factor_h, factor_w, pad_h, pad_w;
  int32_t run_pixels, channels;                     // of a run, and of a pixel in it
  int64_t pixel_stride, line_stride, image_stride;  // of x
  int32_t in_height, in_width;
};

// Where a run begins in x, and which of its units are inside the image: begin ... begin + count - 1.
template <int kUnit, class T>
struct FoldRun {
  const T* from;
  int32_t begin;
  uint32_t count;

  __device__ __forceinline__ FoldRun(const FoldShape& shape, const T* image, int32_t top, int32_t left,
                                     uint32_t number) {
    uint32_t b;
    const int32_t a = shape.runs_in_line.divide_small(number, b);
    const int32_t h = top + a, w = left + static_cast<int32_t>(b);
    const bool inside = a < shape.factor_h && static_cast<uint32_t>(h) < static_cast<uint32_t>(shape.in_height);
    const int32_t first = min(max(-w, 0), shape.run_pixels);
    const int32_t end = inside ? min(max(shape.in_width - w, first), shape.run_pixels) : first;
    from = image + h * shape.line_stride + w * shape.pixel_stride;
    begin = first * shape.channels / kUnit;
    count = (end - first) * shape.channels / kUnit;
  }
};

// kUnit: elements moved at once, 2 where runs of 16-bit elements begin and end at even ones, else 1.
template <class T, int kUnit, bool kMasked>
__global__ void __launch_bounds__(kThreads)
    conv_fold_image(const T* __restrict__ x, const T* __restrict__ relu_output, T* __restrict__ out, FoldShape shape) {
  constexpr int kUnits = kVector<T> / kUnit;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= shape.chunks) {
    return;
  }
  int64_t chunk, group, j, i;
  int64_t rest = shape.group_chunks.divide(index, chunk);
  rest = shape.groups.divide(rest, group);
  rest = shape.width.divide(rest, j);
  const int64_t n = shape.height.divide(rest, i);
  uint32_t place;
  uint32_t number = shape.run.divide_small(static_cast<uint32_t>(chunk) * kUnits, place);
  const int32_t top = static_cast<int32_t>(i) * shape.factor_h - shape.pad_h;
  const int32_t left = static_cast<int32_t>(j) * shape.factor_w - shape.pad_w;
  const T* image = x + n * shape.image_stride + group * shape.channels;
  FoldRun<kUnit, T> run(shape, image, top, left, number);

  Pack<T, kVector<T>> kept;
#pragma unroll
  for (int e = 0; e < kUnits; ++e) {
    Pack<T, kUnit> unit{};
    if (place - run.begin < run.count) {
      const T* from = run.from + int64_t{place} * kUnit;
      unit = load<kUnit>(from);
      if constexpr (kMasked) {
        if (to_float(relu_output[from - x]) <= 0) {
          unit = {};
        }
      }
    }
    if constexpr (sizeof(unit) == 4) {
      kept.words[e] = unit.words[0];
    } else {
      kept.words[e / 2] = e % 2 == 0 ? unit.words[0] : kept.words[e / 2] | static_cast<uint32_t>(unit.words[0]) << 16;
    }
    if (++place == static_cast<uint32_t>(shape.run.divisor) && e + 1 < kUnits) {
      run = FoldRun<kUnit, T>(shape, image, top, left, ++number);
      place = 0;
    }
  }
  store(out + index * kVector<T>, kept);
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

// ---------------------------------------------------------------- the splits' sum

// dweight (K, R, S, C) from partial (splits, K, folded depth), and after it dbias (K) from (splits, K).
struct SumShape {
  int64_t weights, biases;  // elements wanted of each; 0 where not
  int64_t rows, depth;      // K, and the folded depth in elements
  int32_t splits;
  Divider channels, width, height;  // C, S, R
  int32_t factor_h, factor_w, folded_width, folded_channels;
};

constexpr int kSumThreads = 256;

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    conv_sum_splits(const float* __restrict__ partial_weights, const float* __restrict__ partial_biases,
                    T* __restrict__ dweight, T* __restrict__ dbias, SumShape shape) {
  const int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  const float* from = partial_biases;
  T* to;
  int64_t stride = shape.rows;
  if (index < shape.weights) {
    int64_t c, s, r;
    int64_t row = shape.channels.divide(index, c);
    row = shape.width.divide(row, s);
    row = shape.height.divide(row, r);
    const int64_t place = r / shape.factor_h * shape.folded_width + s / shape.factor_w;
    const int64_t pixel = r % shape.factor_h * shape.factor_w + s % shape.factor_w;
    from = partial_weights + row * shape.depth + place * shape.folded_channels + pixel * shape.channels.divisor + c;
    stride *= shape.depth;
    to = dweight + index;
  } else if (index < shape.weights + shape.biases) {
    from += index - shape.weights;
    to = dbias + index - shape.weights;
  } else {
    return;
  }
  float sum = 0;
#pragma unroll 4
  for (int32_t split = 0; split < shape.splits; ++split) {
    sum += from[split * stride];
  }
  from_float(sum, *to);
}

}  // namespace

// ---------------------------------------------------------------- launchers

namespace {

// Whether every run begins at an even element of x, and ends before one.
bool even_runs(const Image& image, const Fold& fold) {
  const int64_t channels = image.channels;
  return image.groups == 1 && (fold.factor_w * channels | fold.pad_w * channels | image.width * channels) % 2 == 0 &&
         reinterpret_cast<uintptr_t>(image.data) % 4 == 0;
}

template <class T, int kUnit, bool kMasked>
int launch_fold_image(const Image& image, const Fold& fold, int64_t chunks, void* out, void* stream) {
  const int32_t run_pixels = image.groups == 1 ? fold.factor_w : 1;
  const int64_t pixel_stride = int64_t{image.groups} * image.channels;
  const FoldShape shape{chunks,
                        Divider(fold.chunks),
                        Divider(image.groups),
                        Divider(fold.width),
                        Divider(fold.height),
                        Divider(int64_t{run_pixels} * image.channels / kUnit),
                        Divider(fold.factor_w / run_pixels),
                        fold.factor_h,
                        fold.factor_w,
                        fold.pad_h,
                        fold.pad_w,
                        run_pixels,
                        image.channels,
                        pixel_stride,
                        pixel_stride * image.width,
                        pixel_stride * image.width * image.height,
                        static_cast<int32_t>(image.height),
                        static_cast<int32_t>(image.width)};
  return launch<conv_fold_image<T, kUnit, kMasked>>(
      dim3(ceil_div<int64_t>(chunks, kThreads)), dim3(kThreads), 0, stream, static_cast<const T*>(image.data),
      static_cast<const T*>(image.relu_output), static_cast<T*>(out), shape);
}

}  // namespace

int fold_image(const Image& image, const Fold& fold, void* out, void* stream) {
  return with_dtype(image.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t chunks = folded_bytes(image, fold) / kChunkBytes;
    if (chunks == 0) {
      return static_cast<int>(cudaSuccess);
    }
    if (image.relu_output != nullptr) {
      return launch_fold_image<T, 1, true>(image, fold, chunks, out, stream);
    }
    if constexpr (sizeof(T) == 2) {
      if (even_runs(image, fold)) {
        return launch_fold_image<T, 2, false>(image, fold, chunks, out, stream);
      }
    }
    return launch_fold_image<T, 1, false>(image, fold, chunks, out, stream);
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

int64_t conv_prepare_workspace_bytes(const ConvParams& p) {
  return covers(p) ? folded_bytes(kernel_of(p), input_fold(p)) : 0;
}

int conv_prepare(const ConvParams& p, void* stream) {
  return covers(p) ? fold_kernel(kernel_of(p), input_fold(p), p.workspace, stream) : cudaErrorInvalidValue;
}

int add_splits(const ConvParams& p, const Fold& fold, int64_t splits, const float* dweight, const float* dbias,
               void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Window& w = p.window;
    SumShape shape{};
    shape.rows = p.out_channels;
    shape.splits = static_cast<int32_t>(splits);
    shape.channels = Divider(p.channels / p.groups);
    shape.width = Divider(w.kernel_w);
    shape.height = Divider(w.kernel_h);
    shape.weights = p.dweight == nullptr ? 0 : p.out_channels * w.kernel_h * w.kernel_w * shape.channels.divisor;
    shape.biases = p.dbias == nullptr ? 0 : p.out_channels;
    shape.factor_h = fold.factor_h;
    shape.factor_w = fold.factor_w;
    shape.folded_width = ceil_div(w.kernel_w, fold.factor_w);
    shape.folded_channels = fold.chunks * kVector<T>;
    shape.depth = int64_t{ceil_div(w.kernel_h, fold.factor_h)} * shape.folded_width * shape.folded_channels;
    return launch<conv_sum_splits<T>>(dim3(ceil_div<int64_t>(shape.weights + shape.biases, kSumThreads)),
                                      dim3(kSumThreads), 0, stream, dweight, dbias, static_cast<T*>(p.dweight),
                                      static_cast<T*>(p.dbias), shape);
  });
}

}  // namespace alexnet_fast::cuda
