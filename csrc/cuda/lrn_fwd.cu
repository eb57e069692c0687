// Local response normalization, forward: y = x t^-beta, t = k + alpha/size * (sum of x^2 over neighbouring channels).
//
// common/lrn_fwd.cuh holds the kernels and how they lie over a tensor. A thread owns 16 bytes where the tensor allows
// it: channels of a pixel in NHWC when a group of channels is a multiple of 16 bytes, pixels of a plane in NCHW when a
// plane is. AlexNet's planes (55 x 55, 27 x 27, 13 x 13) are odd, every channel starts elsewhere within 16 bytes, and a
// thread owns one pixel and walks in longer steps. Measured of the first version: 2,592 GB/s in bfloat16 NHWC and 2,403
// in float32 NCHW, 55 x 55 pixels, where a copy has 2,844 (batch 128, one H100 80GB HBM3, 2026-11-27).
//
// Bytes: x once, y once, 4 a bfloat16 element. Arithmetic at size 5 in 16 bits, an element: 2 conversions, 1.5 squares
// (those of the halo are shared by 8 channels) and 1.3 additions, which share parts of sums, a fused multiply-add for
// t, 2 special functions and 2 multiplications for t^-3/4 x. With addresses, loads and branches sm_90's loop in NHWC
// issues 134 for 8 elements, 17 each; it was 156 when every window was added up by itself. In the time that 4.3 TB/s
// take for 4 bytes, 132 multiprocessors at 1.7 GHz issue 27, and 3.3 special functions: bound by memory. A k so small
// that t may be subnormal costs 4 more each. Bytes in flight: 16 a thread and 1,500 threads a multiprocessor are 24
// KB; 4.3 TB/s at 0.7 us latency want 11 KB of reads. Prediction, not a measurement: 90% of copy bandwidth; 80% in NCHW
// with one pixel a thread, where each instruction moves 64 bytes a warp.
//
// float32: the fast root instructions err by 2 ulp; one Newton step (5 instructions of 54 affordable) makes it less
// than 1. Considered: shared memory tiles for NCHW planes that are no multiple of 16 bytes. They would move 16 bytes a
// thread whatever the shape, for one more pass through shared memory and a barrier a step.
#include "cuda/common/lrn_fwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {

int lrn_fwd(const LrnParams& p, void* stream) {
  const LrnShape shape{p.dtype, p.channels_last, p.batch, p.channels, p.pixels};
  if (p.batch * p.channels * p.pixels == 0) {
    return cudaSuccess;
  }
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Plain<T> source{static_cast<const T*>(p.x)};
    return launch_lrn_fwd(shape, p.lrn, source, source, static_cast<T*>(p.y), aligned_16(p.x) && aligned_16(p.y),
                          stream);
  });
}

}  // namespace alexnet_fast::cuda
