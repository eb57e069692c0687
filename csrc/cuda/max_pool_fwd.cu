// Max-pooling, forward. y: the largest element of each window; code: its place, if wanted.
//
// common/pool_fwd.cuh holds the kernels. A thread owns 16 bytes of channels in NHWC where channels are a multiple of
// that, else one channel; in NCHW one pixel of a plane, whose neighbours the warp's other threads own.
//
// Bytes, windows of 3 with stride 2, an output in bfloat16: 4 inputs (8), itself (2), its code (1). In the time
// that 4.3 TB/s take for 11 bytes, 132 multiprocessors at 1.7 GHz issue 73 instructions a lane. A strip of 2 outputs
// takes 15 loaded elements: 15 conversions, 10 comparisons within rows and 6 between rows of 4 instructions each. With
// addresses and stores sm_90's loop has 977 instructions for the 16 outputs of 8 channels, 61 each: bound by memory in
// NHWC, not by far. L1 serves the 15 reads for 8 new elements; L2 serves the row that strips share, a
// quarter more than device memory does. NCHW: 7.5 loads, 1 store of 2 bytes and 1 of 1 an output, each an instruction
// of its own, some of them over two lines: two thirds of what L1 accepts in that time. Predictions, not measurements:
// 85% of copy bandwidth in NHWC, 75% in NCHW for 16-bit elements and 90% for float32.
//
// Considered: strips of 4 rows (13.5% fewer loads, half the threads: too few for 6 x 6 outputs at batch 128); a
// comparison of value and place in one integer, which is fast but lets the wrong one of -0 and +0, or of two NaN, win.
#include "cuda/common/pool_fwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {

int max_pool_fwd(const PoolParams& p, void* stream) {
  if (p.batch * p.channels * p.out_height * p.out_width == 0) {
    return cudaSuccess;
  }
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = kVector<T>;
    const Plain<T> source{static_cast<const T*>(p.x)};
    const bool vectors =
        p.channels_last && p.channels % V == 0 && aligned_16(p.x) && aligned_16(p.y) && aligned_16(p.code);
    return vectors ? launch_pool_fwd<T, V, false>(p, source, stream) : launch_pool_fwd<T, 1, false>(p, source, stream);
  });
}

}  // namespace alexnet_fast::cuda
