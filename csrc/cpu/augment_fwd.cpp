// Crop, mirror, colour noise, normalization and cast of uint8 images in one pass:
//   y[n][i][j][c] = (x[n][top + i][left + j'][c] - shift[n][c]) / scale[c], j' = width - 1 - j if mirrored, else j,
// laid out for a first convolution with a stride where that is wanted (params.h has the order).
// A subtraction and a division, each rounded: other backends' results are the same to the bit.
#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kChannels = 3;

Cut cut(const AugmentParams& p) {
  return Cut(p.batch, p.out_height, p.out_width * p.factor_h * p.factor_w * kChannels);
}

// Copies every `count` elements of a line to where `step` elements of y lie between two beginnings.
template <class T>
void deal(const T* line, int64_t pieces, int64_t count, T* y, int64_t step) {
  if (count == 4 * kChannels) {  // AlexNet's stride: a copy of known size is a few instructions
    for (int64_t j = 0; j < pieces; ++j) std::memcpy(y + j * step, line + j * 4 * kChannels, 4 * kChannels * sizeof(T));
    return;
  }
  for (int64_t j = 0; j < pieces; ++j) std::memcpy(y + j * step, line + j * count, count * sizeof(T));
}

}  // namespace

int64_t augment_fwd_items(const AugmentParams& p) { return cut(p).items; }

void augment_fwd(const AugmentParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      const int64_t seen = max(0, min(p.crop_width, p.out_width * p.factor_w - p.pad_w));  // pixels of a line
      const int64_t count = seen * kChannels;
      const Scratch<float> scratch(2 * count);
      const Scratch<uint8_t> mirrored(count);
      float* const shift = scratch.get();  // repeated along a row, as scale is, so that a vector holds any channels
      float* const scale = scratch.get() + count;
      for (int64_t i = 0; i < count; ++i) scale[i] = p.scale[i % kChannels];
      // A line of a folded image, with its padding, before it is dealt out to the pixels of y.
      const int64_t piece = p.factor_w * kChannels, step = p.factor_h * piece, length = p.out_width * piece;
      const bool folds = p.factor_h > 1 || p.factor_w > 1 || p.pad_h > 0 || p.pad_w > 0;
      Scratch<T> folded(folds ? length : 0);
      folded.fill(T{});
      cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
        const int32_t* const place = p.place + image * 3;
        for (int64_t i = 0; i < count; ++i) shift[i] = p.shift[image * kChannels + i % kChannels];
        for (int64_t line = first * p.factor_h; line < past * p.factor_h; ++line) {
          const int64_t row = line - p.pad_h;
          T* const y = static_cast<T*>(p.y) + (image * p.out_height + line / p.factor_h) * p.out_width * step +
                       line % p.factor_h * piece;
          if (row < 0 || row >= p.crop_height) {
            for (int64_t j = 0; j < p.out_width; ++j) std::memset(y + j * step, 0, piece * sizeof(T));
            continue;
          }
          const uint8_t* x = p.x + ((image * p.height + place[0] + row) * p.width + place[1]) * kChannels;
          if (place[2] != 0) {
            for (int64_t j = 0; j < seen; ++j) {
              for (int64_t c = 0; c < kChannels; ++c) {
                mirrored.get()[j * kChannels + c] = x[(p.crop_width - 1 - j) * kChannels + c];
              }
            }
            x = mirrored.get();
          }
          T* const to = folds ? folded.get() + p.pad_w * kChannels : y;
          for_each_vector<float>(count, [&](int64_t i, int64_t n) {
            const Vector<float> v = __builtin_convertvector(load_codes<float>(x + i, n), Vector<float>);
            store(to + i, (v - load(shift + i, n)) / load(scale + i, n), n);
          });
          if (folds) deal(folded.get(), p.out_width, piece, y, step);
        }
      });
    }
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
