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
// issues 134 for 8 elements, 17 each; it was 156 when every window was added up by itself. In the time that 4.3 TB/s
// take for 4 bytes, 132 multiprocessors at 1.7 GHz issue 27, and 3.3 special functions: bound by memory. A k so small
// that t may be subnormal costs 4 more each. Bytes in flight: 16 a thread and 1,500 threads a multiprocessor are 24
// KB; 4.3 TB/s at 0.7 us latency want 11 KB of reads. Prediction, not a measurement: 90% of copy bandwidth.
//
// Tiles of planes: a warp's load of one bfloat16 a thread moves 64 bytes, of which both ends are parts of sectors, and
// a store as little. In a tile of 233 pixels and 48 channels of 55 x 55 planes, sm_90's walk issues 110 for 8 elements,
// a row that a warp fetches 18, a row that it puts back 32, and a thread some 210 for its place: 27 an element, 44 in
// float32 with tiles of 121. One pixel a thread took 27 and 37, so what is gained is not instructions. 3.0 TB/s leave
// 38 and 76, 4.3 TB/s leave 27 and 53: bytes bind on an H100, in 16 bits instructions as much on an H200. 52 rows of up
// to 540 bytes are 27 KB a block of 256 threads in 16 bits, of 128 in float32; by 46 and 56 registers a thread five and
// eight blocks, 135 KB and more on their way or at work. Neighbouring chunks read 4 channels of 52 twice, out of L2.
// Predicted for an H100, not measured: 2.5 TB/s. Considered: vectors of pixels in registers, shifted by each plane's
// place. That is two loads a vector, or shuffles, and backward 168 registers for the walk.
//
// float32: the fast root instructions err by 2 ulp; one Newton step (5 instructions of 54 affordable) makes it less
// than 1.
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
