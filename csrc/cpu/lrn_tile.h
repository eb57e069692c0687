// Local response normalization of a run of pixels with all their channels, either layout, forward and backward.
// Shared by lrn_{fwd,bwd}.cpp, on tensors, and epilogue_{fwd,bwd}.cpp, on what they hold in cache.
//
//   t_c  = k + alpha / size * sum of x_j^2, j = c - size/2 ... c + (size-1)/2
//   y_c  = x_c t_c^-beta
//   dx_c = dy_c t_c^-beta - (2 alpha beta / size) x_c * sum of q_j, j = c - (size-1)/2 ... c + size/2
//   q_j  = dy_j x_j t_j^(-beta-1)
//
// with every window cut off at the ends of c's group. A window is summed term by term, in order: a running sum that
// adds one end and subtracts the other would carry NaN, infinity and rounding errors beyond the windows that hold them.
#pragma once

#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

template <class A>
struct Lrn {
  enum class Exponent { three_quarters, half, one, other };

  int64_t channels, group;  // channels in all, and in one group
  int64_t before, after;    // the window is c - before ... c + after: never longer than a group can fill
  A k, scale, beta, gradient_scale;
  Exponent exponent;

  Lrn(const LrnWindow& window, int64_t channels)
      : channels(channels),
        group(channels / window.groups),
        before(min(window.size / 2, group - 1)),
        after(min((window.size - 1) / 2, group - 1)),
        k(static_cast<A>(window.k)),
        scale(static_cast<A>(window.alpha / window.size)),
        beta(static_cast<A>(window.beta)),
        gradient_scale(static_cast<A>(2 * window.alpha * window.beta / window.size)),
        exponent(window.beta == 0.75  ? Exponent::three_quarters
                 : window.beta == 0.5 ? Exponent::half
                 : window.beta == 1.0 ? Exponent::one
                                      : Exponent::other) {}

  int64_t taps() const { return before + after + 1; }

  // The channels of c's group within a distance of c.
  int64_t first(int64_t c, int64_t distance) const { return max(c / group * group, c - distance); }
  int64_t last(int64_t c, int64_t distance) const { return min((c / group + 1) * group - 1, c + distance); }

  Vector<A> t(Vector<A> sum_of_squares) const { return k + scale * sum_of_squares; }

  // t^beta. To divide by it is more exact than to multiply by t^-beta, and as fast.
  Vector<A> denominator(Vector<A> t) const {
    switch (exponent) {
      case Exponent::three_quarters:
        return sqrt(t) * sqrt(sqrt(t));
      case Exponent::half:
        return sqrt(t);
      case Exponent::one:
        return t;
      default:
        return power(t, beta);
    }
  }
};

// The loops over a window are unrolled for AlexNet's five channels (kTaps = 5) and count otherwise (kTaps = 0).
template <int kTaps, class T>
inline Vector<Acc<T>> sum_of_squares(const T* window, int64_t stride, int64_t taps, int64_t n) {
  Vector<Acc<T>> sum{};
  for (int64_t j = 0; j < (kTaps ? kTaps : taps); ++j) {
    const Vector<Acc<T>> v = load(window + j * stride, n);
    sum += v * v;
  }
  return sum;
}

// What backward does with dx on its way out. kMasked: dx is zero where x, which a ReLU gave, is not positive. With
// beta = 0, y is x, and the sum may hold 0 / 0.
template <bool kMasked, class A>
inline Vector<A> gradient(const Lrn<A>& lrn, Vector<A> g, Vector<A> x, Vector<A> sum) {
  const Vector<A> dx = lrn.beta == 0 ? g : g - lrn.gradient_scale * x * sum;
  if constexpr (kMasked) {
    return x <= 0 ? Vector<A>{} : dx;
  } else {
    return dx;
  }
}

// ---- NCHW: a pixel's channels lie `stride` elements apart
// --------------------------------------------------------------
//
// Channel after channel, a row of pixels at a time, so that the rows of a window are read from memory once and from
// cache thereafter. Rows are far apart, which hides them from hardware prefetchers: while one row is worked on, the
// next one is asked for.

template <int kTaps, class T>
void lrn_fwd_row(const Lrn<Acc<T>>& lrn, int64_t pixels, const T* window, int64_t stride, int64_t taps, const T* x,
                 T* y, const T* next_x, const T* next_y) {
  for_each_vector<Acc<T>>(pixels, [&](int64_t p, int64_t n) {
    __builtin_prefetch(next_x + p);
    __builtin_prefetch(next_y + p, 1);
    const Vector<Acc<T>> t = lrn.t(sum_of_squares<kTaps>(window + p, stride, taps, n));
    store(y + p, load(x + p, n) / lrn.denominator(t), n);
  });
}

// Calls prepare(c) before channel c of x is first read.
template <class T, class Prepare>
void lrn_fwd_nchw(const Lrn<Acc<T>>& lrn, int64_t pixels, const T* x, int64_t x_stride, T* y, int64_t y_stride,
                  Prepare prepare) {
  int64_t ready = 0;
  for (int64_t c = 0; c < lrn.channels; ++c) {
    const int64_t first = lrn.first(c, lrn.before), last = lrn.last(c, lrn.after), taps = last - first + 1;
    for (; ready <= last; ++ready) prepare(ready);
    const auto row = taps == 5 ? lrn_fwd_row<5, T> : lrn_fwd_row<0, T>;
    row(lrn, pixels, x + first * x_stride, x_stride, taps, x + c * x_stride, y + c * y_stride,
        x + min(last + 1, lrn.channels - 1) * x_stride, y + min(c + 1, lrn.channels - 1) * y_stride);
  }
}

// g = dy t^-beta and q of one channel.
template <int kTaps, class T>
void lrn_bwd_terms(const Lrn<Acc<T>>& lrn, int64_t pixels, const T* window, int64_t stride, int64_t taps, const T* x,
                   const T* dy, Acc<T>* g, Acc<T>* q, const T* next_x, const T* next_dy) {
  for_each_vector<Acc<T>>(pixels, [&](int64_t p, int64_t n) {
    __builtin_prefetch(next_x + p);
    __builtin_prefetch(next_dy + p);
    const Vector<Acc<T>> t = lrn.t(sum_of_squares<kTaps>(window + p, stride, taps, n));
    const Vector<Acc<T>> quotient = load(dy + p, n) / lrn.denominator(t);
    store(g + p, quotient);
    store(q + p, quotient * load(x + p, n) / t);
  });
}

// dx of one channel, and its sum.
template <int kTaps, bool kMasked, class T>
Acc<T> lrn_bwd_row(const Lrn<Acc<T>>& lrn, int64_t pixels, const T* x, const Acc<T>* g, const Acc<T>* const* q,
                   int64_t taps, T* dx, const T* next_dx) {
  Vector<Acc<T>> total{};
  for_each_vector<Acc<T>>(pixels, [&](int64_t p, int64_t n) {
    __builtin_prefetch(next_dx + p, 1);
    Vector<Acc<T>> sum{};
    for (int64_t j = 0; j < (kTaps ? kTaps : taps); ++j) sum += load(q[j] + p);
    const Vector<Acc<T>> v = gradient<kMasked>(lrn, load(g + p), load(x + p, n), sum);
    if constexpr (kMasked) total += v;  // lanes past n hold x = 0, so v = 0
    store(dx + p, v, n);
  });
  return sum<Acc<T>>(total);
}

// `g` and `q` are rings of lrn.taps() rows `width` apart, and `window` has room for as many pointers.
template <bool kMasked, class T>
void lrn_bwd_nchw(const Lrn<Acc<T>>& lrn, int64_t pixels, const T* x, T* dx, int64_t x_stride, const T* dy,
                  int64_t dy_stride, Acc<T>* db, Acc<T>* g, Acc<T>* q, int64_t width, const Acc<T>** window) {
  const int64_t end = lrn.channels - 1;
  int64_t ready = 0;
  for (int64_t c = 0; c <= end; ++c) {
    const int64_t first = lrn.first(c, lrn.after), last = lrn.last(c, lrn.before), taps = last - first + 1;
    for (; ready <= last; ++ready) {
      const int64_t from = lrn.first(ready, lrn.before), to = lrn.last(ready, lrn.after);
      const int64_t slot = ready % lrn.taps() * width;
      const auto terms = to - from + 1 == 5 ? lrn_bwd_terms<5, T> : lrn_bwd_terms<0, T>;
      terms(lrn, pixels, x + from * x_stride, x_stride, to - from + 1, x + ready * x_stride, dy + ready * dy_stride,
            g + slot, q + slot, x + min(to + 1, end) * x_stride, dy + min(ready + 1, end) * dy_stride);
    }
    for (int64_t j = first; j <= last; ++j) window[j - first] = q + j % lrn.taps() * width;
    const auto row = taps == 5 ? lrn_bwd_row<5, kMasked, T> : lrn_bwd_row<0, kMasked, T>;
    const Acc<T> total = row(lrn, pixels, x + c * x_stride, g + c % lrn.taps() * width, window, taps, dx + c * x_stride,
                             dx + min(c + 1, end) * x_stride);
    if (db != nullptr) db[c] += total;
  }
}

// ---- NHWC: the channels of a pixel's group are neighbours, a row of `group` elements
// --------------------------------------
//
// A block of rows has its squares (and q) written to L1 between zeros, where windows are then summed by unaligned loads
// at any place of a row. Blocks, as a load that overlaps two stores just made waits for them.

constexpr int64_t kBlockElements = 1024;

// Elements between two rows of a block: a row begins after the longer side of a window, and the last vector of a row
// may reach kLanes - 1 beyond it, and its window beyond that.
template <class A>
int64_t padded_row(const Lrn<A>& lrn) {
  return round_up(lrn.before + lrn.group + lrn.after, kLanes<A>) + kLanes<A>;
}
template <class A>
int64_t block_rows(const Lrn<A>& lrn) {
  return max(1, kBlockElements / padded_row(lrn));
}

template <int kTaps, class A>
inline Vector<A> sum_of_neighbours(const A* window, int64_t taps) {
  Vector<A> sum{};
  for (int64_t j = 0; j < (kTaps ? kTaps : taps); ++j) sum += load(window + j);
  return sum;
}

template <class T>
void square_rows(const Lrn<Acc<T>>& lrn, int64_t rows, const T* x, Acc<T>* squares) {
  for (int64_t row = 0; row < rows; ++row, x += lrn.group, squares += padded_row(lrn)) {
    for_each_vector<Acc<T>>(lrn.group, [&](int64_t c, int64_t n) {
      const Vector<Acc<T>> v = load(x + c, n);
      store(squares + lrn.before + c, v * v);
    });
  }
}

// `squares`: block_rows() padded rows of zeros.
template <int kTaps, class T>
void lrn_fwd_nhwc(const Lrn<Acc<T>>& lrn, int64_t rows, const T* x, T* y, Acc<T>* squares) {
  const int64_t block = block_rows(lrn);
  for (; rows > 0; rows -= block, x += block * lrn.group, y += block * lrn.group) {
    square_rows(lrn, min(block, rows), x, squares);
    for (int64_t row = 0; row < min(block, rows); ++row) {
      const Acc<T>* const window = squares + row * padded_row(lrn);
      for_each_vector<Acc<T>>(lrn.group, [&](int64_t c, int64_t n) {
        const int64_t i = row * lrn.group + c;
        __builtin_prefetch(x + i + block * lrn.group);
        __builtin_prefetch(y + i + block * lrn.group, 1);
        const Vector<Acc<T>> t = lrn.t(sum_of_neighbours<kTaps>(window + c, lrn.taps()));
        store(y + i, load(x + i, n) / lrn.denominator(t), n);
      });
    }
  }
}

// `squares` and `q`: block_rows() padded rows of zeros each; `g`: as many rows of any content.
template <bool kMasked, int kTaps, class T>
void lrn_bwd_nhwc(const Lrn<Acc<T>>& lrn, int64_t rows, const T* x, T* dx, const T* dy, Acc<T>* db, Acc<T>* g,
                  Acc<T>* q, Acc<T>* squares) {
  using A = Acc<T>;
  const int64_t block = block_rows(lrn), padded = padded_row(lrn), groups = lrn.channels / lrn.group;
  for (int64_t start = 0; start < rows; start += block) {
    const int64_t past = min(rows, start + block);
    square_rows(lrn, past - start, x + start * lrn.group, squares);
    for (int64_t row = start; row < past; ++row) {
      const int64_t slot = (row - start) * padded;
      for_each_vector<A>(lrn.group, [&](int64_t c, int64_t n) {
        const int64_t i = row * lrn.group + c;
        __builtin_prefetch(x + i + block * lrn.group);
        __builtin_prefetch(dx + i, 1);
        const Vector<A> t = lrn.t(sum_of_neighbours<kTaps>(squares + slot + c, lrn.taps()));
        const Vector<A> quotient = load(dy + i, n) / lrn.denominator(t);
        store(g + slot + c, quotient);
        store(q + slot + lrn.after + c, quotient * load(x + i, n) / t, n);  // n: zeros beyond stay
      });
    }
    for (int64_t row = start; row < past; ++row) {
      const int64_t slot = (row - start) * padded;
      A* const row_db = db + (db != nullptr ? row % groups * lrn.group : 0);
      for_each_vector<A>(lrn.group, [&](int64_t c, int64_t n) {
        const int64_t i = row * lrn.group + c;
        __builtin_prefetch(dy + i + block * lrn.group);
        const Vector<A> sum = sum_of_neighbours<kTaps>(q + slot + c, lrn.taps());
        const Vector<A> v = gradient<kMasked>(lrn, load(g + slot + c), load(x + i, n), sum);
        store(dx + i, v, n);
        if (kMasked && db != nullptr) add_exactly<A>(row_db + c, row_db + lrn.channels + c, v, n);
      });
    }
  }
}

// ---- Either layout, with the scratch memory it takes
// ---------------------------------------------------------------------

// The widest run of pixels whose rows, `rows` of them, stay in cache.
inline int64_t tile_pixels(int64_t pixels, int64_t elements, int64_t rows) {
  const int64_t limit = max(64, elements / rows);
  return min(pixels, round_up(ceil_div(pixels, ceil_div(pixels, limit)), 16));
}

template <class T>
class LrnForward {
 public:
  LrnForward(const LrnWindow& window, int64_t channels, bool channels_last)
      : lrn_(window, channels),
        channels_last_(channels_last),
        scratch_(channels_last ? block_rows(lrn_) * padded_row(lrn_) : 0) {
    scratch_.fill(0);
  }

  // y from x, both of `pixels` pixels; strides as NCHW has them.
  void operator()(int64_t pixels, const T* x, int64_t x_stride, T* y, int64_t y_stride) const {
    (*this)(pixels, x, x_stride, y, y_stride, [](int64_t, int64_t, int64_t) {});
  }

  // In NCHW, calls prepare(c, first pixel, pixels) before that part of channel c of x is first read.
  template <class Prepare>
  void operator()(int64_t pixels, const T* x, int64_t x_stride, T* y, int64_t y_stride, Prepare prepare) const {
    if (channels_last_) {
      const auto run = lrn_.taps() == 5 ? lrn_fwd_nhwc<5, T> : lrn_fwd_nhwc<0, T>;
      return run(lrn_, pixels * (lrn_.channels / lrn_.group), x, y, scratch_.get());
    }
    const int64_t tile = tile_pixels(pixels, kTileElements, lrn_.taps());
    for (int64_t p = 0; p < pixels; p += tile) {
      const int64_t n = min(tile, pixels - p);
      lrn_fwd_nchw(lrn_, n, x + p, x_stride, y + p, y_stride, [&](int64_t c) { prepare(c, p, n); });
    }
  }

 private:
  static constexpr int64_t kTileElements = 20480;  // of x, for one window

  Lrn<Acc<T>> lrn_;
  bool channels_last_;
  Scratch<Acc<T>> scratch_;
};

template <class T, bool kMasked>
class LrnBackward {
  using A = Acc<T>;

 public:
  // `pixels`: the most that a call will have.
  LrnBackward(const LrnWindow& window, int64_t channels, bool channels_last, int64_t pixels)
      : lrn_(window, channels),
        channels_last_(channels_last),
        rows_(channels_last ? block_rows(lrn_) : lrn_.taps()),
        width_(channels_last ? padded_row(lrn_) : round_up(tile_pixels(pixels, kTileElements, rows_), kLanes<A>)),
        scratch_(3 * rows_ * width_),
        window_(lrn_.taps()) {
    scratch_.fill(0);
  }

  // dx from x and dy, all of `pixels` pixels; strides as NCHW has them. db, unless null, is added to,
  // and db + channels to what rounding loses (NHWC).
  void operator()(int64_t pixels, const T* x, T* dx, int64_t x_stride, const T* dy, int64_t dy_stride, A* db) const {
    A* const g = scratch_.get();
    A* const q = g + rows_ * width_;
    if (channels_last_) {
      const auto run = lrn_.taps() == 5 ? lrn_bwd_nhwc<kMasked, 5, T> : lrn_bwd_nhwc<kMasked, 0, T>;
      return run(lrn_, pixels * (lrn_.channels / lrn_.group), x, dx, dy, db, g, q, q + rows_ * width_);
    }
    const int64_t tile = min(width_, tile_pixels(pixels, kTileElements, rows_));
    for (int64_t p = 0; p < pixels; p += tile) {
      lrn_bwd_nchw<kMasked>(lrn_, min(tile, pixels - p), x + p, dx + p, x_stride, dy + p, dy_stride, db, g, q, width_,
                            window_.get());
    }
  }

 private:
  static constexpr int64_t kTileElements = 5120;  // of x, of g and of q, for one window

  Lrn<A> lrn_;
  bool channels_last_;
  int64_t rows_, width_;
  Scratch<A> scratch_;
  Scratch<const A*> window_;
};

}  // namespace
}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
