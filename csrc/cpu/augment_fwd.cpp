// Crop, mirror, colour noise, normalization and cast of uint8 images in one pass:
//   y[n][i][j][c] = (x[n][top + i][left + j'][c] - shift[n][c]) / scale[c], j' = width - 1 - j if mirrored, else j.
// A subtraction and a division, each rounded: other backends' results are the same to the bit.
#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kChannels = 3;

Cut cut(const AugmentParams& p) { return Cut(p.batch, p.out_height, p.out_width * kChannels); }

}  // namespace

int64_t augment_fwd_items(const AugmentParams& p) { return cut(p).items; }

void augment_fwd(const AugmentParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      const int64_t count = p.out_width * kChannels;
      const Scratch<float> scratch(2 * count);
      const Scratch<uint8_t> mirrored(count);
      float* const shift = scratch.get();  // repeated along a row, as scale is, so that a vector holds any channels
      float* const scale = scratch.get() + count;
      for (int64_t i = 0; i < count; ++i) scale[i] = p.scale[i % kChannels];
      cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
        const int32_t* const place = p.place + image * 3;
        for (int64_t i = 0; i < count; ++i) shift[i] = p.shift[image * kChannels + i % kChannels];
        for (int64_t row = first; row < past; ++row) {
          const uint8_t* x = p.x + ((image * p.height + place[0] + row) * p.width + place[1]) * kChannels;
          if (place[2] != 0) {
            for (int64_t j = 0; j < p.out_width; ++j) {
              for (int64_t c = 0; c < kChannels; ++c) {
                mirrored.get()[j * kChannels + c] = x[(p.out_width - 1 - j) * kChannels + c];
              }
            }
            x = mirrored.get();
          }
          T* const y = static_cast<T*>(p.y) + (image * p.out_height + row) * count;
          for_each_vector<float>(count, [&](int64_t i, int64_t n) {
            const Vector<float> v = __builtin_convertvector(load_codes<float>(x + i, n), Vector<float>);
            store(y + i, (v - load(shift + i, n)) / load(scale + i, n), n);
          });
        }
      });
    }
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
