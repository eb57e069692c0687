// Up to kLpipsUnit pixels of a pair of images: sums over their channels, in either layout by the same formulas.
#pragma once

#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

// One number for each pixel of a tile.
template <class A>
struct alignas(64) PerPixel {
  A at[kLpipsUnit] = {};
  Vector<A> vector(int64_t pixel) const { return load(at + pixel); }
  void set(int64_t pixel, Vector<A> v) { store(at + pixel, v); }
};

// Lane i of the result is the sum of v[i]'s lanes, added as a tree.
template <class A>
Vector<A> sums_of(Vector<A>* v) {
  for (int left = kLanes<A>; left > 1; left /= 2) {
    for (int i = 0; i < left / 2; ++i) {
      const Halves<A> halves = deinterleave<A>(v[2 * i], v[2 * i + 1]);
      v[i] = halves.even + halves.odd;
    }
  }
  return v[0];
}

// N numbers a lane, to be added up.
template <class A, int N>
struct Terms {
  Vector<A> of[N];
};

template <class T, bool kLast>
struct LpipsTile {
  using A = Acc<T>;
  static constexpr int64_t kBlock = 16;  // channels that NCHW adds up before it adds to the sum: a tree of two levels

  const T *a, *b;   // the first pixel's
  const A* weight;  // of each channel
  int64_t channels, pixels, count;

  // sums[i] of each pixel = the sum over channels of term(a, b, weight, here).of[i]; here(PerPixel) is that pixel's.
  template <int N, class F>
  void add_up(PerPixel<A> (&sums)[N], F term) const {
    if constexpr (kLast) {
      for (int64_t first = 0; first < count; first += kLanes<A>) {
        Vector<A> rows[N][kLanes<A>] = {};
        for (int64_t i = 0; i < min(kLanes<A>, count - first); ++i) {
          const int64_t p = first + i, at = p * channels;
          Vector<A> total[N] = {};
          for_each_vector<A>(channels, [&](int64_t c, int64_t n) {
            const Terms<A, N> t = term(load(a + at + c, n), load(b + at + c, n), load(weight + c, n),
                                       [&](const PerPixel<A>& of) { return broadcast(of.at[p]); });
            for (int k = 0; k < N; ++k) total[k] += t.of[k];
          });
          for (int k = 0; k < N; ++k) rows[k][i] = total[k];
        }
        for (int k = 0; k < N; ++k) sums[k].set(first, sums_of<A>(rows[k]));
      }
    } else {
      for (int64_t block = 0; block < channels; block += kBlock) {
        const int64_t past = min(channels, block + kBlock);
        for (int64_t p = 0; p < count; p += kLanes<A>) {
          const int64_t n = count - p;
          Vector<A> total[N] = {};
          for (int64_t c = block; c < past; ++c) {
            const Terms<A, N> t = term(load(a + c * pixels + p, n), load(b + c * pixels + p, n), broadcast(weight[c]),
                                       [&](const PerPixel<A>& of) { return of.vector(p); });
            for (int k = 0; k < N; ++k) total[k] += t.of[k];
          }
          for (int k = 0; k < N; ++k) sums[k].set(p, sums[k].vector(p) + total[k]);
        }
      }
    }
  }

  // da, db = gradient(a, b, weight, here).of[0 .. 1] for each element; .of[2] is added to the channel's sum and what
  // rounding lost of it at sums[c] and sums[channels + c], unless that is null.
  template <class F>
  void write(T* da, T* db, A* sums, F gradient) const {
    if constexpr (kLast) {
      for (int64_t p = 0; p < count; ++p) {
        const int64_t at = p * channels;
        for_each_vector<A>(channels, [&](int64_t c, int64_t n) {
          const Terms<A, 3> t = gradient(load(a + at + c, n), load(b + at + c, n), load(weight + c, n),
                                         [&](const PerPixel<A>& of) { return broadcast(of.at[p]); });
          store(da + at + c, t.of[0], n);
          store(db + at + c, t.of[1], n);
          if (sums != nullptr) add_exactly<A>(sums + c, sums + channels + c, t.of[2], n);
        });
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = c * pixels;
        Vector<A> total{};
        for_each_vector<A>(count, [&](int64_t p, int64_t n) {
          const Terms<A, 3> t = gradient(load(a + at + p, n), load(b + at + p, n), broadcast(weight[c]),
                                         [&](const PerPixel<A>& of) { return of.vector(p); });
          store(da + at + p, t.of[0], n);
          store(db + at + p, t.of[1], n);
          total += t.of[2];
        });
        if (sums != nullptr) sums[c] += sum<A>(total);
      }
    }
  }

  // squares[0 .. 1]: |a|^2 and |b|^2; scales[0 .. 1]: 1 / (|a| + eps), or 0 where |a| is 0.
  void measure(PerPixel<A> (&squares)[2], PerPixel<A> (&scales)[2]) const {
    add_up(squares, [](Vector<A> a, Vector<A> b, Vector<A>, auto) { return Terms<A, 2>{{a * a, b * b}}; });
    for (int k = 0; k < 2; ++k) {
      for (int64_t p = 0; p < kLpipsUnit; p += kLanes<A>) {
        const Vector<A> square = squares[k].vector(p);
        const Vector<A> scale = A{1} / (sqrt(square) + static_cast<A>(kLpipsEpsilon));
        scales[k].set(p, square == 0 ? Vector<A>{} : scale);
      }
    }
  }
};

// Calls f(item, tile, pair, unit) for each unit of items [begin, end).
template <class T, bool kLast, class F>
void for_each_tile(const LpipsParams& p, const Cut& cut, int64_t begin, int64_t end, F f) {
  const int64_t image = p.channels * p.pixels;
  cut.for_each(begin, end, [&](int64_t item, int64_t pair, int64_t first, int64_t past) {
    for (int64_t unit = first; unit < past; ++unit) {
      const int64_t pixel = unit * kLpipsUnit;
      const T* const a = static_cast<const T*>(p.x) + pair * image + pixel * (kLast ? p.channels : 1);
      f(item,
        LpipsTile<T, kLast>{a, a + p.pairs * image, static_cast<const Acc<T>*>(p.weight), p.channels, p.pixels,
                            min(kLpipsUnit, p.pixels - pixel)},
        pair, unit);
    }
  });
}

inline Cut lpips_cut(const LpipsParams& p) { return Cut(p.pairs, lpips_units(p), 2 * kLpipsUnit * p.channels); }

}  // namespace
}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
