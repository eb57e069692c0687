// Max-pool forward.
#include "cpu/pool_rows.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

// NCHW pools N * C planes, NHWC N images; a unit is one output row, which costs the stride_h input rows that it is
// first to read.
Cut cut(const PoolParams& p) {
  const int64_t images = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t row = p.channels_last ? p.width * p.channels : p.width;
  const int64_t elements = images * p.height * row;
  return Cut(images, p.out_height, row * p.window.stride_h, p.channels_last ? is_little(elements) : is_tiny(elements));
}

template <class Pool, class T>
void run(const PoolParams& p, int64_t begin, int64_t end) {
  const int64_t pixel = p.channels_last ? p.channels : 1;
  const Pool pool(p.window, p.channels, p.height, p.width, p.out_width);
  cut(p).for_each(begin, end, [&](int64_t, int64_t image, int64_t first, int64_t past) {
    const int64_t out = (image * p.out_height + first) * p.out_width * pixel;
    pool(static_cast<const T*>(p.x) + image * p.height * p.width * pixel, 0, first, past, static_cast<T*>(p.y) + out,
         p.code == nullptr ? nullptr : p.code + out, nullptr);
  });
}

}  // namespace

int64_t max_pool_fwd_items(const PoolParams& p) { return cut(p).items; }

void max_pool_fwd(const PoolParams& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    (p.channels_last ? run<PoolForwardNhwc<T, false>, T> : run<PoolForwardNchw<T, false>, T>)(p, begin, end);
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
