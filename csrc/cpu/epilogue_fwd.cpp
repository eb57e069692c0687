// Epilogue forward: y = pool(lrn(relu(z + bias))), the last two optional.
#include "cpu/lrn_tile.h"
#include "cpu/pool_rows.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kUnit = 64;                // pixels
constexpr int64_t kStripElements = 1 << 16;  // of an intermediate that waits for its second pass

bool normalizes(const EpilogueParams& p) { return p.lrn.size > 0; }
bool pools(const EpilogueParams& p) { return p.window.kernel_h > 0; }

// Pixels of a unit.
int64_t unit_of(const EpilogueParams& p) { return normalizes(p) ? kUnit : 1; }

// Without LRN, NCHW planes are on their own. Units are output rows, or pixels.
Cut cut(const EpilogueParams& p) {
  const bool planes = !p.channels_last && !normalizes(p);
  const int64_t images = planes ? p.batch * p.channels : p.batch, pixel = planes ? 1 : p.channels;
  const int64_t elements = p.batch * p.channels * p.height * p.width;
  if (pools(p)) {
    return Cut(images, p.out_height, p.width * pixel * p.window.stride_h, !normalizes(p) && is_little(elements));
  }
  const int64_t unit = unit_of(p);
  return Cut(images, ceil_div(p.height * p.width, unit), unit * pixel, !normalizes(p) && is_tiny(elements));
}

// ---- Bias and ReLU -------------------------------------------------------------------------------------------------

template <class A>
Vector<A> relu(Vector<A> v) {
  return v <= 0 ? Vector<A>{} : v;
}

// Pixels of one channel; bias: one element, or null.
template <class T>
void activate_channel(const T* z, const T* bias, T* r, int64_t pixels) {
  using A = Acc<T>;
  const Vector<A> b = broadcast<A>(bias != nullptr ? load(bias, 1)[0] : -A{});
  for_each_vector<A>(pixels, [&](int64_t i, int64_t n) { store(r + i, relu<A>(load(z + i, n) + b), n); });
}

// Pixels of `channels` neighbours; bias: per channel, or null.
template <class T>
void activate_pixels(const T* z, const T* bias, T* r, int64_t pixels, int64_t channels) {
  using A = Acc<T>;
  for (int64_t p = 0; p < pixels; ++p, z += channels, r += channels) {
    for_each_vector<A>(channels, [&](int64_t c, int64_t n) {
      const Vector<A> b = bias != nullptr ? load(bias + c, n) : broadcast<A>(-A{});
      store(r + c, relu<A>(load(z + c, n) + b), n);
    });
  }
}

template <class T>
void run_relu(const EpilogueParams& p, int64_t begin, int64_t end) {
  const T* const z = static_cast<const T*>(p.z);
  const T* const bias = static_cast<const T*>(p.bias);
  T* const y = static_cast<T*>(p.y);
  const int64_t pixels = p.height * p.width;
  cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
    const int64_t count = past - first;
    if (p.channels_last) {
      const int64_t start = (image * pixels + first) * p.channels;
      activate_pixels(z + start, bias, y + start, count, p.channels);
    } else {
      const int64_t start = image * pixels + first;
      activate_channel(z + start, bias != nullptr ? bias + image % p.channels : nullptr, y + start, count);
    }
  });
}

// ---- Bias, ReLU, pooling -------------------------------------------------------------------------------------------

template <class Pool, class T>
void run_pool(const EpilogueParams& p, int64_t begin, int64_t end) {
  const T* const bias = static_cast<const T*>(p.bias);
  const int64_t pixel = p.channels_last ? p.channels : 1;
  const Pool pool(p.window, p.channels, p.height, p.width, p.out_width);
  cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
    const int64_t out = (image * p.out_height + first) * p.out_width * pixel;
    pool(static_cast<const T*>(p.z) + image * p.height * p.width * pixel, 0, first, past, static_cast<T*>(p.y) + out,
         p.code != nullptr ? p.code + out : nullptr,
         bias != nullptr && !p.channels_last ? bias + image % p.channels : bias);
  });
}

// ---- Bias, ReLU, LRN [, pooling] -----------------------------------------------------------------------------------

// lrn(relu(z + bias)) of a run of pixels of one image, by tiles whose ReLU output waits in cache.
template <class T>
class Normalize {
 public:
  explicit Normalize(const EpilogueParams& p)
      : p_(p),
        lrn_(p.lrn, p.channels, p.channels_last),
        tile_(max(p.channels_last ? 1 : kUnit, (p.channels_last ? kRunElements : kStripElements) / p.channels)),
        scratch_(tile_ * p.channels) {}

  // Pixels [first, past) of the image at z (and r). y: where the first of them goes; y_stride as NCHW has it. r: null
  // to forget the ReLU's output.
  void operator()(const T* z, T* r, int64_t first, int64_t past, T* y, int64_t y_stride) const {
    const int64_t pixels = p_.height * p_.width, pixel = p_.channels_last ? p_.channels : 1;
    for (int64_t start = first; start < past; start += tile_) {
      const int64_t count = min(tile_, past - start);
      T* const tile = r != nullptr ? r + start * pixel : scratch_.get();
      const int64_t stride = r != nullptr ? pixels : tile_;
      activate_if_nhwc(z + start * pixel, tile, count);
      lrn_(count, tile, stride, y + (start - first) * pixel, y_stride, [&](int64_t c, int64_t p, int64_t n) {
        const T* const from = z + c * pixels + start + p;
        prefetch(from + pixels, n);
        activate_channel(from, bias(c), tile + c * stride + p, n);
      });
    }
  }

  // The ReLU's output alone.
  void activate(const T* z, T* r, int64_t first, int64_t past) const {
    const int64_t pixels = p_.height * p_.width;
    if (p_.channels_last) {
      activate_pixels(z + first * p_.channels, bias(0), r + first * p_.channels, past - first, p_.channels);
    } else {
      for (int64_t c = 0; c < p_.channels; ++c) {
        activate_channel(z + c * pixels + first, bias(c), r + c * pixels + first, past - first);
      }
    }
  }

 private:
  static constexpr int64_t kRunElements = 4096;

  const T* bias(int64_t c) const { return p_.bias != nullptr ? static_cast<const T*>(p_.bias) + c : nullptr; }

  void activate_if_nhwc(const T* z, T* tile, int64_t count) const {
    if (!p_.channels_last) return;
    prefetch(z + count * p_.channels, count * p_.channels);
    activate_pixels(z, bias(0), tile, count, p_.channels);
  }

  const EpilogueParams& p_;
  LrnForward<T> lrn_;
  int64_t tile_;  // pixels
  Scratch<T> scratch_;
};

template <class T>
void run_lrn(const EpilogueParams& p, int64_t begin, int64_t end) {
  const int64_t pixels = p.height * p.width, pixel = p.channels_last ? p.channels : 1;
  const Normalize<T> normalize(p);
  cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
    const int64_t start = image * pixels * p.channels;
    T* const r = p.r != nullptr ? static_cast<T*>(p.r) + start : nullptr;
    normalize(static_cast<const T*>(p.z) + start, r, first * kUnit, min(pixels, past * kUnit),
              static_cast<T*>(p.y) + start + first * kUnit * pixel, pixels);
  });
}

template <class Pool, class T>
void run_lrn_pool(const EpilogueParams& p, int64_t begin, int64_t end) {
  const Window& w = p.window;
  const int64_t pixels = p.height * p.width, out_pixels = p.out_height * p.out_width;
  const int64_t pixel = p.channels_last ? p.channels : 1, planes = p.channels_last ? 1 : p.channels;
  const Normalize<T> normalize(p);
  const Pool pool(w, p.channels, p.height, p.width, p.out_width);
  // A strip of output rows needs the input rows of its windows.
  const int64_t row = p.width * p.channels;
  const int64_t strip = max(1, (kStripElements / row - w.kernel_h) / w.stride_h + 1);
  const int64_t strip_pixels = min(p.height, (strip - 1) * w.stride_h + w.kernel_h) * p.width;
  const Scratch<T> normalized(strip_pixels * p.channels);

  cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t piece_first, int64_t piece_past) {
    const T* const z = static_cast<const T*>(p.z) + image * pixels * p.channels;
    T* const r = p.r != nullptr ? static_cast<T*>(p.r) + image * pixels * p.channels : nullptr;
    const auto border = [&](int64_t out) {  // the first input row that belongs to output row `out` and those after it
      return out == 0 ? 0 : out == p.out_height ? p.height : min(p.height, out * w.stride_h - w.pad_h);
    };
    for (int64_t first = piece_first; first < piece_past; first += strip) {
      const int64_t past = min(piece_past, first + strip);
      // Every row of r is written once, by the strip that it belongs to. Rows that this strip's windows share with the
      // next strip's are made again; rows that no window holds have an r all the same.
      const int64_t own = border(first), own_past = border(past);
      const int64_t past_needed = min(p.height, (past - 1) * w.stride_h - w.pad_h + w.kernel_h);
      const int64_t both = min(own_past, past_needed);
      normalize(z, r, own * p.width, both * p.width, normalized.get(), strip_pixels);
      if (both < past_needed) {
        normalize(z, nullptr, both * p.width, past_needed * p.width, normalized.get() + (both - own) * p.width * pixel,
                  strip_pixels);
      }
      if (both < own_past && r != nullptr) normalize.activate(z, r, both * p.width, own_past * p.width);
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t out = image * out_pixels * p.channels + (plane * p.out_height + first) * p.out_width * pixel;
        pool(normalized.get() + plane * strip_pixels, own, first, past, static_cast<T*>(p.y) + out,
             p.code != nullptr ? p.code + out : nullptr, nullptr);
      }
    }
  });
}

}  // namespace

int64_t epilogue_fwd_items(const EpilogueParams& p) { return cut(p).items; }

void epilogue_fwd(const EpilogueParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto run = normalizes(p) ? (!pools(p)         ? run_lrn<T>
                                      : p.channels_last ? run_lrn_pool<PoolForwardNhwc<T, false>, T>
                                                        : run_lrn_pool<PoolForwardNchw<T, false>, T>)
                                   : (!pools(p)         ? run_relu<T>
                                      : p.channels_last ? run_pool<PoolForwardNhwc<T, true>, T>
                                                        : run_pool<PoolForwardNchw<T, true>, T>);
    run(p, begin, end);
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
