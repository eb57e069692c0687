// Epilogue backward: dz and the sum of dz over pixels, in one pass, from dy and what forward kept.
#include "cpu/lrn_tile.h"
#include "cpu/pool_rows.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kPixelsAtOnce = 8;         // NHWC: so many are added up in a register
constexpr int64_t kSummed = 1 << 10;         // pixels whose sum one accumulator takes: more would lose digits
constexpr int64_t kStripElements = 1 << 16;  // of the gradient between pooling and LRN

bool normalizes(const EpilogueParams& p) { return p.lrn.size > 0; }
bool pools(const EpilogueParams& p) { return p.window.kernel_h > 0; }
// Pixels of a unit. Each piece of an image has its own sums for the bias, which are added up afterwards: not worth it
// for a few pixels in NHWC, least of all for the rows of matrices, which are images one pixel wide of many channels.
int64_t unit_of(const EpilogueParams& p) { return normalizes(p) || p.width == 1 ? 64 : p.channels_last ? 16 : 1; }

// Without LRN, NCHW planes are on their own: two threads in one of them would write to the same lines of the cache, one
// a channel. Units are input rows, or pixels.
Cut cut(const EpilogueParams& p) {
  const bool planes = !p.channels_last && !normalizes(p);
  const int64_t images = planes ? p.batch * p.channels : p.batch, pixel = planes ? 1 : p.channels;
  const int64_t elements = p.batch * p.channels * p.height * p.width;
  if (pools(p)) return Cut(images, p.height, p.width * pixel, !normalizes(p) && is_little(elements));
  const int64_t unit = unit_of(p);
  return Cut(images, ceil_div(p.height * p.width, unit), unit * pixel, !normalizes(p) && is_tiny(elements));
}

// An item's two rows of db_partial, sums and what rounding lost of them, or null. They begin as zeros, also those of
// channels that the item has not.
template <class A>
A* db_of(const EpilogueParams& p, int64_t item) {
  return p.db_partial != nullptr ? static_cast<A*>(p.db_partial) + 2 * item * p.channels : nullptr;
}

template <class T>
void mask_channel(const T* dy, const T* r, T* dz, int64_t pixels, int64_t channels, Acc<T>* db) {
  using A = Acc<T>;
  for (int64_t first = 0; first < pixels; first += kSummed) {
    Vector<A> total{};
    for_each_vector<A>(min(kSummed, pixels - first), [&](int64_t i, int64_t n) {
      const Vector<A> v = load(r + first + i, n) <= 0 ? Vector<A>{} : load(dy + first + i, n);
      total += v;
      store(dz + first + i, v, n);
    });
    if (db != nullptr) add_exactly<A>(db, db + channels, broadcast(sum<A>(total)), 1);
  }
}

template <class T>
void mask_pixels(const T* dy, const T* r, T* dz, int64_t pixels, int64_t channels, Acc<T>* db) {
  using A = Acc<T>;
  // Of `count` pixels the channels [c, c + n), whose sums pass through memory once.
  const auto mask = [&](int64_t first, int64_t count, int64_t c, int64_t n) {
    Vector<A> total{};
    for (int64_t p = first; p < first + count; ++p) {
      const int64_t at = p * channels + c;
      const Vector<A> v = load(r + at, n) <= 0 ? Vector<A>{} : load(dy + at, n);
      total += v;
      store(dz + at, v, n);
    }
    if (db != nullptr) add_exactly<A>(db + c, db + channels + c, total, n);
  };
  int64_t p = 0;
  for (; p + kPixelsAtOnce <= pixels; p += kPixelsAtOnce) {
    for_each_vector<A>(channels, [&](int64_t c, int64_t n) { mask(p, kPixelsAtOnce, c, n); });
  }
  for_each_vector<A>(channels, [&](int64_t c, int64_t n) { mask(p, pixels - p, c, n); });
}

// Without pooling: through the ReLU, or through LRN and the ReLU.
template <class T>
void run_pixels(const EpilogueParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const int64_t pixels = p.height * p.width, pixel = p.channels_last ? p.channels : 1;
  const int64_t planes = p.channels_last || normalizes(p) ? 1 : p.channels, unit = unit_of(p);
  const auto each = [&](auto f) {
    cut(p).for_each(begin, end, [&](int64_t item, int64_t image, int64_t first, int64_t past) {
      const int64_t start = image * pixels * p.channels / planes + first * unit * pixel;
      A* const db = db_of<A>(p, item);
      f(static_cast<const T*>(p.dy) + start, static_cast<const T*>(p.r) + start, static_cast<T*>(p.dz) + start,
        min(pixels, past * unit) - first * unit, db != nullptr ? db + image % planes : nullptr);
    });
  };
  if (normalizes(p)) {
    const LrnBackward<T, true> lrn(p.lrn, p.channels, p.channels_last, pixels);
    each([&](const T* dy, const T* r, T* dz, int64_t count, A* db) { lrn(count, r, dz, pixels, dy, pixels, db); });
  } else {
    const auto mask = p.channels_last ? mask_pixels<T> : mask_channel<T>;
    each([&](const T* dy, const T* r, T* dz, int64_t count, A* db) { mask(dy, r, dz, count, p.channels, db); });
  }
}

// With pooling. Without LRN the code is the ReLU's mask too, and what is gathered is dz.
template <class Pool, class T>
void run_pool(const EpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t pixels = p.height * p.width, out_pixels = p.out_height * p.out_width;
  const int64_t pixel = p.channels_last ? p.channels : 1, planes = p.channels_last ? 1 : p.channels;
  const Pool pool(p.window, p.channels, p.width, p.out_height, p.out_width);
  cut(p).for_each(begin, end, [&](int64_t item, int64_t image, int64_t first, int64_t past) {
    Acc<T>* const db = db_of<Acc<T>>(p, item);
    const int64_t out = image * out_pixels * pixel;
    pool(static_cast<const T*>(p.dy) + out, p.code + out, first, past,
         static_cast<T*>(p.dz) + (image * pixels + first * p.width) * pixel,
         db != nullptr ? db + image % planes : nullptr);
  });
}

// With both: pooling's gradient waits in cache, a strip of rows at a time.
template <class Pool, class T>
void run_lrn_pool(const EpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t pixels = p.height * p.width, out_pixels = p.out_height * p.out_width;
  const int64_t pixel = p.channels_last ? p.channels : 1, planes = p.channels_last ? 1 : p.channels;
  const Pool pool(p.window, p.channels, p.width, p.out_height, p.out_width);
  const int64_t strip = min(p.height, max(1, kStripElements / (p.width * p.channels)));
  const int64_t strip_pixels = strip * p.width;
  const LrnBackward<T, true> lrn(p.lrn, p.channels, p.channels_last, strip_pixels);
  const Scratch<T> gradient(strip_pixels * p.channels);
  cut(p).for_each(begin, end, [&](int64_t item, int64_t image, int64_t piece_first, int64_t piece_past) {
    for (int64_t first = piece_first; first < piece_past; first += strip) {
      const int64_t past = min(piece_past, first + strip);
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t out = (image * planes + plane) * out_pixels * pixel;
        pool(static_cast<const T*>(p.dy) + out, p.code + out, first, past, gradient.get() + plane * strip_pixels,
             nullptr);
      }
      const int64_t at = image * pixels * p.channels + first * p.width * pixel;
      lrn((past - first) * p.width, static_cast<const T*>(p.r) + at, static_cast<T*>(p.dz) + at, pixels, gradient.get(),
          strip_pixels, db_of<Acc<T>>(p, item));
    }
  });
}

}  // namespace

int64_t epilogue_bwd_items(const EpilogueParams& p) { return cut(p).items; }

void epilogue_bwd(const EpilogueParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.db_partial != nullptr) {
      for (Acc<T>* db = db_of<Acc<T>>(p, begin); db != db_of<Acc<T>>(p, end); ++db) *db = 0;
    }
    const auto run = !pools(p) ? run_pixels<T>
                     : !normalizes(p)
                         ? (p.channels_last ? run_pool<PoolBackwardNhwc<T>, T> : run_pool<PoolBackwardNchw<T>, T>)
                     : p.channels_last ? run_lrn_pool<PoolBackwardNhwc<T>, T>
                                       : run_lrn_pool<PoolBackwardNchw<T>, T>;
    run(p, begin, end);
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
