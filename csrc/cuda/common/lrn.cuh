// What the kernels with local response normalization share: t^-beta, and windows of channels.
//
// Window sums are added up afresh for every channel. A running sum that subtracts what leaves the window is cheaper by
// three additions at size 5, but keeps rounding errors, and a NaN forever.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

constexpr int kLrnMaxSize = 16;

enum class Power : int32_t { half, three_quarters, one, other };

struct Lrn {
  int32_t before, after;  // the window of channel c is c - before ... c + after
  float scale;            // alpha / size
  float k, beta;
  float slope;  // 2 alpha beta / size
  Power power;
  bool normal;  // t cannot be subnormal

  explicit Lrn(const LrnWindow& window)
      : before(window.size / 2),
        after((window.size - 1) / 2),
        // With beta = 0, y is x whatever t is; t = 1 keeps 0 / 0 out of the gradient.
        scale(window.beta == 0 ? 0 : static_cast<float>(window.alpha / window.size)),
        k(window.beta == 0 ? 1 : static_cast<float>(window.k)),
        beta(static_cast<float>(window.beta)),
        slope(static_cast<float>(2 * window.alpha * window.beta / window.size)),
        power(window.beta == 0.75  ? Power::three_quarters
              : window.beta == 0.5 ? Power::half
              : window.beta == 1.0 ? Power::one
                                   : Power::other),
        normal(window.k > 1e-30 && window.alpha >= 0) {}
};

// Calls body(Halo{}): how many neighbours a kernel reads on either side, 2 or 8. Refuses windows that no kernel takes.
// In NHWC with channels that make no vectors there are kernels for 8 alone.
constexpr int kWidestHalo = 8;

template <class Body>
int with_halo(const LrnWindow& window, Body&& body) {
  if (window.size < 1 || window.size > kLrnMaxSize) {
    return cudaErrorInvalidValue;
  }
  return window.size <= 5 ? body(std::integral_constant<int, 2>{}) : body(std::integral_constant<int, kWidestHalo>{});
}

// ---------------------------------------------------------------- t^-beta

// One Newton step on w = t^-beta removes the error of the fast instructions, 2 ulp, for float32 results. `error` is
// 1 - t^(n beta) w^n and 1 / n the weight; at t = 0 and infinity it is NaN, and w right as it stands.
__device__ __forceinline__ float refined(float w, float error, float weight) {
  return error == error ? fmaf(w, weight * error, w) : w;
}

// w = t^-beta. With r = t^-1/2: t^-3/4 = r sqrt(r). Other powers are 2^(-beta log2 t), whose error grows with the
// exponent: 2 ulp at t = 1, 4 at t = 1000.
//
// Backward wants 1 / t as well, which is r r.
template <class T, int N>
__device__ __forceinline__ void inverse_power(const float (&t)[N], const Lrn& lrn, float (&w)[N],
                                              float (&reciprocal)[N]) {
  constexpr bool kExact = sizeof(T) == 4;
  float r[N];
  if (lrn.normal) {  // these branches are the same for every thread
#pragma unroll
    for (int i = 0; i < N; ++i) {
      r[i] = approximate_reciprocal_root(t[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      r[i] = rsqrtf(t[i]);  // three instructions more
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if constexpr (kExact) {
      r[i] = refined(r[i], fmaf(-(t[i] * r[i]), r[i], 1.0f), 0.5f);
    }
    reciprocal[i] = r[i] * r[i];
  }
  switch (lrn.power) {
    case Power::three_quarters:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = r[i] * approximate_root(r[i]);
        if constexpr (kExact) {
          const float p = t[i] * w[i];  // t^1/4
          w[i] = refined(w[i], fmaf(-(p * p) * p, w[i], 1.0f), 0.25f);
        }
      }
      break;
    case Power::half:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = r[i];
      }
      break;
    case Power::one:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = reciprocal[i];
      }
      break;
    default:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        w[i] = exp2f(-lrn.beta * (kExact ? log2f(t[i]) : __log2f(t[i])));
      }
  }
}

template <class T, int N>
__device__ __forceinline__ void inverse_power(const float (&t)[N], const Lrn& lrn, float (&w)[N]) {
  float unused[N];
  inverse_power<T>(t, lrn, w, unused);
}

// ---------------------------------------------------------------- windows

// sum[i] = values[i + Halo - before] + ... + values[i + Halo + after]: values[Halo] stands at sum[0]'s own channel.
template <int Halo, int N>
__device__ __forceinline__ void window_sums(const float (&values)[N + 2 * Halo], int before, int after,
                                            float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum[i] = values[i + Halo];
  }
#pragma unroll
  for (int d = 1; d <= Halo; ++d) {
    if (d <= before) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] += values[i + Halo - d];
      }
    }
    if (d <= after) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] += values[i + Halo + d];
      }
    }
  }
}

// t = k + scale * (sum of squares over the window), for N channels in a row.
template <int Halo, int N>
__device__ __forceinline__ void scales(const float (&x)[N + 2 * Halo], const Lrn& lrn, float (&t)[N]) {
  float squares[N + 2 * Halo];
#pragma unroll
  for (int i = 0; i < N + 2 * Halo; ++i) {
    squares[i] = x[i] * x[i];
  }
  window_sums<Halo>(squares, lrn.before, lrn.after, t);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    t[i] = fmaf(lrn.scale, t[i], lrn.k);
  }
}

// V channels of one pixel and Halo channels on either side, in NHWC. The sides are read in pieces that never cross a
// group's end, because it is a multiple of V away; what lies beyond that end is zero.
template <class T, int V, int Halo>
struct Neighbourhood {
  static constexpr int kPiece = Halo < V ? Halo : V;
  static constexpr int kPieces = Halo / kPiece;
  Pack<T, V> own;
  Pack<T, kPiece> left[kPieces], right[kPieces];

  // `before` and `after`: channels of the group on either side.
  template <class Source>
  __device__ __forceinline__ void load(const Source& source, int64_t offset, int32_t channel, int32_t before,
                                       int32_t after) {
    own = source.template local<V>(channel).at(offset);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int32_t distance = Halo - i * kPiece;
      left[i] = Pack<T, kPiece>{};
      right[i] = Pack<T, kPiece>{};
      if (distance <= before) {
        left[i] = source.template local<kPiece>(channel - distance).at(offset - distance);
      }
      if (i * kPiece < after) {
        right[i] = source.template local<kPiece>(channel + V + i * kPiece).at(offset + V + i * kPiece);
      }
    }
  }

  __device__ __forceinline__ void unpack(float (&values)[Halo + V + Halo]) const {
#pragma unroll
    for (int i = 0; i < Halo; ++i) {
      values[i] = element(left[i / kPiece], i % kPiece);
      values[Halo + V + i] = element(right[i / kPiece], i % kPiece);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[Halo + i] = element(own, i);
    }
  }
};

}  // namespace alexnet_fast::cuda
