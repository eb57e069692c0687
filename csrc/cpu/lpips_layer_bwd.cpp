// Backward of lpips_layer_fwd.cpp: both images' gradients, and the weight's, from the features alone.
#include "cpu/lpips_tile.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

template <class T, bool kLast>
void run(const LpipsParams& p, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Cut cut = lpips_cut(p);
  A* const rows = static_cast<A*>(p.partial);  // an item's two, sums and what rounding lost of them
  if (rows != nullptr) {
    for (int64_t i = 2 * begin * p.channels; i < 2 * end * p.channels; ++i) rows[i] = 0;
  }
  for_each_tile<T, kLast>(p, cut, begin, end, [&](int64_t item, auto tile, int64_t pair, int64_t unit) {
    PerPixel<A> squares[2], scales[2], along[2], dy;
    tile.measure(squares, scales);
    const A* const g = static_cast<const A*>(p.dy) + (p.spatial ? pair * p.pixels + unit * kLpipsUnit : pair);
    for (int64_t i = 0; i < tile.count; ++i) dy.at[i] = p.spatial ? g[i] : g[0] / static_cast<A>(p.pixels);

    const auto difference = [&](Vector<A> a, Vector<A> b, auto here) {
      return a * here(scales[0]) - b * here(scales[1]);
    };
    tile.add_up(along, [&](Vector<A> a, Vector<A> b, Vector<A> weight, auto here) {
      const Vector<A> h = weight * difference(a, b, here);
      return Terms<A, 2>{{h * a, h * b}};
    });
    for (int k = 0; k < 2; ++k) {  // 2 g s^2 / |a| times the sum of h a
      for (int64_t i = 0; i < kLpipsUnit; i += kLanes<A>) {
        const Vector<A> square = squares[k].vector(i), scale = scales[k].vector(i);
        const Vector<A> factor = 2 * dy.vector(i) * along[k].vector(i) * scale * scale / sqrt(square);
        along[k].set(i, square == 0 ? Vector<A>{} : factor);
      }
    }
    const int64_t offset = tile.a - static_cast<const T*>(p.x);
    T* const da = static_cast<T*>(p.dx) + offset;
    A* const sums = rows == nullptr ? nullptr : rows + 2 * item * p.channels;
    tile.write(da, da + (tile.b - tile.a), sums, [&](Vector<A> a, Vector<A> b, Vector<A> weight, auto here) {
      const Vector<A> d = difference(a, b, here), gd = here(dy) * d, h = 2 * weight * gd;
      return Terms<A, 3>{{h * here(scales[0]) - a * here(along[0]), b * here(along[1]) - h * here(scales[1]), gd * d}};
    });
  });
}

}  // namespace

int64_t lpips_layer_bwd_items(const LpipsParams& p) { return lpips_cut(p).items; }

void lpips_layer_bwd(const LpipsParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    (p.channels_last ? run<T, true> : run<T, false>)(p, begin, end);
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
