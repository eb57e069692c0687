// Local response normalization, backward. common/lrn_bwd.cuh holds the formula and the kernels.
//
// Bytes: x and dy once, dx once, 6 a bfloat16 element: 40 instructions and 5 special functions of 132 multiprocessors
// at 1.7 GHz in the time that 4.3 TB/s take for them. In NHWC a thread computes t and q of its 8 channels and reads 2
// on either side from shared memory: at size 5 and beta 3/4, sm_90's loop has 222 instructions for 8 elements, 28 and 2
// special functions each; it had 302 when every window was added up by itself, and measured were 2,634 GB/s where a
// copy has 2,844 (55 x 55 pixels, batch 128, one H100 80GB HBM3, 2026-11-27); then 266 where it asks for the window and
// its power, as the kernel for other windows does. float32 has twice the bytes.
// Predictions, not measurements: 75% of copy bandwidth in bfloat16, 90% in float32.
//
// NCHW with one pixel a thread had 1,762 GB/s in float32: two blocks a multiprocessor, each thread with eight loads of
// 4 bytes on its way, are 16 KB, where 3.0 TB/s at 0.7 us want 16 and more. Now tiles go through shared memory
// (common/lrn_planes.cuh), 121 pixels wide and up to 64 channels deep in 16 bits, 32 in float32: rows of x and dy with
// those of the halo, up to 40 KB a block of 64 threads, which have two pixels each, and five blocks or more. Every t
// and q is computed once, but for those of 4 channels more a chunk. Of AlexNet's first 96 channels, in chunks of 48 and
// 55 x 55 planes, sm_90's walk issues 377 for 8 channels of two pixels, a row that 8 threads fetch 13, a row that 16
// put back 15, and a thread some 630 for its place and the channels before the first: 36 an element, 54 in float32 with
// chunks of 32 (519 for 8 channels), of the 40 and 80 that 4.3 TB/s leave: bytes bind, on an H200 too. The walk is 23.6
// of it, of which 20.5 are arithmetic, conversions, loads and stores, 2 addresses, and 1 moves and loops.
//
// With a pixel a thread and 128 threads it was 44, and 66: 209 for 8 elements, 125 before the first and 430 for a
// place, which was half as many elements' (9.5 an element, and now 4.7). Of the 209 twenty were addresses and fifteen
// moves. Now one address serves x, dy and dx of both pixels, a fixed number of bytes apart each, and sums of five share
// pairs (FivesByTwos), 20 and 16 for 8 sums instead of 22 and 18. What it costs are warps: of 96 registers
// and 31 KB a multiprocessor of sm_90 has seven blocks, 14 warps with 16 elements each at work, where there were 28
// with 8. Tiles of 233 pixels and 32 channels took 54 and 72. Predicted for an H100, not measured: 2.3 TB/s in
// bfloat16, 2.5 in float32.
//
// Considered: saving t forward instead of computing it again. It would cost 2 or 4 more bytes an element each way.
#include "cuda/common/lrn_bwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {

int lrn_bwd(const LrnParams& p, void* stream) {
  const LrnShape shape{p.dtype, p.channels_last, p.batch, p.channels, p.pixels};
  if (p.batch * p.channels * p.pixels == 0) {
    return cudaSuccess;
  }
  const bool aligned = aligned_16(p.x) && aligned_16(p.dy) && aligned_16(p.dx);
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const LrnBackward<T> backward{static_cast<const T*>(p.x), static_cast<T*>(p.dx), nullptr};
    const PlainGradient<T> gradient{static_cast<const T*>(p.dy)};
    return launch_lrn_bwd<false>(shape, p.lrn, backward, gradient, aligned, stream);
  });
}

}  // namespace alexnet_fast::cuda
