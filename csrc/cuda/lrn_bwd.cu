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
// (common/lrn_planes.cuh), up to 128 pixels wide and 48 channels deep in 16 bits, 32 in float32: rows of x and dy with
// those of the halo, 30 or 40 KB for a block of two warps, of which each walks through half of the channels, a lane
// with four pixels (common/lrn_bwd_walk.cuh). Of AlexNet's first 96 channels and 55 x 55 planes, in tiles of 127 pixels
// that leave 2% of the lanes without one, sm_90's loop has 664 for 8 channels of four pixels, 20.8 an element: x and dy
// 2 each, sums of squares 2.5, t 1, special functions 2, products 5, sums of q 2, dx 2, a result 2. A row that 8
// threads fetch takes 14, one that 16 put back 19, and a thread some 720 for its places and the channels before its
// first: 33 an element, 48 in float32 (847 for 8 channels), of the 40 and 80 that 4.3 TB/s leave: bytes bind, on an
// H200 too.
//
// With two pixels a thread, which went through all channels of a chunk, it was 36 and 54, and with a pixel 44 and 66.
// float32's t^-3/4 and 1 / t took 14 instructions, and now 11 (inverse_powers). Tried: scale put into the squares'
// products, so that t takes no instruction of its own, and dx neither; with 2 beta in the sums of q half an element is
// to be gained, but scaled values want registers beside the values: the rectified loop had 804 instead of 813, or 828.
// 107 to 128 registers: seven blocks of sm_90, 14 warps, in float32 five, each lane with four pixels' and two channels'
// independent work. Predicted for an H100, not measured: 2.3 TB/s in bfloat16, 2.5 in float32.
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
