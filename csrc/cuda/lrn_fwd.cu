// Local response normalization, forward: y = x t^-beta, t = k + alpha/size * (sum of x^2 over neighbouring channels).
//
// common/lrn_fwd.cuh holds the kernels and how they lie over a tensor. A thread owns 16 bytes where the tensor allows
// it: channels of a pixel in NHWC when a group of channels is a multiple of 16 bytes, pixels of a plane in NCHW when a
// plane is. AlexNet's planes (55 x 55, 27 x 27, 13 x 13) are odd, every channel starts elsewhere within 16 bytes, and
// tiles of them go through shared memory (common/lrn_planes.cuh). In planes of less than 64 pixels, and where x and y
// begin elsewhere within 16 bytes, a thread owns one pixel and walks in longer steps. Measured of the first version:
// 2,592 GB/s in bfloat16 NHWC and, by one pixel a thread, 2,403 in float32 NCHW, 55 x 55 pixels, where a copy has 2,844
// (batch 128, one H100 80GB HBM3, 2026-11-27).
//
// Bytes: x once, y once, 4 a bfloat16 element. Arithmetic at size 5 in 16 bits, an element: 2 conversions, 1.5 squares
// (those of the halo are shared by 8 channels) and 1.3 additions, which share parts of sums, a fused multiply-add for
// t, 2 special functions and 2 multiplications for t^-3/4 x. With addresses, loads and branches sm_90's loop in NHWC
// has 102 for 8 elements, 13 each, and in float32 86 for 4; it had 156 when every window was added up by itself, and
// 134 where it asks for the window and its power, as the kernel for other windows does. In the time that 4.3 TB/s
// take for 4 bytes, 132 multiprocessors at 1.7 GHz issue 27, and 3.3 special functions: bound by memory. A k so small
// that t may be subnormal costs 4 more each. Bytes in flight: 16 a thread and 1,500 threads a multiprocessor are 24
// KB; 4.3 TB/s at 0.7 us latency want 11 KB of reads. Prediction, not a measurement: 90% of copy bandwidth.
//
// Tiles of planes: a warp's load of one bfloat16 a thread moves 64 bytes, of which both ends are parts of sectors, and
// a store as little. Tiles are 121 pixels wide and a chunk of channels deep, 96 in 16 bits. Of AlexNet's first 96
// channels, in one group and 55 x 55 planes, sm_90's walk issues 110 for 8 elements, a row that 8 threads fetch 13, a
// row that 16 put back 17, and a thread some 280 for its place: 21 an element, 32 in float32. 3.0 TB/s leave 38 and
// 76, 4.3 TB/s leave 27 and 53, so bytes bind; with 48 channels a group the place counts twice, and it is 24. The first
// tiles were 233 pixels and 48 channels, and found out for every row anew how it lies within 16 bytes, 18 and 33
// instructions a row: 27 an element, and 44. One pixel a thread took 27 and 37. What the depth costs is that a row in
// device memory is 242 bytes long and not 466, of which sectors at both ends come out of L2 a second time. 100 rows of
// up to 270 bytes are 27 KB a block of 128 threads; by 45 and 61 registers a thread eight blocks, 210 KB on their way
// or at work. Predicted for an H100, not measured: 2.5 TB/s. Considered: vectors of pixels in registers, shifted by
// each plane's place. That is two loads a vector, or shuffles, and backward 168 registers for the walk.
//
// float32: the fast root instructions err by 2 ulp; one Newton step (8 instructions of 54 affordable) makes it less
// than 1. A step for t^-1/2 as well, on the way, was 6 more, and changed nothing: 39 an element in planes.
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
