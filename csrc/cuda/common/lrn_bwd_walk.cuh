// LRN backward with AlexNet's window, through the channels of planes in shared memory, for common/lrn_bwd_planes.cuh
// and, behind the pool, common/lrn_pool_bwd_planes.cuh. A block has the rows of x of a chunk of channels, and what the
// gradient is made of. Its threads share the chunk out by slices of channels. Within its own a thread has four pixels,
// and walks through the channels two at a time, with the last few in registers.
//
// A pixel's dx of channel c takes the place of x of channel c + 4, which that thread has just read. x of the four
// channels before a slice and behind it is for the slices on either side as well: those before are read by all threads
// before anything is written, and dx of the slice behind begins where the last of those behind ends.
#pragma once

#include "cuda/common/lrn_planes.cuh"
#include "cuda/common/sums.cuh"

namespace alexnet_fast::cuda {

constexpr int kSlicePixels = 4;  // of a thread
constexpr int kSumLanes = 8;     // these many lanes have the same slice, and add up

// At channel c: x of channels c and on, q of channels c - 2 and on, a = dy t^-beta of channels c and on. Rows of x are
// read from channel c + 4 on, those of the gradient from c + 2. `apart.x` are the elements from one row of x to the
// next. gradient.at(n, values) is that of all pixels at channel n of the next ones, gradient.go_on(n) goes on by n, and
// of pixel p there is none where x is gradient.none_up_to(p) or less: 0, for the ReLU.
template <class T, class Apart, class Gradient, bool kRectified>
struct SliceWalk {
  static constexpr int N = 2, kPixels = kSlicePixels;  // N channels at once

  const LrnOfFive& lrn;
  const Apart apart;
  Gradient gradient;
  T* x[kPixels];  // of a pixel that is not there one of the thread's before it
  float values[kPixels][2 * N], a[kPixels][N];
  FivesByTwos<true> squares[kPixels];
  FivesByTwos<false> products[kPixels];

  __device__ __forceinline__ SliceWalk(const LrnOfFive& lrn, const Apart& apart, const Gradient& gradient)
      : lrn(lrn), apart(apart), gradient(gradient) {}

  // Reads what comes before the first channel for which dx is wanted: four of x, and two steps.
  __device__ __forceinline__ void begin() {
    float q[kPixels][2 * N];
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
#pragma unroll
      for (int i = 0; i < 2 * N; ++i) {
        values[p][i] = to_float(x[p][i * apart.x]);
      }
      squares[p].begin(values[p]);
      x[p] += 2 * N * apart.x;
    }
#pragma unroll
    for (int i = 0; i < 2 * N; i += N) {
      const Products of = step();
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          q[p][i + n] = of.q[p][n];
          a[p][n] = of.a[p][n];
        }
      }
      go_on();
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      products[p].begin(q[p]);
    }
  }

  // dx of the next channels, and of each its sum over the pixels.
  template <int kChannels>
  __device__ __forceinline__ void next(float (&sums)[kChannels]) {
#pragma unroll
    for (int i = 0; i < kChannels; i += N) {
      float own[kPixels][N], dx[kPixels][N];
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
          own[p][n] = values[p][n];
        }
      }
      const Products of = step();
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        float sum[N];
        products[p].step(of.q[p], sum);
#pragma unroll
        for (int n = 0; n < N; ++n) {
          dx[p][n] = fmaf(-lrn.slope * own[p][n], sum[n], a[p][n]);
          if (kRectified && own[p][n] <= gradient.none_up_to(p)) {
            dx[p][n] = 0;
          }
          a[p][n] = of.a[p][n];
          sums[i + n] = p == 0 ? dx[p][n] : sums[i + n] + dx[p][n];
        }
      }
      // What a pixel that is not there leaves is overwritten by the one before whose place it has.
#pragma unroll
      for (int p = kPixels - 1; p >= 0; --p) {
        const Pack<T, N> rounded = pack<T>(dx[p]);  // both by one instruction
#pragma unroll
        for (int n = 0; n < N; ++n) {
          store_shared(x[p] + n * apart.x, one_of(rounded, n));
        }
      }
      go_on();
    }
  }

 private:
  struct Products {
    float a[kPixels][N], q[kPixels][N];
  };

  __device__ __forceinline__ void go_on() {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      x[p] += N * apart.x;
    }
    gradient.go_on(N);
  }

  // a and q of channels c + 2 and on. Beyond the group's ends x and dy are 0, and so is q, unless a NaN within the
  // group is in that window too: then it is in those of all channels that q reaches back to.
  __device__ __forceinline__ Products step() {
    Products of;
    float next[kPixels][N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float dy[kPixels];
      gradient.at(n, dy);
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        of.a[p][n] = dy[p];
        next[p][n] = to_float(x[p][n * apart.x]);
      }
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      float t[N], w[N], reciprocal[N];
      squares[p].step(next[p], t);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        t[n] = fmaf(lrn.scale, t[n], lrn.k);
      }
      inverse_powers<T>(t, lrn, w, reciprocal);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        of.a[p][n] *= w[n];
        of.q[p][n] = of.a[p][n] * values[p][N + n] * reciprocal[n];
        values[p][n] = values[p][N + n];
        values[p][N + n] = next[p][n];
      }
    }
    return of;
  }
};

// Where a thread adds up dx, of which `row` channels lie in a row of shared memory: a row for each kSumLanes lanes of a
// slice. What its kSummed sums over lanes become is in some of them.
template <int kSummed>
struct SliceSums {
  static constexpr int kEach = kSumLanes / kSummed;  // lanes that have the same sum
  float* at;
  bool has;

  __device__ __forceinline__ SliceSums(float* sums, int32_t row, int32_t lane, int32_t before, bool wanted)
      : at(sums + lane / kSumLanes * row + before + lane % kSumLanes / kEach), has(wanted && lane % kEach == 0) {}

  __device__ __forceinline__ void add(const float (&totals)[kSummed]) {
    float given[kSummed];
#pragma unroll
    for (int i = 0; i < kSummed; ++i) {
      given[i] = totals[i];
    }
    const float total = sum_lanes<kSummed, kSumLanes>(given);
    if (has) {
      *at = total;
    }
    at += kSummed;
  }
};

// A tile's row of `partial`, from `groups` rows of such sums.
__device__ __forceinline__ void store_slice_sums(const PlaneTile& tile, const float* sums, int32_t row, int32_t groups,
                                                 int32_t channels, float* partial) {
  for (int32_t i = threadIdx.x; i < tile.channels(); i += blockDim.x) {
    float total = 0;
    for (int32_t group = 0; group < groups; ++group) {
      total += sums[group * row + i];
    }
    partial[int64_t{tile.item} * channels + tile.first_channel + tile.begin + i] = total;
  }
}

}  // namespace alexnet_fast::cuda
