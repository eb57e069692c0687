// Local response normalization backward over NCHW planes in shared memory, for common/lrn_bwd.cuh, which has the
// formula and the launch.
#pragma once

#include "cuda/common/lrn_planes.cuh"
#include "cuda/common/sums.cuh"

namespace alexnet_fast::cuda {

template <class T>
constexpr int kLongestTiledChunk = 128 / sizeof(T);

// In shared memory: rows of x, channels begin - 2 Halo and on, and of dy from begin - Halo on, which dx takes the place
// of.
template <class T, class L>
struct BackwardTiles : PlaneTiles {
  static constexpr int32_t kHalo = kTiledHalo<L>;
  int32_t channels, dy_at, bytes_of_both;

  BackwardTiles(const LrnShape& shape, int64_t groups)
      : PlaneTiles(shape, groups, sizeof(T), kLongestTiledChunk<T>,
                   [](int64_t chunk) { return 2 * chunk + 6 * kHalo; }),
        channels(static_cast<int32_t>(shape.channels)),
        dy_at(bytes(chunk + 4 * kHalo, sizeof(T))),
        bytes_of_both(dy_at + bytes(chunk + 2 * kHalo, sizeof(T))) {}

  dim3 block() const { return dim3(std::min(ceil_div(width, 32) * 32, kPlaneThreads / kTiledPixels<L>)); }
};

// From x and dy in shared memory to dx, which takes the place of dy. A thread walks through one pixel.
template <int kLanes, class T>
__device__ __forceinline__ void lrn_bwd_of_tile(const PlaneTile& tile, const T* x_rows, T* dy_rows, T* dx,
                                                const Lrn& lrn) {
  constexpr int Halo = kTiledHalo<Lrn>, kStep = PlaneTiles::kStep;
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
  tile.template put<kLanes>(dx_rows, dx);
}

// The same for windows of five by threads that have two pixels each, kDistance apart: what each finds out about its
// place serves for twice as much, and one address for both pixels' x, dy and dx of a channel, which lie a fixed number
// of bytes apart. x_at and dy_at: where their rows begin in shared memory; dx takes the place of dy.
template <bool kRectified, class T>
__device__ __forceinline__ void lrn_bwd_of_tile_in_pairs(const PlaneTile& tile, int32_t x_at, int32_t dy_at, T* dx,
                                                         float* partial, int32_t channels, const LrnOfFive& lrn) {
  constexpr int Halo = kTiledHalo<LrnOfFive>, kStep = PlaneTiles::kStep, kPixels = kTiledPixels<LrnOfFive>;
  constexpr int kDistance = kPlaneThreads / kPixels, kWarps = kRectified ? kDistance / 32 : 1, kApart = 32 / kStep;
  constexpr int kEach = kLongestTiledChunk<T> * kApart;
  using Sums = float[kWarps][kEach];
  ALEXNET_FAST_SHARED(Sums, sums);  // of each channel over a warp's pixels, of every fourth lane
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t stride = tile.lie.stride * static_cast<int32_t>(sizeof(T));
  // Of channel c + 4 there is x when it is dy of c + 2 and dx of c that are due.
  const int32_t dy_beside = dy_at - x_at - 2 * Halo * stride, dx_beside = dy_beside - Halo * stride;
  const auto element_at = [](int32_t at, int p) -> T& {
    return reinterpret_cast<T*>(dynamic_shared() + at)[p * kDistance];
  };
  bool active[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    active[p] = static_cast<int32_t>(threadIdx.x) + p * kDistance < tile.width;
  }
  // Lanes beyond the last pixel go along: their warp's sums need them.
  if (kRectified ? warp * 32 < tile.width : active[0]) {
    // Before a step at channel c: x of channels c ... c + 3, a = dy t^-beta of c and c + 1, and both walks' sums.
    // Beyond the group's ends x and dy are 0, and so is q, unless a NaN within the group is in that window too: then it
    // is in those of all channels that q reaches back to.
    float values[kPixels][2 * Halo] = {}, a[kPixels][Halo] = {};
    WalkOfFives squares[kPixels];
    FivesByTwos<false> products[kPixels];
    uint32_t next = x_at + threadIdx.x * sizeof(T);
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (active[p]) {
        float x[4 * Halo], t[2 * Halo], w[2 * Halo], reciprocal[2 * Halo], q[2 * Halo], own[2 * Halo];
#pragma unroll
        for (int i = 0; i < 4 * Halo; ++i) {
          x[i] = to_float(element_at(next + i * stride, p));
        }
        scales<Halo>(x, lrn, t);
        inverse_power<T>(t, lrn, w, reciprocal);
#pragma unroll
        for (int i = 0; i < 2 * Halo; ++i) {
          own[i] = to_float(element_at(next + dy_at - x_at + i * stride, p)) * w[i];
          q[i] = own[i] * x[Halo + i] * reciprocal[i];
          values[p][i] = x[2 * Halo + i];
        }
#pragma unroll
        for (int i = 0; i < Halo; ++i) {
          a[p][i] = own[Halo + i];
        }
        squares[p].begin(values[p]);
        products[p].begin(q);
      }
    }
    next += kStep * stride;
    float* next_sum = &sums[kRectified ? warp : 0][lane];
#pragma unroll 1
    for (int32_t c = tile.begin; c < tile.end; c += kStep) {
      uint32_t at[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i, next += stride) {
        at[i] = anew(next);  // a compiler that sees where they come from has other addresses for dy and dx
      }
      float total[kStep] = {};
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (!active[p]) {
          continue;
        }
        float ahead[kStep], middle[kStep], t[kStep], w[kStep], reciprocal[kStep], q[kStep], own[Halo + kStep],
            sum[kStep];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          ahead[i] = to_float(element_at(at[i], p));
        }
        squares[p].step(ahead, middle, t);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          t[i] = fmaf(lrn.scale, t[i], lrn.k);
        }
        inverse_power<T>(t, lrn, w, reciprocal);
        own[0] = a[p][0];
        own[1] = a[p][1];
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          own[Halo + i] = to_float(element_at(at[i] + dy_beside, p)) * w[i];
          q[i] = own[Halo + i] * middle[i] * reciprocal[i];
        }
        products[p].step(q, sum);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float x = i < 2 * Halo ? values[p][i] : ahead[i - 2 * Halo];
          sum[i] = fmaf(-lrn.slope * x, sum[i], own[i]);
          if (kRectified && x <= 0) {
            sum[i] = 0;
          }
          from_float(sum[i], element_at(at[i] + dx_beside, p));
          total[i] += sum[i];
        }
#pragma unroll
        for (int i = 0; i < 2 * Halo; ++i) {
          values[p][i] = ahead[kStep - 2 * Halo + i];
        }
#pragma unroll
        for (int i = 0; i < Halo; ++i) {
          a[p][i] = own[kStep + i];
        }
      }
      if (kRectified && partial != nullptr) {
        *next_sum = sum_lanes<kStep, 32, kApart>(total);
        next_sum += kStep * kApart;
      }
    }
  }
  __syncthreads();
  tile.template put<kRowLanes<T>>(reinterpret_cast<T*>(dynamic_shared() + dy_at) + Halo * tile.lie.stride, dx);
  if (kRectified && partial != nullptr) {
    for (int32_t i = threadIdx.x; i < tile.channels(); i += blockDim.x) {
      float total = 0;
      for (int32_t of = 0; of < kWarps && of * 32 < tile.width; ++of) {
#pragma unroll
        for (int j = 0; j < kApart; ++j) {
          total += sums[of][kApart * i + j];
        }
      }
      partial[int64_t{tile.item} * channels + tile.first_channel + tile.begin + i] = total;
    }
  }
}

template <class T, class L, bool kRectified>
__global__ void __launch_bounds__(kPlaneThreads / kTiledPixels<L>, kTiledBlocks<L>)
    lrn_bwd_planes(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, float* __restrict__ partial,
                   BackwardTiles<T, L> tiles, L lrn) {
  constexpr int Halo = kTiledHalo<L>;
  const PlaneTile tile(tiles);
  const int32_t channels = ceil_div(tile.channels(), PlaneTiles::kStep) * PlaneTiles::kStep;
  T* const x_rows = place_run(dynamic_shared(), x + tile.offset(tile.begin - 2 * Halo));
  T* const dy_rows = place_run(dynamic_shared() + tiles.dy_at, dy + tile.offset(tile.begin - Halo));
  tile.template fetch<kFetchLanes<T>, 2>(x_rows, x, tile.begin - 2 * Halo, channels + 4 * Halo);
  tile.template fetch<kFetchLanes<T>, 2>(dy_rows, dy, tile.begin - Halo, channels + 2 * Halo);
  await_runs();
  if constexpr (kTiledPixels<L> == 2) {
    const auto at = [](const T* rows) {
      return static_cast<int32_t>(reinterpret_cast<const unsigned char*>(rows) - dynamic_shared());
    };
    lrn_bwd_of_tile_in_pairs<kRectified>(tile, at(x_rows), at(dy_rows), dx, partial, tiles.channels, lrn);
  } else {
    lrn_bwd_of_tile<kRowLanes<T>>(tile, x_rows, dy_rows, dx, lrn);
  }
}

}  // namespace alexnet_fast::cuda
