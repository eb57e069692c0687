// Max-pooling, forward. y: the largest element of each window; code: its place, if wanted.
//
// common/pool_fwd.cuh holds the kernels. A thread owns 16 bytes of channels in NHWC where channels are a multiple of
// that, else one channel; in NCHW one pixel of a plane, whose neighbours the warp's other threads own.
//
// Bytes, windows of 3 with stride 2, an output of 16 bits: 4 inputs (8), itself (2), its code (1). In the time that
// 3.0 TB/s take for 11 bytes, 132 multiprocessors at 1.7 GHz issue 105 instructions a lane. L1 serves the 15 reads of a
// strip for 8 new elements; L2 serves the row that strips share, a quarter more than device memory does.
//
// The first version turned elements into float32, and kept a float and a place for each: 1,312 instructions of sm_90
// for the 16 outputs of a thread, 111 registers, two blocks of 256 threads a multiprocessor. Measured were 2,009 GB/s
// of 55 x 55 pixels, 1,655 of 27 x 27 and 1,542 of 13 x 13, where a copy of the largest has 2,844 (bfloat16, batch 128,
// one H100 80GB HBM3, 2026-11-27): DRAM 53%, issue 40%, 22% of the warps. It lacked warps, not bytes.
//
// Now 16-bit elements in NHWC are compared in pairs. sm_90's loop over a strip has 211 instructions for 8 outputs with
// a ReLU and codes, 121 without codes, and some 200 more a thread for its place and its first row: about 40 an output,
// of 105. 53 to 64 registers, four blocks, half of the warps, each with 3 to 6 loads of 512 bytes in flight: bytes
// bind. Predicted, not measured: 2.6 TB/s of 55 x 55 pixels.
//
// NCHW, windows within the image: planes in shared memory (common/planes.cuh), copied by 16 bytes; a thread goes down 9
// outputs of a column. The first version had a pixel a thread, 7.5 loads and 2 stores an output, each an instruction of
// its own: sm_90's loop over bfloat16 issued 188 an output where the bytes leave 105. Measured were 2,121 GB/s of 55 x
// 55 pixels in float32, and 61 us in bfloat16, where 62 MB take 21 (batch 128, cold, one H100 80GB HBM3, 2026-11-27).
// Now the loop has 66 for two outputs behind a ReLU (63 without one, 42 without codes), a strip 94 more, and a thread
// 390 for its copies and places, the way of rare ones left out. With 3 strips of 14 pairs of columns in each of two
// planes for a block of 96 threads that is 71 an output of 16 bits, of the 76 that 4.3 TB/s leave, and 50 of 69 without
// codes; in float32, of one plane, 106 without a ReLU and 121 behind one, whose floats are compared as integers, three
// at once, of 145. So bytes bind, on an H200 too.
//
// Before, a pair was of two planes and a strip 7 rows: 4 strips of 27 columns kept 108 of 128 threads busy, the loop
// had 79 (73, 49), and it was 91 and 64 an output, 122 and 141 in float32. Of the 79 six put the same two halves into a
// word a second time, two looked for what pairs leave undecided, where a comparison of the maxima with themselves and
// with zero now does, and two found the second plane; the channel's division in 64 bits was 30 more a strip. (Two
// columns side by side share an element: 10 loads for 12, and 61 in the loop. But then a warp's elements are 8 bytes
// apart, two accesses of shared memory for each load.) A multiprocessor has 12 such blocks, with up to 17 KB each under
// way. Predicted, not measured: 2.4 TB/s in 16 bits on an H100, 2.6 in float32.
//
// A pair's instructions leave open which of several NaN is the last, and whether the first of several zeros had a sign.
// A thread that meets that does its outputs again, one by one: after a ReLU that is a NaN, or in bfloat16 2^121 or
// more. Without a ReLU it is also a maximum of 0 beside negative numbers.
//
// Considered: strips of 4 rows (13.5% fewer loads, half the threads: too few for 6 x 6 outputs at batch 128); value and
// place in one 32-bit integer, whose maximum is one instruction: a channel each and not two, and putting them together
// and taking them apart is as much as the two comparisons and selections that it saves.
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
