// Max-pooling over a Source: the kernels of max_pool_fwd.cu, and of epilogue_fwd.cu without LRN.
//
// A thread owns V channels of a strip: kRows output pixels below each other. Windows of 3 with stride 2 share a row
// with the window below: the strip reads each row of its input once, finds the best of each row's three, and then the
// best of three rows; that order of comparisons has the result of going through the window row by row. Columns are
// shared with the threads on either side, through L1.
#pragma once

#include "cuda/common/pool.cuh"
#include "cuda/common/source.cuh"
#include "cuda/common/units.cuh"

namespace alexnet_fast::cuda {

struct Strips {
  PoolShape shape;
  Divider out_width, count;  // strips in a column of output pixels
};

// Writes V outputs and, if wanted, their codes. With kClosing a maximum of 0 or less is kClosed.
template <bool kClosing, class T, int V>
__device__ __forceinline__ void store_best(const Best (&best)[V], int64_t offset, T* y, uint8_t* code) {
  float values[V];
  int32_t places[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[i] = best[i].value;
    places[i] = kClosing && best[i].value <= 0 ? kClosed : best[i].place;
  }
  store(y + offset, pack<T>(values));
  if (code != nullptr) {
    store(code + offset, pack_bytes(places));
  }
}

template <int V>
__device__ __forceinline__ void begin(Best (&best)[V], int32_t place) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    best[i] = {-INFINITY, place};
  }
}

// K x K windows with stride S. Rows and columns beyond the image are read as the nearest one in it, whose elements the
// window holds anyway, at its own place: the result is that of the cut window, and no load waits behind a branch.
template <class T, int V, int K, int S, int kRows, bool kClosing, class Source>
__global__ void __launch_bounds__(kThreads, 1)
    pool_fwd_strips(Source source, T* __restrict__ y, uint8_t* __restrict__ code, Units units, int32_t channels,
                    Strips strips) {
  const PoolShape& shape = strips.shape;
  const int32_t channel = units.vector() * V;
  if (channel >= channels) {
    return;
  }
  const auto local = source.template local<V>(channel);
  const int64_t line = shape.width * shape.in.pixel;
  for (int64_t unit = units.first(); unit < units.count; unit += units.stride()) {
    int64_t column, strip;
    const int64_t image = strips.count.divide(strips.out_width.divide(unit, column), strip);
    const int32_t first_row = static_cast<int32_t>(strip) * kRows;
    const int32_t top = first_row * S - shape.window.pad_h;
    const int32_t left = static_cast<int32_t>(column) * S - shape.window.pad_w;
    const int64_t in = image * shape.in.image + channel * shape.in.channel;
    const int64_t out = image * shape.out.image + channel * shape.out.channel;
    int64_t from[K];
    int32_t in_window[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      const int32_t w = min(max(left + j, 0), shape.width - 1);
      from[j] = in + w * shape.in.pixel;
      in_window[j] = w - left;
    }

    Best best[kRows][V];
#pragma unroll
    for (int i = 0; i < (kRows - 1) * S + K; ++i) {
      const int32_t h = min(max(top + i, 0), shape.height - 1);
      Pack<T, V> x[K];
#pragma unroll
      for (int j = 0; j < K; ++j) {
        x[j] = local.at(from[j] + h * line);
      }
      Best in_row[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        in_row[v] = {element(x[0], v), in_window[0]};
#pragma unroll
        for (int j = 1; j < K; ++j) {
          in_row[v].take(element(x[j], v), in_window[j]);
        }
      }
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        const int in_strip = i - row * S;
        if (in_strip < 0 || in_strip >= K) {
          continue;
        }
        const int32_t place = K * (h - top - row * S);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (in_strip == 0) {
            best[row][v] = {in_row[v].value, place + in_row[v].place};
          } else {
            best[row][v].take(in_row[v].value, place + in_row[v].place);
          }
        }
        // The row that closes a window: its registers are free from here on.
        if (in_strip == K - 1 && first_row + row < shape.out_height) {
          const int64_t pixel = int64_t{first_row + row} * shape.out_width + column;
          store_best<kClosing>(best[row], out + pixel * shape.out.pixel, y, code);
        }
      }
    }
  }
}

// Any window; a unit is an output pixel.
template <class T, int V, bool kClosing, class Source>
__global__ void __launch_bounds__(kThreads, 1)
    pool_fwd_any(Source source, T* __restrict__ y, uint8_t* __restrict__ code, Units units, int32_t channels,
                 Strips strips) {
  const PoolShape& shape = strips.shape;
  const Window& k = shape.window;
  const int32_t channel = units.vector() * V;
  if (channel >= channels) {
    return;
  }
  const auto local = source.template local<V>(channel);
  for (int64_t unit = units.first(); unit < units.count; unit += units.stride()) {
    int64_t column, row;
    const int64_t image = strips.count.divide(strips.out_width.divide(unit, column), row);
    const int32_t top = static_cast<int32_t>(row) * k.stride_h - k.pad_h;
    const int32_t left = static_cast<int32_t>(column) * k.stride_w - k.pad_w;
    const int32_t i_begin = max(-top, 0), i_end = min(k.kernel_h, shape.height - top);
    const int32_t j_begin = max(-left, 0), j_end = min(k.kernel_w, shape.width - left);
    const int64_t in = image * shape.in.image + channel * shape.in.channel;
    Best best[V];
    begin(best, k.kernel_w * i_begin + j_begin);
    for (int32_t i = i_begin; i < i_end; ++i) {
      for (int32_t j = j_begin; j < j_end; ++j) {
        const int64_t pixel = int64_t{top + i} * shape.width + left + j;
        const Pack<T, V> x = local.at(in + pixel * shape.in.pixel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          best[v].take(element(x, v), k.kernel_w * i + j);
        }
      }
    }
    const int64_t out =
        image * shape.out.image + channel * shape.out.channel + (row * shape.out_width + column) * shape.out.pixel;
    store_best<kClosing>(best, out, y, code);
  }
}

// ---------------------------------------------------------------- launch

template <class T, int V, bool kClosing, class Params, class Source>
int launch_pool_fwd(const Params& p, const Source& source, void* stream) {
  constexpr int kRows = 2;
  const bool unrolled = overlapping_3_by_2(p.window);
  const int64_t strips = ceil_div<int64_t>(p.out_height, unrolled ? kRows : 1);
  const UnitGrid grid(p.batch * strips * p.out_width, p.channels / V, p.channels_last);
  constexpr auto unrolled_kernel =
      launch<pool_fwd_strips<T, V, 3, 2, kRows, kClosing, Source>, Source, T*, uint8_t*, Units, int32_t, Strips>;
  constexpr auto any_kernel =
      launch<pool_fwd_any<T, V, kClosing, Source>, Source, T*, uint8_t*, Units, int32_t, Strips>;
  return (unrolled ? unrolled_kernel : any_kernel)(grid.grid, grid.block, 0, stream, source, static_cast<T*>(p.y),
                                                   p.code, grid.units, static_cast<int32_t>(p.channels),
                                                   Strips{PoolShape(p), Divider(p.out_width), Divider(strips)});
}

}  // namespace alexnet_fast::cuda
