// Max-pooling: the image, its windows, and what a window keeps.
#pragma once

#include "cuda/common/divider.cuh"
#include "cuda/common/packed_max.cuh"
#include "cuda/common/vector.cuh"
#include "params.h"

namespace alexnet_fast::cuda {

// Elements from one place to the next. With them NCHW and NHWC are the same to a kernel.
struct Strides {
  int64_t image, channel, pixel;

  Strides(bool channels_last, int64_t channels, int64_t pixels)
      : image(channels * pixels), channel(channels_last ? 1 : pixels), pixel(channels_last ? channels : 1) {}
};

struct PoolShape {
  int32_t height, width, out_height, out_width;
  Window window;
  Strides in, out;

  // Params: PoolParams or EpilogueParams.
  template <class Params>
  explicit PoolShape(const Params& p)
      : height(static_cast<int32_t>(p.height)),
        width(static_cast<int32_t>(p.width)),
        out_height(static_cast<int32_t>(p.out_height)),
        out_width(static_cast<int32_t>(p.out_width)),
        window(p.window),
        in(p.channels_last, p.channels, p.height * p.width),
        out(p.channels_last, p.channels, p.out_height * p.out_width) {}
};

// AlexNet's window, for which loops are unrolled; every other one takes the general kernels.
inline bool overlapping_3_by_2(const Window& window) {
  return window.kernel_h == 3 && window.kernel_w == 3 && window.stride_h == 2 && window.stride_w == 2;
}

// Whether no window reaches beyond the image, as AlexNet's do not.
template <class Params>
bool windows_inside(const Params& p) {
  const Window& k = p.window;
  return k.pad_h == 0 && k.pad_w == 0 && (p.out_height - 1) * k.stride_h + k.kernel_h <= p.height &&
         (p.out_width - 1) * k.stride_w + k.kernel_w <= p.width;
}

// PyTorch's rule: the first of equals in row order wins, and NaN beats everything, the last one if there are several.
struct Best {
  float value;
  int32_t place;

  __device__ __forceinline__ void take(float candidate, int32_t its_place) {
    if (candidate > value || candidate != candidate) {
      value = candidate;
      place = its_place;
    }
  }
};

template <int N>
__device__ __forceinline__ Pack<uint8_t, N> pack_bytes(const int32_t (&values)[N]) {
  Pack<uint8_t, N> result{};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    using Word = typename Pack<uint8_t, N>::Word;
    result.words[i / 4] |= static_cast<Word>(static_cast<uint32_t>(values[i]) << 8 * (i % 4));
  }
  return result;
}

template <int N>
__device__ __forceinline__ int32_t byte_of(const Pack<uint8_t, N>& pack, int i) {
  return static_cast<int32_t>(pack.words[i / 4] >> 8 * (i % 4) & 0xff);
}

// The gradient of a pool's input, gathered from the windows that hold a pixel and whose code names it.
template <class T>
struct PooledGradient {
  const T* dy;
  const uint8_t* code;
  PoolShape shape;
  Divider in_width, in_height;

  struct Place {
    int64_t image;                                         // offset of the image's output
    int32_t h, w;                                          // of the pixel, counted from the padding's edge
    int32_t row_begin, row_end, column_begin, column_end;  // of the windows
  };

  PooledGradient(const void* dy, const uint8_t* code, const PoolShape& shape)
      : dy(static_cast<const T*>(dy)), code(code), shape(shape), in_width(shape.width), in_height(shape.height) {}

  // `pixel` counts through the batch.
  __device__ __forceinline__ Place place(int64_t pixel) const {
    const Window& k = shape.window;
    int64_t h, w;
    const int64_t image = in_height.divide(in_width.divide(pixel, w), h);
    Place p;
    p.image = image * shape.out.image;
    p.h = static_cast<int32_t>(h) + k.pad_h;
    p.w = static_cast<int32_t>(w) + k.pad_w;
    p.row_begin = p.h < k.kernel_h ? 0 : (p.h - k.kernel_h) / k.stride_h + 1;
    p.row_end = min(p.h / k.stride_h + 1, shape.out_height);
    p.column_begin = p.w < k.kernel_w ? 0 : (p.w - k.kernel_w) / k.stride_w + 1;
    p.column_end = min(p.w / k.stride_w + 1, shape.out_width);
    return p;
  }

  // Channels channel ... channel + N - 1, neighbours in memory unless N is 1.
  template <int N>
  __device__ __forceinline__ void at(const Place& p, int64_t /*offset*/, int32_t channel, float (&sum)[N]) const {
    const Window& k = shape.window;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = 0;
    }
    for (int32_t row = p.row_begin; row < p.row_end; ++row) {
      for (int32_t column = p.column_begin; column < p.column_end; ++column) {
        const int64_t from =
            p.image + channel * shape.out.channel + (int64_t{row} * shape.out_width + column) * shape.out.pixel;
        const Pack<uint8_t, N> codes = load<N>(code + from);
        const Pack<T, N> values = load<N>(dy + from);
        const int32_t own = k.kernel_w * (p.h - row * k.stride_h) + p.w - column * k.stride_w;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] += byte_of(codes, i) == own ? element(values, i) : 0.0f;
        }
      }
    }
  }
};

// The same for V channels of a patch of 2 x 2 pixels, those that window (row, column) begins with, where windows are 3
// x 3 with stride 2, in NHWC. At dy and code a line of windows begins that is first_row lines before the image's. Four
// windows reach into the patch: this one to all pixels, the one above to the upper two, the one on the left to the left
// two, and the one between those to one pixel. So it takes 9 comparisons for 4 pixels, of two channels at once.
template <class T, int V>
__device__ __forceinline__ void gather_patch(const T* dy, const uint8_t* code, uint32_t first_row,
                                             const PoolShape& shape, int32_t row, int32_t column, int32_t channel,
                                             int32_t channels, float (&sums)[2][2][V]) {
  constexpr int K = 3, S = 2;
  // A window that is not there is read as the nearest one that is, and names nobody: no load waits behind a branch. The
  // own one may lie behind the last, and those before it before the first.
  const int32_t near_y[S] = {min(row, shape.out_height - 1), max(row - 1, 0)};
  const int32_t near_x[S] = {min(column, shape.out_width - 1), max(column - 1, 0)};
#pragma unroll
  for (int i = 0; i < S; ++i) {
#pragma unroll
    for (int j = 0; j < S; ++j) {
      const uint32_t from = ((first_row + near_y[i]) * shape.out_width + near_x[j]) * channels + channel;
      Pack<uint8_t, V> codes = load<V>(code + from);
      const Pack<T, V> values = load<V>(dy + from);
      const bool there = near_y[i] == row - i && near_x[j] == column - j;
#pragma unroll
      for (auto& word : codes.words) {
        const uint32_t its_codes = anew(word);  // a compiler that sees where they come from branches around it all
        word = there ? its_codes : 0x01010101u * kClosed;
      }
#pragma unroll
      for (int v = 0; v < V; v += 2) {
        const uint32_t of_two = two_bytes(codes.words[v / 4], v % 4);
        const float value[2] = {element(values, v), element(values, v + 1)};
#pragma unroll
        for (int h = 0; h + i * S < K && h < S; ++h) {
#pragma unroll
          for (int w = 0; w + j * S < K && w < S; ++w) {
            add_where_equal(i + j == 0, of_two, 0x10001 * (K * (h + i * S) + w + j * S), value[0], value[1],
                            sums[h][w][v], sums[h][w][v + 1]);
          }
        }
      }
    }
  }
}

}  // namespace alexnet_fast::cuda
