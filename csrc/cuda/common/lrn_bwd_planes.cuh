// Local response normalization backward over NCHW planes in shared memory, for common/lrn_bwd.cuh, which has the
// formula and the launch: a pixel a thread for any window, and for AlexNet's four (common/lrn_bwd_walk.cuh).
#pragma once

#include "cuda/common/lrn_bwd_walk.cuh"

namespace alexnet_fast::cuda {

// ---------------------------------------------------------------- any window

// In shared memory: rows of x, channels begin - 2 Halo and on, and of dy from begin - Halo on, which dx takes the place
// of.
template <class T>
struct BackwardTiles : PlaneTiles {
  static constexpr int32_t kHalo = kWidestHalo, kLongestChunk = 128 / sizeof(T);
  int32_t dy_at, bytes_of_both;

  BackwardTiles(const LrnShape& shape, int64_t groups)
      : PlaneTiles(shape, groups, sizeof(T), kLongestChunk, [](int64_t chunk) { return 2 * chunk + 6 * kHalo; }),
        dy_at(bytes(chunk + 4 * kHalo, sizeof(T))),
        bytes_of_both(dy_at + bytes(chunk + 2 * kHalo, sizeof(T))) {}

  // Whether the kernel takes it.
  static bool take(const LrnShape& shape, const LrnWindow& window, const T* dy, const T* dx) {
    return PlaneTiles::take<false>(shape, window) && alike_in_16(dx, dy);
  }
};

// From x and dy in shared memory to dx, which takes the place of dy. A thread walks through one pixel.
template <class T>
__device__ __forceinline__ void lrn_bwd_of_tile(const PlaneTile& tile, const T* x_rows, T* dy_rows, T* dx,
                                                const Lrn& lrn) {
  constexpr int Halo = BackwardTiles<T>::kHalo, kStep = PlaneTiles::kStep;
  const int32_t stride = tile.lie.stride;
  T* const dx_rows = dy_rows + Halo * stride;
  if (static_cast<int32_t>(threadIdx.x) < tile.width) {
    const T* next_x = x_rows + threadIdx.x;
    const T* next_dy = dy_rows + threadIdx.x;
    T* here = dx_rows + threadIdx.x;
    // At channel c: x of channels c and on, q of channels c - Halo and on, a = dy t^-beta of channels c and on.
    float values[2 * Halo + kStep], q[2 * Halo + kStep] = {}, a[Halo + kStep] = {};
    int32_t c = tile.begin - 2 * Halo;
#pragma unroll
    for (int i = 0; i < 2 * Halo; ++i, next_x += stride) {
      values[i] = to_float(*next_x);
    }
    // Goes on by kStep channels, and writes dx of them unless they are still before the chunk: the walk begins so early
    // that q is complete when the first dx is due.
    const auto step = [&](auto is_within, auto is_writing) {
      float x_of[2 * Halo + kStep], t[kStep], w[kStep], reciprocal[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i, next_x += stride) {
        values[2 * Halo + i] = to_float(*next_x);
      }
#pragma unroll
      for (int i = 0; i < 2 * Halo + kStep; ++i) {
        x_of[i] = values[i];
      }
      scales<Halo>(x_of, lrn, t);
      inverse_power<T>(t, lrn, w, reciprocal);
#pragma unroll
      for (int i = 0; i < kStep; ++i, next_dy += stride) {
        a[Halo + i] = to_float(*next_dy) * w[i];
        q[2 * Halo + i] = a[Halo + i] * x_of[Halo + i] * reciprocal[i];
        // Beyond the group's ends there is no q, whatever its t: a NaN within must not come back from there.
        if (!decltype(is_within)::value && !tile.has(c + Halo + i)) {
          q[2 * Halo + i] = 0;
        }
      }
      if constexpr (decltype(is_writing)::value) {
        float sum[kStep];
        window_sums<Halo>(q, lrn.after, lrn.before, sum);
#pragma unroll
        for (int i = 0; i < kStep; ++i, here += stride) {
          from_float(fmaf(-lrn.slope * values[i], sum[i], a[i]), *here);
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * Halo; ++i) {
        values[i] = values[i + kStep];
        q[i] = q[i + kStep];
      }
#pragma unroll
      for (int i = 0; i < Halo; ++i) {
        a[i] = a[i + kStep];
      }
      c += kStep;
    };
    static_assert(2 * Halo % kStep == 0);
    while (c < tile.begin) {
      step(std::false_type{}, std::false_type{});
    }
    while (c + kStep + Halo <= tile.lie.group_channels && c < tile.end) {
      step(std::true_type{}, std::true_type{});
    }
    while (c < tile.end) {
      step(std::false_type{}, std::true_type{});
    }
  }
  __syncthreads();
  tile.template put<kRowLanes<T>>(dx_rows, dx);
}

template <class T>
__global__ void __launch_bounds__(kPlaneThreads, 4)
    lrn_bwd_planes_any(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, BackwardTiles<T> tiles,
                       Lrn lrn) {
  constexpr int Halo = BackwardTiles<T>::kHalo;
  const PlaneTile tile(tiles);
  const int32_t channels = ceil_div(tile.channels(), PlaneTiles::kStep) * PlaneTiles::kStep;
  T* const x_rows = place_run(dynamic_shared(), x + tile.offset(tile.begin - 2 * Halo));
  T* const dy_rows = place_run(dynamic_shared() + tiles.dy_at, dy + tile.offset(tile.begin - Halo));
  tile.template fetch<kFetchLanes<T>, 2>(x_rows, x, tile.begin - 2 * Halo, channels + 4 * Halo);
  tile.template fetch<kFetchLanes<T>, 2>(dy_rows, dy, tile.begin - Halo, channels + 2 * Halo);
  await_runs();
  lrn_bwd_of_tile(tile, x_rows, dy_rows, dx, lrn);
}

// ---------------------------------------------------------------- AlexNet's window

// Elements from one row to the next of planes with one pixel more than a multiple of eight, as those of AlexNet's odd
// heights and widths: known when compiled, so that a walk's addresses are one for each pixel, whatever the channel.
template <class T>
struct OddApart {
  static constexpr int32_t x = sizeof(T) == 4 ? 133 : 137;
};

struct AnyApart {
  int32_t x;
};

// A block is two slices, of a warp each. A lane has every 32nd pixel of a tile, up to four.
template <class T>
struct SliceTiles {
  static constexpr int32_t kHalo = 2, kStep = PlaneTiles::kStep, kSlices = 2, kThreads = 32 * kSlices;
  static constexpr int32_t kLongestSlice = sizeof(T) == 4 ? 16 : 24, kMostPixels = 32 * kSlicePixels;
  static constexpr int32_t kFetchVectors = 3;  // of a row, for each of kFetchLanes: wherever it begins, 17 or 33

  PlaneTiles x;  // and dy
  int32_t channels, slice, dy_at, bytes;

  SliceTiles(const LrnShape& shape, int64_t groups)
      : x(shape, groups, kSlices * kLongestSlice), channels(static_cast<int32_t>(shape.channels)) {
    x.cut(ceil_div<int64_t>(x.pixels, ceil_div<int64_t>(x.pixels, kMostPixels)), sizeof(T));
    static_assert((kFetchVectors * kFetchLanes<T> - 1) * kVector<T> + 1 >= kMostPixels);
    slice = ceil_div(ceil_div(x.chunk, kSlices), kStep) * kStep;
    constexpr int32_t kWider = OddApart<T>::x;  // so that rows still lie as these within 16 bytes
    if (x.stride <= kWider && (kWider - x.stride) % kVector<T> == 0) {
      x.stride = kWider;
    }
    dy_at = x.bytes(x.chunk + 4 * kHalo, sizeof(T));
    bytes = dy_at + x.bytes(x.chunk + 2 * kHalo, sizeof(T));
  }

  // Whether the kernel takes it, and `partial` then has x.items() rows.
  template <bool kRectified>
  static bool take(const LrnShape& shape, const LrnWindow& window, const T* x, const T* dx) {
    return PlaneTiles::take<kRectified>(shape, window) && LrnOfFive::is(window) && alike_in_16(x, dx);
  }
};

// dy of a thread's pixels, of which some may be beyond the tile.
template <class T, class Apart>
struct PixelsGradient {
  const Apart apart;
  const T* dy[kSlicePixels];
  float none[kSlicePixels];

  __device__ __forceinline__ void at(int n, float (&values)[kSlicePixels]) const {
#pragma unroll
    for (int p = 0; p < kSlicePixels; ++p) {
      values[p] = to_float(dy[p][n * apart.x]);
    }
  }

  // Of x; more than there is where there is no pixel, so that sums have none.
  __device__ __forceinline__ float none_up_to(int p) const { return none[p]; }

  __device__ __forceinline__ void go_on(int n) {
#pragma unroll
    for (int p = 0; p < kSlicePixels; ++p) {
      dy[p] += n * apart.x;
    }
  }
};

template <class T, bool kRectified, class Apart>
__global__ void __launch_bounds__(SliceTiles<T>::kThreads, 8)
    lrn_bwd_planes(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ partial,
                   SliceTiles<T> tiles, Apart apart, LrnOfFive lrn) {
  using Tiles = SliceTiles<T>;
  constexpr int Halo = Tiles::kHalo, kStep = Tiles::kStep, kGroups = 32 / kSumLanes;
  constexpr int kSums = kRectified ? Tiles::kSlices * kGroups * Tiles::kLongestSlice : 1;
  using Sums = float[kSums];
  ALEXNET_FAST_SHARED(Sums, sums);  // a row of channels for each group of lanes
  const PlaneTile tile(tiles.x);
  const int32_t first = tile.begin - Halo, count = ceil_div(tile.channels(), kStep) * kStep + 2 * Halo;
  T* const x_rows = place_run(dynamic_shared(), x + tile.offset(first - Halo));
  T* const dy_rows = place_run(dynamic_shared() + tiles.dy_at, dy + tile.offset(first));
  // Each warp copies one tensor.
  if (const Crew crew(0, 1); crew.has_this()) {
    tile.template fetch<kFetchLanes<T>, Tiles::kFetchVectors>(x_rows, x, first - Halo, count + 2 * Halo, crew);
  } else {
    tile.template fetch<kFetchLanes<T>, Tiles::kFetchVectors>(dy_rows, dy, first, count, Crew(1, 1));
  }

  const int32_t lane = threadIdx.x % 32, slice = threadIdx.x / 32, before = slice * tiles.slice;
  const int32_t begin = tile.begin + before, end = min(begin + tiles.slice, tile.end);
  const bool active = lane < tile.width && begin < end;
  SliceWalk<T, Apart, PixelsGradient<T, Apart>, kRectified> walk(lrn, apart, {apart});
#pragma unroll
  for (int p = 0; p < kSlicePixels; ++p) {
    const bool there = lane + 32 * p < tile.width;
    const int32_t pixel = before * apart.x + lane + (there ? 32 * p : 0);
    walk.gradient.none[p] = p == 0 || there ? 0.0f : INFINITY;
    walk.x[p] = x_rows + pixel;
    walk.gradient.dy[p] = dy_rows + pixel;
  }
  await_runs();
  if (active) {
    walk.begin();
  }
  __syncthreads();
  const int32_t in_row = Tiles::kSlices * tiles.slice;
  SliceSums<kSumLanes> own_sums(sums, in_row, lane, before, true);
  float totals[kSumLanes] = {};  // which stay 0 where there is no pixel
#pragma unroll 1
  for (int32_t c = begin; c < end; c += kSumLanes) {
    if (active) {
      walk.next(totals);
    }
    if (kRectified && partial != nullptr) {
      own_sums.add(totals);
    }
  }
  __syncthreads();
  // dx of a channel lies where x of the fourth one after it was: of 16 bits it may be four elements off a multiple of
  // eight.
  tile.template put<kRowLanes<T>, 1, sizeof(T) == 2>(x_rows + 4 * Halo * apart.x, dx);
  if (kRectified && partial != nullptr) {
    store_slice_sums(tile, sums, in_row, kGroups, tiles.channels, partial);
  }
}

}  // namespace alexnet_fast::cuda
