// LRN backward: dx from x and dy; t is computed again. The formula: cpu/lrn_tile.h.
#include "cpu/lrn_tile.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kUnit = 64;  // pixels

Cut cut(const LrnParams& p) { return Cut(p.batch, ceil_div(p.pixels, kUnit), kUnit * p.channels); }

}  // namespace

int64_t lrn_bwd_items(const LrnParams& p) { return cut(p).items; }

void lrn_bwd(const LrnParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const x = static_cast<const T*>(p.x);
    const T* const dy = static_cast<const T*>(p.dy);
    T* const dx = static_cast<T*>(p.dx);
    const LrnBackward<T, false> lrn(p.lrn, p.channels, p.channels_last, p.pixels);
    cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
      const int64_t pixel = first * kUnit, pixels = min(p.pixels, past * kUnit) - pixel;
      const int64_t start = image * p.channels * p.pixels + pixel * (p.channels_last ? p.channels : 1);
      lrn(pixels, x + start, dx + start, p.pixels, dy + start, p.pixels, nullptr);
    });
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
