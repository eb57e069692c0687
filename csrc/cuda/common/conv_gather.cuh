// Where the left operand lies when a convolution is computed as a matrix product: its rows are output pixels, its depth
// is (r, s, channel) of the kernel's window with the channel fastest. Depth is counted in chunks of 16 bytes, and a
// chunk never straddles two input pixels. Offsets and strides are in bytes, so the element type does not matter here.
//
// The places of a tile's rows are worked out once and kept in shared memory (RowPlace). A thread owns one chunk in
// depth and steps through the kernel's window in mixed radix (Tap), so the inner loop neither divides nor multiplies
// wide numbers.
#pragma once

#include "cuda/common/divider.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

constexpr int kChunkBytes = 16;

// Input coordinates of the window's first element for one output pixel (negative in the padding), and the offset of
// that place, should the image extend so far. Four words of one type, so that one 16-byte load fetches them.
struct alignas(16) RowPlace {
  int32_t h, w;
  uint32_t low, high;

  RowPlace() = default;
  __device__ __forceinline__ RowPlace(int32_t h, int32_t w, int64_t origin)
      : h(h), w(w), low(static_cast<uint32_t>(origin)), high(static_cast<uint32_t>(origin >> 32)) {}

  __device__ __forceinline__ int64_t origin() const {
    return static_cast<int64_t>(static_cast<uint64_t>(high) << 32 | low);
  }
};

// A chunk's place in the window: row, column, chunk of channels, and how far that is from the window's first chunk.
struct Tap {
  int32_t r, s, chunk;
  int64_t offset;
};

struct Gather {
  int64_t pixels;      // output pixels of the batch
  Divider image, row;  // output pixels of an image, and of a row
  int64_t image_stride, line_stride, pixel_stride;
  int32_t height, width;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  // The input gradient of a strided convolution reads its image as if zeros lay between the pixels: only every
  // spread-th row and column holds pixels. Everywhere else it is 1.
  int32_t spread_h, spread_w;
  int32_t chunks, kernel_h, kernel_w;  // of one group; a window is so many chunks deep

  __host__ __device__ int32_t depth() const { return kernel_h * kernel_w * chunks; }

  __host__ __device__ __forceinline__ Tap tap(int32_t depth) const {
    const int32_t place = depth / chunks;
    Tap tap{place / kernel_w, place % kernel_w, depth % chunks, 0};
    tap.offset = tap.r * (dilation_h * line_stride) + tap.s * (dilation_w * pixel_stride) + tap.chunk * kChunkBytes;
    return tap;
  }

  // step: tap() of the distance.
  __device__ __forceinline__ void advance(Tap& tap, const Tap& step) const {
    tap.chunk += step.chunk;
    tap.s += step.s;
    tap.r += step.r;
    tap.offset += step.offset;
    if (tap.chunk >= chunks) {
      tap.chunk -= chunks;
      ++tap.s;
      tap.offset += dilation_w * pixel_stride - chunks * kChunkBytes;
    }
    if (tap.s >= kernel_w) {
      tap.s -= kernel_w;
      ++tap.r;
      tap.offset += dilation_h * line_stride - kernel_w * (dilation_w * pixel_stride);
    }
  }

  __device__ __forceinline__ bool spread() const { return (spread_h | spread_w) != 1; }

  // For a pixel that does not exist: a place outside of every image.
  __device__ __forceinline__ RowPlace place(int64_t pixel, bool exists) const {
    if (!exists) {
      return {INT32_MIN, INT32_MIN, 0};
    }
    int64_t within, q;
    const int64_t n = image.divide(pixel, within);
    const int64_t p = row.divide(within, q);
    const int32_t h = static_cast<int32_t>(p) * stride_h - pad_h, w = static_cast<int32_t>(q) * stride_w - pad_w;
    return {h, w, n * image_stride + (spread() ? 0 : h * line_stride + w * pixel_stride)};
  }

  // Whether `place` has an input pixel at row r, column s of the window; without spread.
  __device__ __forceinline__ bool inside(const RowPlace& place, const Tap& tap) const {
    return (static_cast<uint32_t>(place.h + tap.r * dilation_h) < static_cast<uint32_t>(height)) &
           (static_cast<uint32_t>(place.w + tap.s * dilation_w) < static_cast<uint32_t>(width));
  }

  // The same with spread, and the offset of that pixel's chunk.
  __device__ __forceinline__ bool inside_spread(const RowPlace& place, const Tap& tap, int64_t& offset) const {
    const int32_t h = place.h + tap.r * dilation_h, w = place.w + tap.s * dilation_w;
    offset = place.origin() + h / spread_h * line_stride + w / spread_w * pixel_stride + tap.chunk * kChunkBytes;
    return h >= 0 && w >= 0 && h % spread_h == 0 && w % spread_w == 0 && h / spread_h < height && w / spread_w < width;
  }
};

// ---------------------------------------------------------------- the ReLU's mask

// dy where the ReLU let its input pass, that is unless its output y is 0 or less; 0 elsewhere. NaN passes, as in
// PyTorch.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> masked(Pack<T, V> dy, const Pack<T, V>& y) {
#pragma unroll
  for (int i = 0; i < V * static_cast<int>(sizeof(T)) / 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      dy.words[i] = element(y, i) <= 0 ? 0 : dy.words[i];
    } else {
      const uint32_t low = element(y, 2 * i) <= 0 ? 0 : dy.words[i] & 0xffff;
      const uint32_t high = element(y, 2 * i + 1) <= 0 ? 0 : dy.words[i] & 0xffff0000;
      dy.words[i] = low | high;
    }
  }
  return dy;
}

}  // namespace alexnet_fast::cuda
