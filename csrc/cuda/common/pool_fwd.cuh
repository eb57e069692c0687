// Max-pooling over a Source: the kernels of max_pool_fwd.cu, and of epilogue_fwd.cu without LRN.
//
// A thread owns V channels of a strip: kRows output pixels below each other. Windows of 3 with stride 2 share a row
// with the window below: the strip reads each row of its input once, finds the best of each row's three, and then the
// best of three rows; that order of comparisons has the result of going through the window row by row. Columns are
// shared with the threads on either side, through L1.
//
// Elements of 16 bits, eight channels a thread, stay what they are: two of them are compared by one instruction. What
// that leaves undecided, the place of a NaN or the sign of a 0, is looked up window by window; it is rare.
#pragma once

#include "cuda/common/packed_max.cuh"
#include "cuda/common/planes.cuh"
#include "cuda/common/pool.cuh"
#include "cuda/common/source.cuh"
#include "cuda/common/units.cuh"

namespace alexnet_fast::cuda {

struct Strips {
  PoolShape shape;
  Divider out_width, count;  // strips in a column of output pixels
};

// The code of a window. With kClosing a maximum of 0 or less is kClosed.
template <bool kClosing>
__device__ __forceinline__ int32_t code_of(const Best& best) {
  return kClosing && best.value <= 0 ? kClosed : best.place;
}

// Writes V outputs and, if wanted, their codes.
template <bool kClosing, class T, int V>
__device__ __forceinline__ void store_best(const Best (&best)[V], int64_t offset, T* y, uint8_t* code) {
  float values[V];
  int32_t places[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[i] = best[i].value;
    places[i] = code_of<kClosing>(best[i]);
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

// The best of V channels, of a row of a window or of the window. Two values are in a word, and four places.
template <int V>
struct PackedBest {
  uint32_t values[V / 2], places[V / 4];
};

// As equal_pair, for channels 4 n ... 4 n + 3, a byte each.
template <int V>
__device__ __forceinline__ uint32_t equal_four(const uint32_t (&a)[V], const uint32_t (&b)[V], int n) {
  return even_bytes(equal_pair(a[2 * n], b[2 * n]), equal_pair(a[2 * n + 1], b[2 * n + 1]));
}

// Of words, which hold two elements of 16 bits, or a float that is no less than 0: those are integers in order, and a
// NaN of either sign is more than infinity.
template <class T>
constexpr int kInWord = 4 / sizeof(T);
template <class T>
constexpr uint32_t kEach = sizeof(T) == 2 ? 0x10001 : 1;
template <class T>
constexpr uint32_t kSigns = sizeof(T) == 2 ? 0x80008000 : 0x80000000;

template <class T, bool kRectified>
__device__ __forceinline__ uint32_t max_of_three(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (sizeof(T) == 4) {
    static_assert(kRectified);
    return max(max(a, b), c);
  } else {
    return kRectified ? max_of_rectified<T>(a, b, c) : max_pair<T>(max_pair<T>(a, b), c);
  }
}

template <class T>
__device__ __forceinline__ uint32_t max_of_two(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return max(a, b);
  } else {
    return max_pair<T>(a, b);
  }
}

// The bits of `yes` where a's and b's elements are equal, else those of `no`.
template <class T>
__device__ __forceinline__ uint32_t if_equal(uint32_t a, uint32_t b, uint32_t yes, uint32_t no) {
  if constexpr (sizeof(T) == 4) {
    return a == b ? yes : no;
  } else {
    return select_bits(equal_pair(a, b), yes, no);
  }
}

// Signs of elements that are never equal to anything, among other bits.
template <class T>
__device__ __forceinline__ uint32_t unequal(uint32_t word) {
  return sizeof(T) == 4 ? (word > 0x7f800000 ? kSigns<T> : 0) : ~equal_pair(word, word);
}

// The element `i` of a word to y, and its code.
template <bool kCodes, class T>
__device__ __forceinline__ void store_of_word(uint32_t value, uint32_t place, int i, T* y, uint8_t* code) {
  if constexpr (sizeof(T) == 4) {
    *y = __uint_as_float(value);
  } else {
    y->bits = static_cast<uint16_t>(value >> 16 * i);
  }
  if (kCodes) {
    *code = static_cast<uint8_t>(place >> 16 * i);
  }
}

// store_best for pairs. Returns 0 if they decide: not the place of a NaN, nor the sign of a 0 where `signs`, an OR
// of the window's elements or of more, has one.
template <bool kRectified, bool kCodes, bool kClosing, class T, int V>
__device__ __forceinline__ uint32_t store_packed(const PackedBest<V>& best, uint32_t signs, int64_t offset, T* y,
                                                 uint8_t* code) {
  Pack<T, V> values;
  Pack<uint8_t, V> codes;
  uint32_t undecided = 0;
#pragma unroll
  for (int n = 0; n < V / 2; ++n) {
    values.words[n] = best.values[n];
    if (!kRectified) {
      undecided |= zero_in(best.values[n]) & (signs | signs << 16 | signs >> 16);
    }
    if (kCodes) {
      undecided |= unequal_to_itself(best.values[n]);
    }
  }
  store(y + offset, values);
  if constexpr (kCodes) {
    constexpr uint32_t kZeros[V / 2] = {};
#pragma unroll
    for (int n = 0; n < V / 4; ++n) {
      codes.words[n] = best.places[n] | (kClosing ? equal_four(best.values, kZeros, n) : 0);  // all ones: kClosed
    }
    store(code + offset, codes);
  }
  return undecided;
}

// The largest of a window's nine, and its place: the nine are gone through backwards, so that of equals the first one's
// is left. Rows and columns beyond the image are the nearest one within, at its place.
template <class T, int V, bool kCodes>
__device__ __forceinline__ PackedBest<V> best_of_nine(const Pack<T, V> (&x)[3][3], const uint32_t (&row_place)[3],
                                                      const uint32_t (&column_place)[3]) {
  PackedBest<V> best;
#pragma unroll
  for (int n = 0; n < V / 2; ++n) {
    uint32_t rows[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      rows[i] = max_of_rectified<T>(x[i][0].words[n], x[i][1].words[n], x[i][2].words[n]);
    }
    best.values[n] = max_of_rectified<T>(rows[0], rows[1], rows[2]);
  }
  if constexpr (kCodes) {
#pragma unroll
    for (int n = 0; n < V / 4; ++n) {
      best.places[n] = row_place[2] + column_place[2];
#pragma unroll
      for (int k = 7; k >= 0; --k) {
        best.places[n] = select_bits(equal_four(x[k / 3][k % 3].words, best.values, n),
                                     row_place[k / 3] + column_place[k % 3], best.places[n]);
      }
    }
  }
  return best;
}

// One output of V channels, element by element as PyTorch's rule says.
template <bool kClosing, int kUnroll, class T, int V, class Local>
__device__ __forceinline__ void pool_window(const Local& local, const PoolShape& shape, int32_t top, int32_t left,
                                            int64_t in, int64_t out, T* y, uint8_t* code) {
  const Window& k = shape.window;
  const int32_t i_begin = max(-top, 0), i_end = min(k.kernel_h, shape.height - top);
  const int32_t j_begin = max(-left, 0), j_end = min(k.kernel_w, shape.width - left);
  Best best[V];
  begin(best, k.kernel_w * i_begin + j_begin);
#pragma unroll 1
  for (int32_t i = i_begin; i < i_end; ++i) {
#pragma unroll kUnroll
    for (int32_t j = j_begin; j < j_end; ++j) {
      const int64_t pixel = int64_t{top + i} * shape.width + left + j;
      const Pack<T, V> x = local.at(in + pixel * shape.in.pixel);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        best[v].take(element(x, v), k.kernel_w * i + j);
      }
    }
  }
  store_best<kClosing>(best, out, y, code);
}

// Where a strip of output pixels lies, in NHWC.
struct StripPlace {
  int64_t in, out;         // offset of the image in x, and of the strip's first pixel in y
  int32_t top, end, left;  // of the first window, of one after the last, and of all

  __device__ __forceinline__ StripPlace(const Strips& strips, int64_t unit, int32_t channel, int32_t rows,
                                        int32_t stride) {
    const PoolShape& shape = strips.shape;
    int64_t column, strip;
    const int64_t image = strips.count.divide(strips.out_width.divide(unit, column), strip);
    const int32_t first_row = static_cast<int32_t>(strip) * rows;
    in = image * shape.in.image + channel;
    out = image * shape.out.image + (int64_t{first_row} * shape.out_width + column) * shape.out.pixel + channel;
    top = first_row * stride - shape.window.pad_h;
    end = top + stride * min(rows, shape.out_height - first_row);
    left = static_cast<int32_t>(column) * stride - shape.window.pad_w;
  }
};

// pool_fwd_strips for 3 x 3 windows with stride 2 of 16-bit elements in NHWC; a thread has one unit. The loop over a
// strip's windows is not unrolled: six loads in flight are enough, and fifteen would take registers from the warps that
// hide their latency.
template <class T, int V, int kRows, bool kCodes, bool kClosing, class Source>
__global__ void __launch_bounds__(kThreads, 4)
    pool_fwd_packed(Source source, T* __restrict__ y, uint8_t* __restrict__ code, Units units, int32_t channels,
                    Strips strips) {
  constexpr int K = 3, S = 2;
  constexpr bool kRectified = Source::kRectified;
  const PoolShape& shape = strips.shape;
  const int32_t channel = units.vector() * V;
  const int64_t unit = units.first();
  if (channel >= channels || unit >= units.count) {
    return;
  }
  const auto local = source.template local<V>(channel);
  const StripPlace place(strips, unit, channel, kRows, S);
  int32_t w[K];
  uint32_t in_window[K];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    w[j] = min(max(place.left + j, 0), shape.width - 1);
    in_window[j] = (w[j] - place.left) * 0x01010101u;
  }

  uint32_t signs = 0;  // of all elements read
  // The best of three columns of row h, places as in the window's first row.
  const auto best_of_row = [&](int32_t h) {
    Pack<T, V> x[K];
#pragma unroll
    for (int j = 0; j < K; ++j) {
      x[j] = local.at(place.in + (int64_t{h} * shape.width + w[j]) * channels);
    }
    PackedBest<V> best;
#pragma unroll
    for (int n = 0; n < V / 2; ++n) {
      const uint32_t a = x[0].words[n], b = x[1].words[n], c = x[2].words[n];
      best.values[n] = max_of_three<T, kRectified>(a, b, c);
      if (!kRectified) {
        signs |= a | b | c;
      }
    }
    if (kCodes) {
#pragma unroll
      for (int n = 0; n < V / 4; ++n) {
        best.places[n] = select_bits(equal_four(x[0].words, best.values, n), in_window[0],
                                     select_bits(equal_four(x[1].words, best.values, n), in_window[1], in_window[2]));
      }
    }
    return best;
  };

  uint32_t undecided = 0;
  int64_t out = place.out;
  PackedBest<V> above = best_of_row(max(place.top, 0));
#pragma unroll 1
  for (int32_t top = place.top; top < place.end; top += S) {
    PackedBest<V> best = above;
#pragma unroll
    for (int n = 0; n < V / 4; ++n) {
      best.places[n] += K * (max(top, 0) - top) * 0x01010101u;
    }
#pragma unroll
    for (int i = 1; i < K; ++i) {
      const int32_t h = min(max(top + i, 0), shape.height - 1);
      above = best_of_row(h);  // at last the row that the window below begins with
      const PackedBest<V> before = best;
#pragma unroll
      for (int n = 0; n < V / 2; ++n) {
        best.values[n] = max_pair<T>(before.values[n], above.values[n]);
      }
      if (kCodes) {
#pragma unroll
        for (int n = 0; n < V / 4; ++n) {
          best.places[n] = select_bits(equal_four(before.values, best.values, n), before.places[n],
                                       above.places[n] + K * (h - top) * 0x01010101u);
        }
      }
    }
    undecided |= store_packed<kRectified, kCodes, kClosing>(best, signs, out, y, code);
    out += shape.out_width * shape.out.pixel;
  }
  if (undecided == 0) {
    return;
  }
  // Rare, and so the thread does its outputs once more, channel by channel, and finds its place once more.
  const StripPlace again(strips, units.first(anew(threadIdx.y)), channel, kRows, S);
#pragma unroll 1
  for (int32_t c = 0; c < V; ++c) {
    out = again.out + c;
#pragma unroll 1
    for (int32_t top = again.top; top < again.end; top += S) {
      pool_window<kClosing, 1, T, 1>(source.template local<1>(channel + c), shape, top, again.left, again.in + c, out,
                                     y, kCodes ? code : nullptr);
      out += shape.out_width * shape.out.pixel;
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
    const int64_t in = image * shape.in.image + channel * shape.in.channel;
    const int64_t out =
        image * shape.out.image + channel * shape.out.channel + (row * shape.out_width + column) * shape.out.pixel;
    pool_window<kClosing, V == 1 ? 4 : 2, T, V>(local, shape, top, left, in, out, y, code);
  }
}

// ---------------------------------------------------------------- planes in shared memory

// Two planes of 55 x 55 in 16 bits are 14 x 3 strips of 9 rows each, one in float32 27 x 3: 84 and 81 threads.
constexpr int kPoolThreads = 96;

// Windows of K x K with stride S that all lie within the image, in NCHW.
struct PoolPlanes {
  PlaneBands lie;         // over rows of output pixels
  StripsInPlanes strips;  // of output pixels
  Divider channels;
  int32_t y_at, code_at, bytes;  // in the block's shared memory

  template <class Params>
  PoolPlanes(const Params& p, int64_t element)
      : lie(p.batch * p.channels, p.out_height,
            [&](int64_t planes, int64_t rows) {
              return x_bytes(p, element, planes, rows) + run_bytes(planes * rows * p.out_width, element) +
                     run_bytes(planes * rows * p.out_width, 1);
            }),
        strips(lie, ceil_div<int64_t>(p.out_width, 4 / element)),
        channels(p.channels) {
    const int64_t outputs = int64_t{lie.whole} * lie.rows * p.out_width;
    y_at = static_cast<int32_t>(x_bytes(p, element, lie.whole, lie.rows));
    code_at = y_at + static_cast<int32_t>(run_bytes(outputs, element));
    bytes = code_at + (p.code == nullptr ? 0 : static_cast<int32_t>(run_bytes(outputs, 1)));
  }

  // Whether the kernel takes what `p` asks for. Offsets within a plane have 32 bits, and so have numbers of planes.
  template <class Params>
  bool take(const Params& p) const {
    return !p.channels_last && overlapping_3_by_2(p.window) && windows_inside(p) && p.height * p.width <= INT32_MAX &&
           p.batch * p.channels <= INT32_MAX && lie.fit();
  }

  // A band of rows reads its windows' rows; whole planes are read from the first one's first to the last one's last.
  template <class Params>
  static int64_t x_bytes(const Params& p, int64_t element, int64_t planes, int64_t rows) {
    const int64_t in_rows = (rows - 1) * p.window.stride_h + p.window.kernel_h;
    return run_bytes(((planes - 1) * p.height + in_rows) * p.width, element);
  }
};

// `rows` outputs of a column, element by element as PyTorch's rule says: the row that a window shares with the next is
// read and compared once. `local` reads x, from the first window's corner on; y and code are written from `to` on.
template <int K, int S, bool kCodes, bool kClosing, class T, class Local>
__device__ __forceinline__ void pool_column(const Local& local, int32_t from, int32_t width, T* y, uint8_t* code,
                                            int32_t to, int32_t out_width, int32_t rows) {
  static_assert(K == S + 1);
  const auto best_of_row = [&](int32_t place) {
    Best best{element(local.at(from), 0), place};
#pragma unroll
    for (int j = 1; j < K; ++j) {
      best.take(element(local.at(from + j), 0), place + j);
    }
    return best;
  };
  Best last = best_of_row(0);
#pragma unroll 1
  for (int32_t row = 0; row < rows; ++row) {
    Best best = last;
#pragma unroll
    for (int i = 1; i < K; ++i) {
      from += width;
      last = best_of_row(K * i);
      best.take(last.value, last.place);
    }
    last.place -= K * S;  // in the window below
    from_float(best.value, y[to]);
    if (kCodes) {
      code[to] = static_cast<uint8_t>(code_of<kClosing>(best));
    }
    to += out_width;
  }
}

// The same word by word, in 16 bits of two columns of windows at once: word(place) reads one. `from`, y and code are at
// the first window's corner and output; the second column's outputs lie `other` further on. Outputs from the word's
// element `own` on are written. Returns 0 if words decide, as store_packed does.
template <class T, int K, int S, bool kRectified, bool kCodes, bool kClosing, class Word>
__device__ __forceinline__ uint32_t pool_column_of_words(const Word& word, const T* from, int32_t width, T* y,
                                                         uint8_t* code, int32_t other, int32_t own, int32_t out_width,
                                                         int32_t rows) {
  static_assert(K == 3 && S == 2 && (kRectified || !kClosing));
  uint32_t signs = 0, undecided = 0;
  struct BestOfWord {
    uint32_t values, places;
  };
  const auto best_of_row = [&](uint32_t place) {
    const uint32_t a = word(from), b = word(from + 1), c = word(from + 2);
    if (!kRectified) {
      signs |= a | b | c;
    }
    const uint32_t values = max_of_three<T, kRectified>(a, b, c);
    return BestOfWord{values, if_equal<T>(a, values, place * kEach<T>,
                                          if_equal<T>(b, values, (place + 1) * kEach<T>, (place + 2) * kEach<T>))};
  };
  BestOfWord last = best_of_row(0);
#pragma unroll 1
  for (int32_t row = 0; row < rows; ++row) {
    BestOfWord best = last;
#pragma unroll
    for (int i = 1; i < K; ++i) {
      from += width;
      last = best_of_row(K * i);
      const uint32_t before = best.values;
      best.values = max_of_two<T>(before, last.values);
      best.places = if_equal<T>(before, best.values, best.places, last.places);
    }
    last.places -= K * S * kEach<T>;  // in the window below
    if (!kRectified) {
      undecided |= if_equal<T>(best.values, 0, signs, 0);
    }
    if (kCodes) {
      undecided |= unequal<T>(best.values);
    }
    if (kClosing) {
      best.places = if_equal<T>(best.values, 0, ~0u, best.places);  // all ones: kClosed
    }
#pragma unroll
    for (int i = 0; i < kInWord<T>; ++i) {
      if (i + 1 == kInWord<T> || i >= own) {
        store_of_word<kCodes>(best.values, best.places, i, y + i * other, code + (kCodes ? i * other : 0));
      }
    }
    y += out_width;
    code += kCodes ? out_width : 0;
  }
  return undecided & kSigns<T>;
}

// A thread goes down columns of outputs, one or, in 16 bits, two at once: one of the left half and one of the right, so
// that a warp's elements lie beside each other, without conflicts of banks. Of an odd number the one in the middle is
// in both halves, and the right one writes it. Floats that may be negative go element by element.
template <class T, int K, int S, bool kCodes, bool kClosing, class Source>
__global__ void __launch_bounds__(kPoolThreads, 8)
    pool_fwd_planes(Source source, T* __restrict__ y, uint8_t* __restrict__ code, PoolPlanes planes, PoolShape shape) {
  unsigned char* const room = dynamic_shared();
  const PlaneBand band(planes.lie);
  const int32_t width = shape.width, plane = shape.height * width, out_plane = shape.out_height * shape.out_width;
  const T* const x = fetch_run<kPoolThreads>(room, source.tensor() + band.first * plane + band.begin * S * width,
                                             (band.number - 1) * plane + ((band.end - 1 - band.begin) * S + K) * width);
  const int64_t out = band.first * out_plane + band.begin * shape.out_width;
  T* const own_y = place_run(room + planes.y_at, y + out);
  uint8_t* const own_code = kCodes ? place_run(room + planes.code_at, code + out) : nullptr;
  await_runs();

#pragma unroll 1
  for (StripInPlanes<kPoolThreads> strip(planes.strips, band, band.number); strip.there(); strip.next()) {
    uint32_t channel;
    planes.channels.divide_small(static_cast<uint32_t>(band.first) + strip.plane, channel);
    const auto local = source.over(x).template local<1>(channel);
    const int32_t from = strip.plane * plane + (strip.row * width + strip.column) * S;
    const int32_t to = strip.plane * out_plane + strip.row * shape.out_width + strip.column;
    const int32_t other = shape.out_width - static_cast<int32_t>(planes.strips.columns.divisor);
    const int32_t own = strip.column >= other ? kInWord<T> - 1 : 0;
    const auto by_elements = [&](int32_t i) {
      pool_column<K, S, kCodes, kClosing>(local, from + i * other * S, width, own_y, own_code, to + i * other,
                                          shape.out_width, strip.rows);
    };
    if constexpr (kInWord<T> == 1 && !Source::kRectified) {
      by_elements(0);
    } else {
      const auto word = [&](const T* at) {
        if constexpr (kInWord<T> == 1) {
          return local.at(at).words[0];
        } else {
          const uint32_t both = pair_of(at[0].bits, at[other * S].bits);
          if constexpr (Source::kRectified) {
            return add_relu_pair<T>(both, local.bias.words[0] * 0x10001u);
          }
          return both;
        }
      };
      const uint32_t undecided = pool_column_of_words<T, K, S, Source::kRectified, kCodes, kClosing>(
          word, x + from, width, own_y + to, own_code + (kCodes ? to : 0), other, own, shape.out_width, strip.rows);
      if (undecided != 0) {  // rare
#pragma unroll 1
        for (int32_t i = own; i < kInWord<T>; ++i) {
          by_elements(i);
        }
      }
    }
  }
  __syncthreads();
  const int32_t outputs = (band.number - 1) * out_plane + (band.end - band.begin) * shape.out_width;
  put_run<kPoolThreads>(own_y, y + out, outputs);
  if (kCodes) {
    put_run<kPoolThreads>(own_code, code + out, outputs);
  }
}

// ---------------------------------------------------------------- launch

template <class T, int V, bool kClosing, class Params, class Source>
int launch_pool_fwd(const Params& p, const Source& source, void* stream) {
  constexpr int kRows = 2;
  constexpr bool kPacked = sizeof(T) == 2 && V > 1;
  const bool unrolled = overlapping_3_by_2(p.window);
  if constexpr (V == 1) {
    if (const PoolPlanes planes(p, sizeof(T)); planes.take(p)) {
      constexpr auto with_codes =
          launch<pool_fwd_planes<T, 3, 2, true, kClosing, Source>, Source, T*, uint8_t*, PoolPlanes, PoolShape>;
      constexpr auto without =
          launch<pool_fwd_planes<T, 3, 2, false, kClosing, Source>, Source, T*, uint8_t*, PoolPlanes, PoolShape>;
      return (p.code != nullptr ? with_codes : without)(planes.lie.grid(), dim3(kPoolThreads), planes.bytes, stream,
                                                        source, static_cast<T*>(p.y), p.code, planes, PoolShape(p));
    }
  }
  const int64_t strips = ceil_div<int64_t>(p.out_height, unrolled ? kRows : 1);
  const UnitGrid grid(p.batch * strips * p.out_width, p.channels / V, p.channels_last, INT32_MAX,
                      kPacked && unrolled ? 1 : UnitGrid::kUnitsPerThread);
  auto kernel = launch<pool_fwd_any<T, V, kClosing, Source>, Source, T*, uint8_t*, Units, int32_t, Strips>;
  if (unrolled) {
    if constexpr (kPacked) {
      kernel = p.code != nullptr ? launch<pool_fwd_packed<T, V, kRows, true, kClosing, Source>, Source, T*, uint8_t*,
                                          Units, int32_t, Strips>
                                 : launch<pool_fwd_packed<T, V, kRows, false, kClosing, Source>, Source, T*, uint8_t*,
                                          Units, int32_t, Strips>;
    } else {
      kernel =
          launch<pool_fwd_strips<T, V, 3, 2, kRows, kClosing, Source>, Source, T*, uint8_t*, Units, int32_t, Strips>;
    }
  }
  return kernel(grid.grid, grid.block, 0, stream, source, static_cast<T*>(p.y), p.code, grid.units,
                static_cast<int32_t>(p.channels), Strips{PoolShape(p), Divider(p.out_width), Divider(strips)});
}

}  // namespace alexnet_fast::cuda
