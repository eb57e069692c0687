// The distance of two images' features in a layer of LPIPS. The formulas: alexnet_fast/ops/lpips_layer.py.
#include "cpu/lpips_tile.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

template <class T, bool kLast>
void run(const LpipsParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for_each_tile<T, kLast>(p, lpips_cut(p), begin, end, [&](int64_t, auto tile, int64_t pair, int64_t unit) {
    PerPixel<A> squares[2], scales[2], distance[1];
    tile.measure(squares, scales);
    tile.add_up(distance, [&](Vector<A> a, Vector<A> b, Vector<A> weight, auto here) {
      const Vector<A> difference = a * here(scales[0]) - b * here(scales[1]);
      return Terms<A, 1>{{weight * difference * difference}};
    });
    if (p.spatial) {
      std::memcpy(static_cast<A*>(p.y) + pair * p.pixels + unit * kLpipsUnit, distance[0].at, tile.count * sizeof(A));
      return;
    }
    A total = 0;
    for (int64_t i = 0; i < tile.count; ++i) total += distance[0].at[i];
    static_cast<A*>(p.partial)[pair * lpips_units(p) + unit] = total;
  });
}

}  // namespace

int64_t lpips_layer_fwd_items(const LpipsParams& p) { return lpips_cut(p).items; }

void lpips_layer_fwd(const LpipsParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    (p.channels_last ? run<T, true> : run<T, false>)(p, begin, end);
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
