// Max-pooling of rows of one plane (NCHW) or one image (NHWC), forward and backward.
// Shared by max_pool_{fwd,bwd}.cpp, on tensors, and epilogue_{fwd,bwd}.cpp, on what they hold in cache.
//
// Forward follows PyTorch to the letter: the window's first element leads, and in row order each next one takes the
// lead if it is greater or NaN. So the first of equal maxima wins, and the last NaN. The code is kernel_w * row +
// column of the winner in the window as it was before the borders cut it.
//
// Backward gathers: an input sums, window after window in row order, dy of those that hold it and whose code names it.
#pragma once

#include <type_traits>

#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

// Where a window along one axis lies: `first` may be negative; [begin, end) is what the border leaves of it.
struct Span {
  int64_t first, begin, end;
};
inline Span input_span(int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t extent) {
  const int64_t first = out * stride - pad;
  return {first, max(0, first), min(extent, first + kernel)};
}
inline bool same_cut(const Span& a, const Span& b) {
  return a.begin - a.first == b.begin - b.first && a.end - a.first == b.end - b.first;
}
// Along one axis, the outputs [begin, end) whose windows hold an input, for one input after another. `place` is where
// the input lies in the (uncut) window of output 0, and is `stride` less in each next one.
struct Holders {
  int64_t kernel, stride, out_extent, place, begin, end;

  Holders(int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t out_extent)
      : kernel(kernel),
        stride(stride),
        out_extent(out_extent),
        place(in + pad),
        begin(place < kernel ? 0 : (place - kernel) / stride + 1),
        end(min(out_extent, place / stride + 1)) {}

  void next() {
    ++place;
    if (begin * stride + kernel <= place) ++begin;
    if (end < out_extent && end * stride <= place) ++end;
  }
};

// ---- Forward
// -----------------------------------------------------------------------------------------------------------

template <bool kCodes, class A>
inline void challenge(Vector<A>& best, Ints<A>& code, Vector<A> value, Ints<A> value_code) {
  const Ints<A> wins = (value > best) | (value != value);
  best = wins ? value : best;
  if constexpr (kCodes) code = wins ? value_code : code;
}

// What T would hold of z + bias, which is what the ReLU and pooling see.
template <class T, bool kRelu>
inline Vector<Acc<T>> biased(Vector<Acc<T>> z, Vector<Acc<T>> bias) {
  if constexpr (kRelu) {
    return rounded<T>(z + bias);
  } else {
    return z;
  }
}

// Writes a vector of outputs, and of codes. Pooling first and the ReLU after it is the same as the reverse, since the
// ReLU ties only what is not positive, and of that the code says no more than kClosed.
template <bool kRelu, bool kCodes, class T>
inline void store_pooled(T* y, uint8_t* codes, Vector<Acc<T>> best, Ints<Acc<T>> code, int64_t n) {
  using A = Acc<T>;
  if constexpr (kRelu) {
    const Ints<A> closed = best <= 0;
    best = closed ? Vector<A>{} : best;
    code = closed ? Ints<A>{} + kClosed : code;
  }
  store(y, best, n);
  if constexpr (kCodes) store_codes<A>(codes, code, n);
}

// NCHW. Each input row is reduced to the winners over the columns of its windows once, and kept for the
// kernel_h / stride_h output rows that share it; an output row reduces those. First columns, then rows, each in order
// and by the same rule, gives what a scan in row order gives.
//
// Rows are read where they lie if they are accumulators already and the border cuts no window (and stride_w is 1 or 2);
// otherwise from a copy with -inf around it. Several rows go through each step before the next: a load that overlaps
// two stores just made waits for them.
constexpr int64_t kRowsAtOnce = 8;
constexpr int64_t kPrefetchAhead = 512;  // elements

// The winners over the columns of all windows along a row, with their columns. Vectors run along the output row: for
// stride 1 the columns of neighbouring windows are neighbours, for stride 2 they are the even or the odd elements of
// two vectors, else they are picked one by one. kKernel, kStride: where the compiler knows them, else 0.
template <int kKernel, int kStride, bool kCodes, class A>
void reduce_columns(const Window& window, const A* row, int64_t width, int64_t out_width, const Int<A>* first_column,
                    A* to_best, Int<A>* to_column) {
  const int64_t kernel = kKernel ? kKernel : window.kernel_w, stride = kStride ? kStride : window.stride_w;
  // kLanes windows from i on, where read(at) gives the elements from `at` on.
  const auto step = [&](int64_t i, auto read) {
    Vector<A> best{};
    Ints<A> column = load_ints<A>(first_column + i);
    const auto enter = [&](int64_t kc, Vector<A> value) {
      if (kc == 0) {
        best = value;
      } else if (kc < kernel) {
        challenge<kCodes, A>(best, column, value, Ints<A>{} + static_cast<Int<A>>(kc));
      }
    };
    if (stride == 1) {
      for (int64_t kc = 0; kc < kernel; ++kc) enter(kc, read(i + kc));
    } else if (stride == 2) {
      for (int64_t kc = 0; kc < kernel; kc += 2) {
        const Halves<A> halves = deinterleave<A>(read(2 * i + kc), read(2 * i + kc + kLanes<A>));
        enter(kc, halves.even);
        enter(kc + 1, halves.odd);
      }
    } else {
      for (int64_t kc = 0; kc < kernel; ++kc) {
        A value[kLanes<A>];
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) value[lane] = row[min((i + lane) * stride + kc, width - 1)];
        enter(kc, load(value));
      }
    }
    store(to_best + i, best);
    if constexpr (kCodes) store_ints<A>(to_column + i, column);
  };
  int64_t i = 0;
  for (; i < out_width && (i + kLanes<A>)*stride + kernel <= width; i += kLanes<A>) {
    step(i, [&](int64_t at) { return load(row + at); });
  }
  for (; i < out_width; i += kLanes<A>) {
    step(i, [&](int64_t at) { return load(row + min(at, width), max(0, width - at)); });
  }
}

template <class T, bool kRelu>
class PoolForwardNchw {
  using A = Acc<T>;

 public:
  PoolForwardNchw(const Window& window, int64_t, int64_t height, int64_t width, int64_t out_width)
      : window_(window),
        height_(height),
        width_(width),
        out_width_(out_width),
        line_(max((out_width - 1) * window.stride_w + window.kernel_w, window.pad_w + width) + kLanes<A>),
        copied_(kRelu || sizeof(T) < sizeof(A) || window.pad_w > 0 || window.stride_w > 2 || line_ > width + kLanes<A>),
        group_(max(1, kRowsAtOnce / window.stride_h)),
        ring_(power_of_two((group_ - 1) * window.stride_h + window.kernel_h)),
        row_(round_up(out_width, kLanes<A>)),
        lines_(copied_ ? ring_ * line_ : 0),
        best_(ring_ * row_),
        column_(ring_ * row_),
        first_column_(row_) {
    for (int64_t i = 0; i < row_; ++i) {
      first_column_.get()[i] = static_cast<Int<A>>(max(0, window.pad_w - i * window.stride_w));
    }
    lines_.fill(-static_cast<A>(__builtin_inf()));
  }

  // Output rows [first, past) to y and, unless null, codes. x holds input rows from x_first on. bias: one element, or
  // null.
  void operator()(const T* x, int64_t x_first, int64_t first, int64_t past, T* y, uint8_t* codes, const T* bias) const {
    if (codes == nullptr) {
      run<false>(x - x_first * width_, first, past, y, codes, bias);
    } else {
      run<true>(x - x_first * width_, first, past, y, codes, bias);
    }
  }

 private:
  // An input row's winners over columns, and the code of its column 0.
  struct Row {
    const A* best;
    const Int<A>* column;
    int code;
  };

  Span input_rows(int64_t out) const {
    return input_span(out, window_.kernel_h, window_.stride_h, window_.pad_h, height_);
  }
  int64_t slot(int64_t row) const { return row & (ring_ - 1); }

  template <bool kCodes>
  void run(const T* x, int64_t first, int64_t past, T* y, uint8_t* codes, const T* bias) const {
    const Vector<A> b = broadcast<A>(bias != nullptr ? load(bias, 1)[0] : -A{});
    const bool overlapping = window_.kernel_w == 3 && window_.stride_w == 2;
    const auto reduce = overlapping ? reduce_columns<3, 2, kCodes, A> : reduce_columns<0, 0, kCodes, A>;
    Row rows[256];
    int64_t ready = 0;
    for (int64_t group = first; group < past; group += group_) {
      const int64_t group_past = min(past, group + group_);
      const int64_t begin = max(ready, input_rows(group).begin), end = input_rows(group_past - 1).end;
      prefetch(x + begin * width_ + kPrefetchAhead, (end - begin) * width_);
      if (copied_) {
        for (int64_t row = begin; row < end; ++row) copy_row(x + row * width_, b, slot(row));
      }
      for (int64_t row = begin; row < end; ++row) {
        reduce(window_, row_at(x, row), copied_ ? line_ : width_, out_width_, first_column_.get(),
               best_.get() + slot(row) * row_, column_.get() + slot(row) * row_);
      }
      ready = end;
      for (int64_t out = group; out < group_past; ++out) {
        const Span span = input_rows(out);
        int count = 0;
        for (int64_t row = span.begin; row < span.end; ++row) {
          rows[count++] = {best_.get() + slot(row) * row_, column_.get() + slot(row) * row_,
                           static_cast<int>((row - span.first) * window_.kernel_w)};
        }
        const int64_t at = (out - first) * out_width_;
        if (count == 3) {
          reduce_rows<3, kCodes>(rows, count, y + at, codes + at);
        } else {
          reduce_rows<0, kCodes>(rows, count, y + at, codes + at);
        }
      }
    }
  }

  void copy_row(const T* x, Vector<A> bias, int64_t slot) const {
    A* const line = lines_.get() + slot * line_;
    for_each_vector<A>(width_, [&](int64_t i, int64_t n) {
      store(line + window_.pad_w + i, biased<T, kRelu>(load(x + i, n), bias), n);
    });
  }

  const A* row_at(const T* x, int64_t row) const {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!copied_) return x + row * width_;
    }
    return lines_.get() + slot(row) * line_;
  }

  template <int kRows, bool kCodes>
  void reduce_rows(const Row* rows, int count, T* y, uint8_t* codes) const {
    for_each_vector<A>(out_width_, [&](int64_t i, int64_t n) {
      Vector<A> best = load(rows[0].best + i);
      Ints<A> code{};
      if constexpr (kCodes) code = load_ints<A>(rows[0].column + i) + rows[0].code;
      for (int r = 1; r < (kRows ? kRows : count); ++r) {
        challenge<kCodes, A>(best, code, load(rows[r].best + i), load_ints<A>(rows[r].column + i) + rows[r].code);
      }
      store_pooled<kRelu, kCodes>(y + i, codes + i, best, code, n);
    });
  }

  Window window_;
  int64_t height_, width_, out_width_;
  int64_t line_;          // elements of a copied row, padding included
  bool copied_;           // whether rows are copied
  int64_t group_, ring_;  // output rows made at once, and the slots for the input rows that they need
  int64_t row_;           // elements of a row of winners
  Scratch<A> lines_, best_;
  Scratch<Int<A>> column_, first_column_;
};

template <int kBytes>
using Unsigned = std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>;
constexpr uint16_t bits_of_negative_infinity(BFloat16) { return 0xff80; }
constexpr uint16_t bits_of_negative_infinity(Half) { return 0xfc00; }
constexpr uint32_t bits_of_negative_infinity(float) { return 0xff800000; }
constexpr uint64_t bits_of_negative_infinity(double) { return 0xfff0000000000000; }

// NHWC. A window's elements are pixels, each a vector of channels.
template <class T, bool kRelu>
class PoolForwardNhwc {
  using A = Acc<T>;

 public:
  PoolForwardNhwc(const Window& window, int64_t channels, int64_t height, int64_t width, int64_t out_width)
      : window_(window), channels_(channels), height_(height), width_(width), out_width_(out_width) {}

  // Output rows [first, past) to y and, unless null, codes. x holds input rows from x_first on. bias: per channel, or
  // null.
  void operator()(const T* x, int64_t x_first, int64_t first, int64_t past, T* y, uint8_t* codes, const T* bias) const {
    const auto go = codes != nullptr           ? run<true, false>
                    : kRelu && bias == nullptr ? run<false, true>
                                               : run<false, false>;
    go(*this, x - x_first * width_ * channels_, first, past, y, codes, bias);
  }

 private:
  // An element of a window: how far it lies from the window's (uncut) corner, and its code.
  struct Tap {
    int64_t offset;
    int code;
  };

  template <bool kCodes, bool kByBits>
  static void run(const PoolForwardNhwc& self, const T* x, int64_t first, int64_t past, T* y, uint8_t* codes,
                  const T* bias) {
    const Window& w = self.window_;
    Tap taps[256];
    int count = 0;
    Span cut_rows{}, cut_columns{};  // what `taps` were made for, counted from the corner; at first nothing
    for (int64_t out_row = first; out_row < past; ++out_row) {
      const Span rows = input_span(out_row, w.kernel_h, w.stride_h, w.pad_h, self.height_);
      for (int64_t out_column = 0; out_column < self.out_width_; ++out_column) {
        const Span columns = input_span(out_column, w.kernel_w, w.stride_w, w.pad_w, self.width_);
        if (!same_cut(rows, cut_rows) || !same_cut(columns, cut_columns)) {
          cut_rows = rows;
          cut_columns = columns;
          count = 0;
          for (int64_t r = rows.begin - rows.first; r < rows.end - rows.first; ++r) {
            for (int64_t c = columns.begin - columns.first; c < columns.end - columns.first; ++c) {
              taps[count++] = {(r * self.width_ + c) * self.channels_, static_cast<int>(r * w.kernel_w + c)};
            }
          }
        }
        const T* const corner = x + (rows.first * self.width_ + columns.first) * self.channels_;
        const int64_t at = ((out_row - first) * self.out_width_ + out_column) * self.channels_;
        for (int64_t r = w.kernel_h; r < w.kernel_h + min(w.stride_h, w.kernel_h); ++r) {
          prefetch(corner + r * self.width_ * self.channels_, min(w.stride_w, w.kernel_w) * self.channels_);
        }
        if constexpr (kByBits) {
          (count == 9 ? pixel_by_bits<9> : pixel_by_bits<0>)(corner, taps, count, self.channels_, y + at);
        } else {
          (count == 9 ? pixel<9, kCodes> : pixel<0, kCodes>)(corner, taps, count, self.channels_, bias, y + at,
                                                             codes + at);
        }
      }
    }
  }

  // The maximum of elements and 0, without unpacking them: as signed integers, positive floats and NaNs lie in their
  // own order above 0 and what has the sign below. As unsigned ones, the NaNs with the sign lie above all.
  template <int kCount>
  static void pixel_by_bits(const T* corner, const Tap* taps, int count, int64_t channels, T* y) {
    using Pattern = Unsigned<sizeof(T)>;
    typedef Pattern Patterns __attribute__((vector_size(kVectorBytes)));
    typedef std::make_signed_t<Pattern> Signed __attribute__((vector_size(kVectorBytes)));
    constexpr int kPatterns = kVectorBytes / static_cast<int>(sizeof(T));
    const Pattern negative_infinity = bits_of_negative_infinity(T{});
    for (int64_t c = 0; c < channels; c += kPatterns) {
      const int64_t n = min(kPatterns, channels - c);
      Signed best{};
      Patterns top{};
      for (int i = 0; i < (kCount ? kCount : count); ++i) {
        Patterns v{};
        const T* const from = corner + taps[i].offset + c;
        if (n == kPatterns) {
          std::memcpy(&v, from, sizeof(v));
        } else {
          copy_few<kPatterns / 2>(reinterpret_cast<T*>(&v), from, n);
        }
        const Signed s = reinterpret_cast<Signed>(v);
        best = s > best ? s : best;
        top = v > top ? v : top;
      }
      const Patterns result = top > negative_infinity ? top : reinterpret_cast<Patterns>(best);
      if (n == kPatterns) {
        std::memcpy(y + c, &result, sizeof(result));
      } else {
        copy_few<kPatterns / 2>(y + c, reinterpret_cast<const T*>(&result), n);
      }
    }
  }

  template <int kCount, bool kCodes>
  static void pixel(const T* corner, const Tap* taps, int count, int64_t channels, const T* bias, T* y,
                    uint8_t* codes) {
    for_each_vector<A>(channels, [&](int64_t c, int64_t n) {
      Vector<A> b = broadcast<A>(-A{});
      if (kRelu && bias != nullptr) b = load(bias + c, n);
      Vector<A> best = biased<T, kRelu>(load(corner + taps[0].offset + c, n), b);
      Ints<A> code = Ints<A>{} + taps[0].code;
      for (int i = 1; i < (kCount ? kCount : count); ++i) {
        challenge<kCodes, A>(best, code, biased<T, kRelu>(load(corner + taps[i].offset + c, n), b),
                             Ints<A>{} + taps[i].code);
      }
      store_pooled<kRelu, kCodes>(y + c, codes + c, best, code, n);
    });
  }

  Window window_;
  int64_t channels_, height_, width_, out_width_;
};

// ---- Backward
// ------------------------------------------------------------------------------------------------------------

// A row of outputs as NCHW backward reads it, and the code by which its windows name their column 0 in the input row at
// hand.
template <class A>
struct GradientRow {
  const A* dy;
  const Int<A>* codes;
  int name;
};

// What the inputs at columns i * stride + phase get, for kLanes of i. Those lie in windows that are neighbours.
template <int kKernel, int kStride, class A>
inline Vector<A> gather(const Window& window, const GradientRow<A>* rows, int count, int64_t i, int64_t phase) {
  const int64_t kernel = kKernel ? kKernel : window.kernel_w, stride = kStride ? kStride : window.stride_w;
  Vector<A> sum{};
  for (int r = 0; r < count; ++r) {
    const A* dy = rows[r].dy + i;
    const Int<A>* codes = rows[r].codes + i;
    for (int64_t kc = phase; kc < kernel; kc += stride, --dy, --codes) {
      const Ints<A> named = load_ints<A>(codes) == rows[r].name + static_cast<Int<A>>(kc);
      sum += named ? load(dy) : Vector<A>{};
    }
  }
  return sum;
}

// A row of `width` inputs; returns its sum by lane. kKernel, kStride: along the row, where the compiler knows them,
// else 0.
template <int kKernel, int kStride, class A>
Vector<A> gather_row(const Window& window, const GradientRow<A>* rows, int count, A* to, int64_t width) {
  const int64_t kernel = kKernel ? kKernel : window.kernel_w, stride = kStride ? kStride : window.stride_w;
  Vector<A> total{};
  for (int64_t i = 0; i * stride < width; i += kLanes<A>) {
    const int64_t at = i * stride;
    if (stride == 1) {
      const Vector<A> v = gather<kKernel, kStride>(window, rows, count, i, 0);
      total += v;
      store(to + at, v, width - at);
    } else if (stride == 2) {
      const Vector<A> even = gather<kKernel, kStride>(window, rows, count, i, 0);
      const Vector<A> odd = gather<kKernel, kStride>(window, rows, count, i, 1);
      total += even + odd;
      const Pair<A> pair = interleave<A>(even, odd);
      store(to + at, pair.first, width - at);
      if (at + kLanes<A> < width) store(to + at + kLanes<A>, pair.second, width - at - kLanes<A>);
    } else {
      for (int64_t phase = 0; phase < min(stride, kernel); ++phase) {
        const Vector<A> v = gather<kKernel, kStride>(window, rows, count, i, phase);
        total += v;
        for (int64_t lane = 0; lane < kLanes<A> && at + lane * stride + phase < width; ++lane) {
          to[at + lane * stride + phase] = v[lane];
        }
      }
    }
  }
  return total;
}

// NCHW. Rows of dy and of codes are first copied, for several input rows at once, with zeros where windows would begin
// before the border. dx is made in place if it is of accumulators and without padding (and stride_w is 1 or 2), else in
// a line.
template <class T>
class PoolBackwardNchw {
  using A = Acc<T>;

 public:
  PoolBackwardNchw(const Window& window, int64_t, int64_t width, int64_t out_height, int64_t out_width)
      : window_(window),
        width_(width),
        out_height_(out_height),
        out_width_(out_width),
        copied_(sizeof(T) < sizeof(A) || window.pad_w > 0 || window.stride_w > 2),
        left_((window.kernel_w - 1) / window.stride_w),
        row_(left_ + max(ceil_div(width + window.pad_w, window.stride_w), out_width) + kLanes<A>),
        ring_(power_of_two((kRowsAtOnce + window.kernel_h - 2) / window.stride_h + 2)),
        line_(window.pad_w + width),
        dy_(ring_ * row_),
        codes_(ring_ * row_) {
    line_.fill(0);
    dy_.fill(0);
    codes_.fill(0);
  }

  // Input rows [first, past) of dx, the first of them at dx, from the plane's dy and codes.
  // db: one element to which the sum of dx is added, or null.
  void operator()(const T* dy, const uint8_t* codes, int64_t first, int64_t past, T* dx, A* db) const {
    const Window& w = window_;
    const auto gather = w.kernel_w == 3 && w.stride_w == 2 ? gather_row<3, 2, A> : gather_row<0, 0, A>;
    GradientRow<A> rows[256];
    Vector<A> total{};
    Holders holders(first, w.kernel_h, w.stride_h, w.pad_h, out_height_);
    int64_t ready = holders.begin;
    for (int64_t in = first; in < past; ++in, holders.next(), dx += width_) {
      if ((in - first) % kRowsAtOnce == 0) {
        const int64_t last = min(past, in + kRowsAtOnce) - 1;
        if (db != nullptr) *db += sum<A>(total);
        total = Vector<A>{};  // one accumulator of a large plane would lose digits
        for (; ready < out_height_ && ready * w.stride_h <= last + w.pad_h; ++ready) {
          copy_row(dy + ready * out_width_, codes + ready * out_width_, slot(ready));
        }
      }
      int count = 0;
      for (int64_t row = holders.begin; row < holders.end; ++row) {
        rows[count++] = {dy_.get() + slot(row), codes_.get() + slot(row),
                         static_cast<int>((holders.place - row * w.stride_h) * w.kernel_w)};
      }
      if constexpr (sizeof(T) == sizeof(A)) {
        if (!copied_) {
          total += gather(w, rows, count, dx, width_);
          continue;
        }
      }
      total += gather(w, rows, count, line_.get(), width_ + w.pad_w);
      for_each_vector<A>(width_, [&](int64_t i, int64_t n) { store(dx + i, load(line_.get() + w.pad_w + i, n), n); });
    }
    if (db != nullptr) *db += sum<A>(total);
  }

 private:
  // Where the row's first output is, after the zeros.
  int64_t slot(int64_t row) const { return (row & (ring_ - 1)) * row_ + left_; }

  void copy_row(const T* dy, const uint8_t* codes, int64_t at) const {
    prefetch(dy + kPrefetchAhead, out_width_);
    prefetch(codes + kPrefetchAhead, out_width_);
    for_each_vector<A>(out_width_, [&](int64_t i, int64_t n) {
      store(dy_.get() + at + i, load(dy + i, n));
      store_ints<A>(codes_.get() + at + i, load_codes<A>(codes + i, n));
    });
  }

  Window window_;
  int64_t width_, out_height_, out_width_;
  bool copied_;         // whether dx is made in a line first
  int64_t left_;        // zeros before a copied row
  int64_t row_, ring_;  // elements of a copied row, and slots for those that kRowsAtOnce input rows can lie in
  Scratch<A> line_, dy_;
  Scratch<Int<A>> codes_;
};

template <class T>
class PoolBackwardNhwc {
  using A = Acc<T>;

 public:
  PoolBackwardNhwc(const Window& window, int64_t channels, int64_t width, int64_t out_height, int64_t out_width)
      : window_(window), channels_(channels), width_(width), out_height_(out_height), out_width_(out_width) {}

  // As PoolBackwardNchw, for an image; db: a sum per channel, then what rounding lost of each, or null.
  void operator()(const T* dy, const uint8_t* codes, int64_t first, int64_t past, T* dx, A* db) const {
    const Window& w = window_;
    Candidate candidates[256];
    Holders rows(first, w.kernel_h, w.stride_h, w.pad_h, out_height_);
    for (int64_t in_row = first; in_row < past; ++in_row, rows.next()) {
      Holders columns(0, w.kernel_w, w.stride_w, w.pad_w, out_width_);
      for (int64_t in_column = 0; in_column < width_; ++in_column, columns.next(), dx += channels_) {
        int count = 0;
        for (int64_t r = rows.begin; r < rows.end; ++r) {
          for (int64_t c = columns.begin; c < columns.end; ++c) {
            const int64_t at = (r * out_width_ + c) * channels_;
            candidates[count++] = {
                codes + at, dy + at,
                static_cast<int>((rows.place - r * w.stride_h) * w.kernel_w + columns.place - c * w.stride_w)};
          }
        }
        const int64_t next = (rows.end * out_width_ + columns.end - 1) * channels_;
        prefetch(dy + next, channels_);
        prefetch(codes + next, channels_);
        for_each_vector<A>(channels_, [&](int64_t c, int64_t n) {
          Vector<A> sum{};
          for (int j = 0; j < count; ++j) {
            const Ints<A> named = load_codes<A>(candidates[j].codes + c, n) == candidates[j].name;
            sum += named ? load(candidates[j].dy + c, n) : Vector<A>{};
          }
          store(dx + c, sum, n);
          if (db != nullptr) add_exactly<A>(db + c, db + channels_ + c, sum, n);
        });
      }
    }
  }

 private:
  // A window that holds the input at hand, and the code by which it would name it.
  struct Candidate {
    const uint8_t* codes;
    const T* dy;
    int name;
  };

  Window window_;
  int64_t channels_, width_, out_height_, out_width_;
};

}  // namespace
}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
