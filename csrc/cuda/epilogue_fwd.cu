// What follows a raw convolution output z, in one pass: r = max(0, z + bias) in z's dtype; then LRN, or max-pooling, or
// both.
//
// bias + ReLU         below: each element once
// ... + LRN           common/lrn_fwd.cuh, the kernels of lrn_fwd.cu reading through `Rectified`
// ... + pool          common/pool_fwd.cuh, the kernels of max_pool_fwd.cu reading through `Rectified`
// ... + LRN + pool    common/lrn_pool_fwd.cuh, common/lrn_pool_fwd_columns.cuh and common/lrn_pool_fwd_planes.cuh
//
// 16-bit types add and clamp two elements in one fused instruction that rounds once.
//
// Bytes an element of z in bfloat16, windows of 3 with stride 2: 4 for bias + ReLU; with LRN 4, or 6 where r is kept;
// with the pool 2.5, or 2.75 with codes; with both 2.5, or 4.75 with codes and r. Instructions that 132 multiprocessors
// at 1.7 GHz issue in the time 4.3 TB/s take for them: 27, 27, 18 and 17 (32 in training). Predictions, not
// measurements, of the fraction of copy bandwidth in NHWC:
//   bias + ReLU   90%: 3 instructions
//   LRN           85%: lrn_fwd.cu's 13, and 2 for bias and ReLU
//   pool          75%: 8 to 13 instructions in 16 bits, max_pool_fwd.cu has the arithmetic
//
// LRN + pool. The first version took 55 instructions an element (profiler: 62% of the issue slots of 115 us, DRAM at
// 23%): three integer divisions a vector of channels, 32 additions where 18 do, and a float and a place for each of a
// window's nine elements. Measured were 874 GB/s of 55 x 55 pixels in inference and 1,519 in training, where a copy has
// 2,844 (bfloat16, batch 128, one H100 80GB HBM3, 2026-11-27). Now, in training, for AlexNet's LRN and window in 16
// bits: sm_90's loop over pixels has 138 for 8 elements, done 1.11 times each at 55 x 55 (tiles of 9 x 9 outputs and 48
// channels read 19 x 19 pixels for 18 x 18); the loop over outputs 213 for 8, a quarter of an element each; and some
// 250 a thread for its place, once for 62 elements: 31 an element. 3.0 TB/s leave 46, 4.3 TB/s leave 32: bytes bind.
// float32 takes 126 in the loop for 4 elements, done 1.25 times each; some 200 for an output of 4 channels, whose
// floats are compared as integers; and 256 for a place, once for 34 elements: 60, of 88 and 62. The kernel for any
// window had 151 in the loop, 66 an element, when it found an address of 64 bits for each of a pixel's three loads,
// made t^-1/2 exact on the way to t^-3/4 (lrn.cuh), and compared and selected for the ReLU. Predicted, not measured:
// 2.5 TB/s.
//
// In inference a thread goes down a column of pixels (common/lrn_pool_fwd_columns.cuh): at 55 x 55 a block takes 29
// columns of 96 channels, 8 a thread, and of 128 images a band of 9 rows of outputs, in float32 all 27. In bfloat16
// sm_90's loop issues 218 for two rows and a row of outputs, 13 fewer in the five of eleven warps that have none of
// these, and some 245 come before it, for a place and the band's first row. 348 threads have 352 lanes, and the right
// half of an image has 27 columns for 29: 15.7 an element, of the 24 that 3.0 TB/s leave and the 16.7 of 4.3. float32:
// 354, and 310 before it, 23.3 of 48 and 33. So bytes bind, but for the special functions of 16 bits on an H200: 2.2 an
// element, as each row between two bands is done twice and lanes are left over, where 2.5 bytes leave 2.1: 6%. Tiles as
// in training took 23, and 47 in float32: pixels that two of them do, 1.11 and 1.25; nine loads for an output, 79 and
// 90 instructions for 8 and 4 channels, where a column's maxima are three loads and 26; neighbours, of 4 channels four,
// of 8 as many; and 250 for a place, once for 62 and 34 elements. 56 registers, three blocks a multiprocessor, in
// float32 80 and two, with two rows a thread on their way: 34 and 45 KB. Slices of 32 channels and whole rows would
// have 5% fewer warps, and read two sectors of neighbours for two of their own. Predicted, not measured: 2.5 TB/s on an
// H100, 3.3 on an H200.
//
// NCHW with LRN, AlexNet's windows: lrn_fwd.cu's tiles of planes. The lanes that have fetched a vector of a row add the
// bias to it, once for 8 elements, and where r is kept it is copied out as y is. In bfloat16 and 55 x 55 planes that is
// 28 instructions for two vectors of a row of 121 elements: 24 an element of 96 channels in inference, and 27 in
// training, where one pixel a thread took 60 in its loop alone. 3.0 TB/s leave 38 for 4 bytes and 57 for 6, 4.3 TB/s 27
// and 40: bytes bind. float32: 39 and 45 of 77 and 115. Predicted for an H100, not measured: 2.4 TB/s.
//
// NCHW with LRN and pool, windows within the image, in training: tiles of the rows under four rows of outputs, and 48
// channels, 24 in float32 (common/lrn_pool_fwd_planes.cuh). A thread walks through the channels of two pixels, and
// leaves LRN's output in vectors of 16 bytes of channels, from which a thread pools 8 channels at once. In bfloat16 and
// 55 x 55 planes sm_90's walk issues 192 for 16 elements, 13.7 each with the row that tiles share; the pool 130 a
// column of a tile and 156 for 8 of its outputs, 6.5 an element; copies with r 4.5, bias and ReLU too; and a thread's
// place some 450, 5.5. Together 30, of the 45 that 3.0 TB/s leave and the 32 of 4.3; in float32 52 of 89 and 62: bytes
// bind.
//
// The version before took 49, in float32 80. It walked through one pixel with an address for each access and wrote
// element by element, 116 for 8; pooled two channels, 59 and 36 for two outputs, from four loads of single elements
// each; and added the bias in a pass of its own over 32 channels, 25 a vector. One pixel a thread without shared memory
// took 64 in the walk alone and some 80 in the pool; 558 and 939 GB/s were measured of that in float32, in inference
// and in training (same card and day). Tried as well: loading both pixels before the arithmetic, 4 fewer and spills in
// training; rows of outputs two by two, 59 for 62 and spills; offsets of 64 bits by multiplications, which ptxas makes
// additions again. 52 KB of shared memory, 55 in float32, and up to 64 registers: four blocks, on sm_80 three and two.
//
// In inference those tiles take 23 and 38, with bias and ReLU on the walk, and are for planes of other sizes than
// AlexNet's 55 x 55 and 27 x 27. Of these a thread goes down a column as in NHWC. Its loads are single elements, 12
// channels of a row, straight from device memory: 4 more than it makes, which L1 has as another thread's, and none of a
// tile's copies, addresses, or rows that two of them share. In bfloat16 the loop issues 255 for two rows of 8 channels
// and a row of outputs, 26 fewer in the three of seven warps that have none of these, for which a block's first threads
// take them; some 265 come before it. 220 threads, 55 columns of 32 channels, have 224 lanes, and of 128 images a block
// takes whole columns: 15.9 an element, 2.04 of them special functions, of 16.7 and 2.1 on an H200. float32: 374, 27
// fewer, and 330 before it: 23.4 of 33. Bytes bind. A warp's elements are 64 or 128 bytes of a row or two, in some two
// lines of L1 a load: 3 of the 4.2 cycles that a multiprocessor of an H200 has for 32 elements of 16 bits. 80
// registers, three blocks of seven warps, and 24 loads a thread on their way: 32 KB, in float32 63. Predicted, not
// measured: 2.2 TB/s on an H100, 2.9 on an H200.
#include "cuda/common/lrn_fwd.cuh"
#include "cuda/common/lrn_pool_fwd.cuh"
#include "cuda/common/lrn_pool_fwd_columns.cuh"
#include "cuda/common/lrn_pool_fwd_planes.cuh"
#include "cuda/common/pool_fwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

// ---------------------------------------------------------------- bias and ReLU alone

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    relu_nhwc(Rectified<T, true> source, T* __restrict__ y, Units units, int32_t channels) {
  const int32_t channel = units.vector() * V;
  if (channel >= channels) {
    return;
  }
  const auto local = source.template local<V>(channel);
#pragma unroll 2
  for (int64_t pixel = units.first(); pixel < units.count; pixel += units.stride()) {
    const int64_t offset = pixel * channels + channel;
    const Pack<T, V> value = local.at(offset);
    source.keep(offset, value);
    store(y + offset, value);
  }
}

// A unit is one aligned vector of memory that has elements of the plane; the first and the last of a plane may share
// theirs with the planes beside it, and go element by element.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1) relu_nchw(Rectified<T, false> source, T* __restrict__ y, Units units,
                                                         Divider slots, int32_t channels, int64_t pixels) {
  const int32_t channel = units.vector();
  if (channel >= channels) {
    return;
  }
  const auto vector = source.template local<V>(channel);
  const typename Rectified<T, false>::template Local<1> single{source.z, first(vector.bias)};
  for (int64_t unit = units.first(); unit < units.count; unit += units.stride()) {
    int64_t slot;
    const int64_t plane = (slots.divide(unit, slot) * channels + channel) * pixels;
    const int64_t offset = (plane / V + slot) * V;
    if (offset >= plane && offset + V <= plane + pixels) {
      const Pack<T, V> value = vector.at(offset);
      source.keep(offset, value);
      store(y + offset, value);
      continue;
    }
    for (int64_t i = max(offset, plane); i < min(offset + V, plane + pixels); ++i) {
      const Pack<T, 1> value = single.at(i);
      source.keep(i, value);
      store(y + i, value);
    }
  }
}

template <class T, int V>
int launch_relu(const EpilogueParams& p, void* stream) {
  const int64_t pixels = p.height * p.width;
  const int32_t channels = static_cast<int32_t>(p.channels);
  const T* z = static_cast<const T*>(p.z);
  const T* bias = static_cast<const T*>(p.bias);
  if (p.channels_last) {
    const UnitGrid grid(p.batch * pixels, p.channels / V, true);
    return launch<relu_nhwc<T, V>>(grid.grid, grid.block, 0, stream, Rectified<T, true>{z, bias, static_cast<T*>(p.r)},
                                   static_cast<T*>(p.y), grid.units, channels);
  }
  const int64_t slots = (pixels + V - 2) / V + 1;  // aligned vectors that a plane can touch
  const UnitGrid grid(p.batch * slots, p.channels, false);
  return launch<relu_nchw<T, V>>(grid.grid, grid.block, 0, stream, Rectified<T, false>{z, bias, static_cast<T*>(p.r)},
                                 static_cast<T*>(p.y), grid.units, Divider(slots), channels, pixels);
}

}  // namespace

// ---------------------------------------------------------------- launcher

int epilogue_fwd(const EpilogueParams& p, void* stream) {
  const bool normalizing = p.lrn.size != 0, pooling = p.window.kernel_h != 0;
  if (pooling && !normalizing && p.r != nullptr) {
    return cudaErrorInvalidValue;  // the code is all that backward needs
  }
  if (p.batch * p.channels * p.height * p.width == 0) {
    return cudaSuccess;
  }
  const bool aligned =
      aligned_16(p.z) && aligned_16(p.bias) && aligned_16(p.y) && aligned_16(p.r) && aligned_16(p.code);
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int V = kVector<T>;
    const Rectified<T, true> nhwc{static_cast<const T*>(p.z), static_cast<const T*>(p.bias), static_cast<T*>(p.r)};
    const Rectified<T, false> nchw{nhwc.z, nhwc.bias, nhwc.r};
    const LrnShape shape{p.dtype, p.channels_last, p.batch, p.channels, p.height * p.width};
    T* y = static_cast<T*>(p.y);
    if (!normalizing && !pooling) {
      return aligned && (!p.channels_last || p.channels % V == 0) ? launch_relu<T, V>(p, stream)
                                                                  : launch_relu<T, 1>(p, stream);
    }
    if (!pooling) {
      return launch_lrn_fwd(shape, p.lrn, nhwc, nchw, y, aligned, stream);
    }
    if (!normalizing) {  // with one channel a thread the layouts' sources are the same
      return aligned && p.channels_last && p.channels % V == 0 ? launch_pool_fwd<T, V, true>(p, nhwc, stream)
                                                               : launch_pool_fwd<T, 1, true>(p, nhwc, stream);
    }
    if (LrnPoolColumns::take<55>(p, sizeof(T))) {
      return launch_lrn_pool_fwd_columns<T, 8, 55>(p, stream);
    }
    if (LrnPoolColumns::take<27>(p, sizeof(T))) {
      return launch_lrn_pool_fwd_columns<T, 8, 27>(p, stream);
    }
    if (LrnPoolPlanes<T>::take(p)) {
      return launch_lrn_pool_fwd_planes<T>(p, nchw, stream);
    }
    return with_halo(p.lrn, [&](auto halo) {
      constexpr int Halo = decltype(halo)::value;
      if (!p.channels_last) {
        return launch_lrn_pool_fwd<T, 1, Halo>(p, nchw, stream);
      }
      return aligned && lrn_in_vectors(shape, p.lrn, V) ? launch_lrn_pool_fwd<T, V, Halo>(p, nhwc, stream)
                                                        : launch_lrn_pool_fwd<T, 1, kWidestHalo>(p, nhwc, stream);
    });
  });
}

}  // namespace alexnet_fast::cuda
