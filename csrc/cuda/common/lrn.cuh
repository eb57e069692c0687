// What the kernels with local response normalization share: t^-beta, and windows of channels.
//
// Window sums hold what is in the window and nothing else. A running sum that subtracts what leaves the window keeps
// rounding errors, and a NaN forever. AlexNet's windows of five share parts of their sums instead (FiveSums).
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

// AlexNet's: windows of five, beta 3/4. Kernels that take this one hold no code for others.
struct LrnOfFive : Lrn {
  static constexpr int32_t before = 2, after = 2;
  static constexpr Power power = Power::three_quarters;
  static constexpr bool normal = true;

  using Lrn::Lrn;
  static bool is(const LrnWindow& window) {
    const Lrn lrn(window);
    return window.size == 5 && lrn.power == power && lrn.normal;
  }
};

// Calls body(Lrn or LrnOfFive): kernels are for all windows, or with kFive for AlexNet's as well, or alone.
template <bool kFive, bool kOthers = true, class Body>
int with_lrn(const LrnWindow& window, Body&& body) {
  if constexpr (!kOthers) {
    return body(LrnOfFive(window));
  } else {
    if constexpr (kFive) {
      if (LrnOfFive::is(window)) {
        return body(LrnOfFive(window));
      }
    }
    return body(Lrn(window));
  }
}

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
// 1 - t^(n beta) w^n and 1 / n the weight; at t = 0 and infinity it is NaN, and w is infinity or 0, which any number in
// its place leaves alone: a minimum takes the other one.
__device__ __forceinline__ float refined(float w, float error, float weight) {
  return fmaf(w, weight * fminf(error, 1.0f), w);
}

// w = t^-beta. With r = t^-1/2: t^-3/4 = r sqrt(r). Other powers are 2^(-beta log2 t), whose error grows with the
// exponent: 2 ulp at t = 1, 4 at t = 1000.
//
// Backward wants 1 / t as well, which is r r. Forward r needs no step of its own on the way to t^-3/4: the one on w
// takes an error of 3 ulp to the same place as one of 1.
template <class T, bool kReciprocal = true, int N, class L>
__device__ __forceinline__ void inverse_power(const float (&t)[N], const L& lrn, float (&w)[N],
                                              float (&reciprocal)[N]) {
  constexpr bool kExact = sizeof(T) == 4;
  const bool root_alone = kReciprocal || lrn.power != Power::three_quarters;
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
    if (kExact && root_alone) {
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

template <class T, int N, class L>
__device__ __forceinline__ void inverse_power(const float (&t)[N], const L& lrn, float (&w)[N]) {
  float unused[N];
  inverse_power<T, false>(t, lrn, w, unused);
}

// The same of AlexNet's, backward: w = t^-3/4 and 1 / t, in 11 instructions for float32 instead of 14. 1 / t is r r
// with a step of its own, and w needs r no more exact than forward. At t = infinity r is 0, which a finite number in
// place of t leaves alone. In 9, s (r + 3/4 r (1 - t r r) + (r - s s) / 2) with s = sqrt(r) is as near on average, but
// not 1 at 1.
template <class T, int N>
__device__ __forceinline__ void inverse_powers(const float (&t)[N], const LrnOfFive& lrn, float (&w)[N],
                                               float (&reciprocal)[N]) {
  if constexpr (sizeof(T) != 4) {
    inverse_power<T>(t, lrn, w, reciprocal);
  } else {
    constexpr float kLargest = 0x1.fffffep127f;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float r = approximate_reciprocal_root(t[i]), finite = fminf(t[i], kLargest);
      const float root = r * approximate_root(r), p = finite * root;  // t^1/4
      w[i] = fmaf(0.25f * root, fmaf(-(p * p) * p, root, 1.0f), root);
      const float square = r * r;
      reciprocal[i] = fmaf(square, fmaf(-finite, square, 1.0f), square);
    }
  }
}

// ---------------------------------------------------------------- windows

// Sums of five neighbours: sum[i] = f(values[i]) + ... + f(values[i + 4]), with f(v) = first(v), and plus(v, sum) one
// more of them. Values are cut into blocks of five; a window is the rest of one block and the beginning of the next
// (van Herk, 1992). For N = 8 that is 18 additions, where each window by itself takes 32.
template <int N, class First, class Plus>
__device__ __forceinline__ void sums_of_five(const float (&values)[N + 4], float (&sum)[N], const First& first,
                                             const Plus& plus) {
  float rest[N + 4], beginning[N + 4];  // of the block that a value is in: from it on, and up to it
#pragma unroll
  for (int i = N + 3; i >= 0; --i) {
    rest[i] = i % 5 == 4 || i == N + 3 ? first(values[i]) : plus(values[i], rest[i + 1]);
  }
#pragma unroll
  for (int i = 0; i < N + 4; ++i) {
    beginning[i] = i % 5 == 0 ? first(values[i]) : plus(values[i], beginning[i - 1]);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    sum[i] = i % 5 == 0 ? rest[i] : rest[i] + beginning[i + 4];
  }
}

// sum[i] = values[i + Halo - before] + ... + values[i + Halo + after]: values[Halo] stands at sum[0]'s own channel.
template <int Halo, int N>
__device__ __forceinline__ void window_sums(const float (&values)[N + 2 * Halo], int before, int after,
                                            float (&sum)[N]) {
  if constexpr (Halo == 2) {
    if (before + after == 4) {
      sums_of_five<N>(values, sum, [](float v) { return v; }, [](float v, float sum) { return v + sum; });
      return;
    }
  }
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
template <int Halo, int N, class L>
__device__ __forceinline__ void scales(const float (&x)[N + 2 * Halo], const L& lrn, float (&t)[N]) {
  const bool fives = Halo == 2 && lrn.before + lrn.after == 4;  // the same for every thread
  if constexpr (Halo == 2) {
    if (fives) {
      sums_of_five<N>(x, t, [](float v) { return v * v; }, [](float v, float sum) { return fmaf(v, v, sum); });
    }
  }
  if (!fives) {
    float squares[N + 2 * Halo];
#pragma unroll
    for (int i = 0; i < N + 2 * Halo; ++i) {
      squares[i] = x[i] * x[i];
    }
    window_sums<Halo>(squares, lrn.before, lrn.after, t);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    t[i] = fmaf(lrn.scale, t[i], lrn.k);
  }
}

// Sums of five neighbours along a row that a thread walks through, or of their squares, two at a time. Two windows
// share a sum of four, and two of those a sum of two: 16 instructions for 8 sums, of squares 20, where sums_of_five
// takes 18 and 22.
template <bool kSquares>
struct FivesByTwos {
  float seconds[2];  // of the last two pairs
  float two, four;   // the sum of the last one, and of both

  __device__ __forceinline__ void begin(const float (&first)[4]) {
    two = of_two(first[2], first[3]);
    four = of_two(first[0], first[1]) + two;
    seconds[0] = first[1];
    seconds[1] = first[3];
  }

  // The next N, an even number: sum[i] is about the one that is two before next[i].
  template <int N>
  __device__ __forceinline__ void step(const float (&next)[N], float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const float next_two = of_two(next[i], next[i + 1]);
      sum[i] = plus(next[i], four);
      four = two + next_two;
      sum[i + 1] = plus(seconds[0], four);
      two = next_two;
      seconds[0] = seconds[1];
      seconds[1] = next[i + 1];
    }
  }

 private:
  static __device__ __forceinline__ float of_two(float a, float b) { return kSquares ? fmaf(a, a, b * b) : a + b; }
  static __device__ __forceinline__ float plus(float v, float sum) { return kSquares ? fmaf(v, v, sum) : v + sum; }
};

// Sums of squares, and the values that they are about.
struct WalkOfFives : private FivesByTwos<true> {
  float last;  // the first of the last pair

  __device__ __forceinline__ void begin(const float (&first)[4]) {
    FivesByTwos::begin(first);
    last = first[2];
  }

  // The next N values; `middle[i]` is the one that sum[i] is about, two before next[i].
  template <int N>
  __device__ __forceinline__ void step(const float (&next)[N], float (&middle)[N], float (&sum)[N]) {
    middle[0] = last;
    middle[1] = seconds[1];
#pragma unroll
    for (int i = 2; i < N; ++i) {
      middle[i] = next[i - 2];
    }
    last = next[N - 2];
    FivesByTwos::step(next, sum);
  }
};

// V channels of a pixel and Halo channels on either side, in NHWC. The sides are read in pieces that never cross a
// group's end, because it is a multiple of V away; what lies beyond that end is zero.
template <class Source, class T, int V, int Halo>
struct Neighbourhood {
  static constexpr int kPiece = Halo < V ? Halo : V;
  static constexpr int kPieces = Halo / kPiece;
  // What a source has to know of a piece's channels stays in registers, where it is one piece of a few channels.
  static constexpr bool kKept = kPieces == 1 && Halo == 2;
  template <int N>
  using Local = typename Source::template Local<N>;
  struct Nothing {};

  Source source;
  int32_t channel, before, after;  // channels of the group on either side
  Local<V> own;
  std::conditional_t<kKept, Local<kPiece>, Nothing> left, right;

  __device__ __forceinline__ Neighbourhood(const Source& source, int32_t channel, int32_t group_channels)
      : source(source),
        channel(channel),
        before(channel < group_channels ? channel : channel % group_channels),
        after(group_channels - before - V),
        own(source.template local<V>(channel)) {
    if constexpr (kKept) {  // where there is no such piece, another's, which nobody asks for
      left = source.template local<kPiece>(Halo <= before ? channel - Halo : channel);
      right = source.template local<kPiece>(0 < after ? channel + V : channel);
    }
  }

  // The piece that begins `distance` channels from the own ones, which are at an offset or a place.
  template <class At>
  __device__ __forceinline__ Pack<T, kPiece> beside(At at, int32_t distance) const {
    if (distance < 0 ? -distance > before : distance - V >= after) {
      return {};
    }
    if constexpr (kKept) {
      return (distance < 0 ? left : right).at(at + distance);
    } else {
      return source.template local<kPiece>(channel + distance).at(at + distance);
    }
  }

  struct Values {
    Pack<T, V> own;
    Pack<T, kPiece> left[kPieces], right[kPieces];

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

  // Of the pixel whose `channel` is at that offset or place.
  template <class At>
  __device__ __forceinline__ Values load(At at) const {
    Values values;
    values.own = own.at(at);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      values.left[i] = beside(at, i * kPiece - Halo);
      values.right[i] = beside(at, V + i * kPiece);
    }
    return values;
  }
};

}  // namespace alexnet_fast::cuda
