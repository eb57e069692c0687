// Backward of epilogue_fwd.cu: dz, and the bias's gradient db, in one pass over the tensors.
//
// bias + ReLU         below: dz = dy where r > 0 or NaN
// ... + LRN           common/lrn_bwd.cuh, the kernels of lrn_bwd.cu, masked by x = r
// ... + pool          max_pool_bwd.cu's kernels: the code is the mask too, and no other tensor is read
// ... + LRN + pool    common/lrn_pool_bwd.cuh and common/lrn_pool_bwd_planes.cuh, or common/lrn_bwd.cuh, whose dy is
//                     gathered through the pool
//
// db: every thread sums dz of its own channels in float32 as it goes, a block adds up its threads, and leaves a row of
// `db_partial`; a second kernel adds up the rows. At most 1,024 blocks go through the units of a channel, so rows are
// few, or in NCHW one for each image or tile; their number and every order of addition depend on shapes alone, and on
// where tensors begin within 16 bytes.
//
// Bytes an element of z in bfloat16, windows of 3 with stride 2: 6 for bias + ReLU and with LRN, 2.75 with the
// pool, 4.75 with both. Instructions that 132 multiprocessors at 1.7 GHz issue in the time 4.3 TB/s take for them: 40,
// 40, 18 and 32. Predictions, not measurements, of the fraction of copy bandwidth in NHWC:
//   bias + ReLU   90%: 8 instructions with db
//   LRN           80%: lrn_bwd.cu's 28, and 4 for mask and db
//   pool          85%: max_pool_bwd.cu's 14, and 1 for db
//   LRN + pool    80%: see below; 45% where windows are others
// Measured of the first version, GB/s of 55 x 55 pixels where a copy has 2,844 (bfloat16, batch 128, one H100 80GB
// HBM3, 2026-11-27): bias + ReLU 2,357, pool 1,912, LRN + pool 917. Of these the pool's kernel is another one since.
//
// LRN + pool had 94 instructions an element (profiler: 65% of the issue slots of 124 us, DRAM at 25%): each pixel went
// through its windows in a loop, 2.25 on average, and found their place by itself. Now, for AlexNet's LRN and window in
// 16 bits (common/lrn_pool_bwd.cuh): sm_90's loop has 951 instructions for the 32 elements of a patch, 28 x 28 of which
// cover 55 x 55 pixels: 30.8 each, and 0.6 for a thread's beginning and end, 31 of the 46 that 3.0 TB/s leave for 4.75
// bytes and the 31.7 of 4.3: bytes bind. Of the 30 that are a patch's: the gather 7, x 1.5, sums of squares 2.8, t 1,
// special functions 2, products 5, sums of q 2.3, dx 2, mask and bias 2.5, a result 0.6, places and the rest 3. 96
// registers and 6 KB of shared memory a block of 96 threads, of which 96 channels fill every lane: six blocks, 28% of
// the warps, with the next pixel's 512 bytes a warp always under way: 9 KB a multiprocessor, beside up to 43 KB of
// windows. Predicted, not measured: 2.4 TB/s on an H100. float32: 704 for 16 elements, 46, of the 88 and 61 for 9.25
// bytes; the kernel for any window, which it took before, has 115.
//
// The version before had 1,161 instructions in the loop, 38 an element counted so, and 96 channels left every 16th lane
// of its blocks without work. A code was taken out of its word and compared for itself, 12 an element, where now a
// comparison of float16 serves two (add_where_equal), and so does one for the mask. Patches and pixels that are not
// there are read as their neighbours, where branches around loads had zeros written first, and places have 32 bits.
// With 128 registers, and so 16 warps, it is as many instructions.
//
// NCHW with LRN, AlexNet's windows: lrn_bwd.cu's tiles of planes. The mask is 2 instructions an element, and sums for
// the bias 1.7, the four pixels of a thread first, and then eight lanes' of eight channels by shuffles. In bfloat16 and
// 55 x 55 planes the loop has 813 for 8 channels of four pixels, 38 an element in all with db, of the 40 that 4.3 TB/s
// leave for 6 bytes; in float32 994 and 54, of 80: bytes bind, on an H200 too. Where pixels are not one more than a
// multiple of eight, a row's address is not known when this is compiled: 881 and 1,069, 41 an element in 16 bits. With
// two pixels a thread it was 45 and 65, with a pixel 54 and 76, and one without shared memory took 90 in its loop
// alone. Sums of the results in shared memory, once they are there, would be fewer instructions, of elements rounded to
// 16 bits. A pixel that is not there has no branch or predicate: it is one of the thread's own once more, with a mask
// that leaves nothing, and writes first. Predicted for an H100, not measured: 2.3 TB/s, 2.5 in float32.
//
// NCHW with LRN and pool, windows of 3 with stride 2 within the image (common/lrn_pool_bwd_planes.cuh): tiles of four
// rows of 55 pixels and, in 16 bits, 96 channels, 224 threads with slices of 24 channels of 56 patches. In bfloat16
// sm_90's loop has 1,009 for 8 channels of a patch, 31.5 an element: of these the gather has 7.5 (for four pixels 8
// loads, 4 conversions, 9 comparisons, 9 selections and additions), x 2, sums of squares 2.5, t 1, special functions 2,
// products 5, sums of q 2, dx 2, the mask 2, a result 2 and sums for the bias 1.7. Before it come some 490 for 96
// elements, a place and q of the four channels beside a slice; copies take 4.5 an element, and their places 180.
// Together 44, in float16 as well, of the 45.5 that 3.0 TB/s leave for 4.75 bytes and the 31.7 of 4.3: bytes bind on an
// H100. float32, 48 channels in two slices, which leave an eighth of the lanes without work: 1,207 in the loop, 58
// together, of 88 and 61.8: bytes bind on an H200 too. It was 1,298 and 63 before t^-3/4 and 1 / t took three fewer.
//
// The version before took 79 and 107. Its threads gathered patches first, two channels at once, 16 an element with
// floats in shared memory; walked then through one pixel each, 38; and found a place, 640, once for 32 elements, where
// this one does for 96: four pixels share it, each warp copies one of the three tensors alone, and no address changes
// from channel to channel, since rows of AlexNet's tiles lie apart as is known when this is compiled. Two channels at
// once are more in the gather: a comparison serves two, but what it leaves is converted twice. Scattering, as
// max_pool_bwd.cu does, is 20 for a window, of which a tile of four rows has 1.5 for four pixels. The first version
// went through a pixel's windows in loops, of which a warp issues the longest: some 500 an element, and 574 GB/s were
// measured in float32.
//
// What the arithmetic alone needs in 16 bits is the itemised 30 and 3 for the channels beside a slice: 33, more than
// the 31.7 that 4.3 TB/s leave, so that on an H200 instructions bind, 1.4 times over. 128 registers and 79 KB of shared
// memory: two blocks, 14 warps, each with four pixels' and two channels' independent work. Predicted for an H100, not
// measured: 2.0 TB/s, 2.3 in float32.
#include "cuda/common/lrn_bwd.cuh"
#include "cuda/common/lrn_pool_bwd.cuh"
#include "cuda/common/lrn_pool_bwd_planes.cuh"
#include "cuda/common/pool_bwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

// ---------------------------------------------------------------- bias and ReLU alone

template <class T>
struct ReluBackward {
  const T* r;
  const T* dy;
  T* dz;
  float* partial;
};

template <class T, int V>
__device__ __forceinline__ void relu_at(const ReluBackward<T>& p, int64_t offset, float (&total)[V]) {
  const Pack<T, V> r = load<V>(p.r + offset);
  float values[V];
  unpack(load<V>(p.dy + offset), values);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    values[i] = element(r, i) <= 0 ? 0.0f : values[i];
    total[i] += values[i];
  }
  store(p.dz + offset, pack<T>(values));
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1) relu_bwd_nhwc(ReluBackward<T> p, Units units, int32_t channels) {
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < channels;
  float total[V] = {};
#pragma unroll 2
  for (int64_t pixel = wanted ? units.first() : units.count; pixel < units.count; pixel += units.stride()) {
    relu_at(p, pixel * channels + channel, total);
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

// Units as in epilogue_fwd.cu's relu_nchw: aligned vectors of memory, some of them shared with the next plane.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1)
    relu_bwd_nchw(ReluBackward<T> p, Units units, Divider slots, int32_t channels, int64_t pixels) {
  const int32_t channel = units.vector();
  const bool wanted = channel < channels;
  float total[1] = {};
  for (int64_t unit = wanted ? units.first() : units.count; unit < units.count; unit += units.stride()) {
    int64_t slot;
    const int64_t plane = (slots.divide(unit, slot) * channels + channel) * pixels;
    const int64_t offset = (plane / V + slot) * V;
    if (offset >= plane && offset + V <= plane + pixels) {
      float vector[V] = {};
      relu_at(p, offset, vector);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        total[0] += vector[i];
      }
      continue;
    }
    for (int64_t i = max(offset, plane); i < min(offset + V, plane + pixels); ++i) {
      relu_at(p, i, total);
    }
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

int64_t relu_slots(const EpilogueParams& p, int V) { return (p.height * p.width + V - 2) / V + 1; }

UnitGrid relu_grid(const EpilogueParams& p, int V, int64_t items) {
  return p.channels_last ? UnitGrid(p.batch * p.height * p.width, p.channels / V, true, items)
                         : UnitGrid(p.batch * relu_slots(p, V), p.channels, false, items);
}

template <class T, int V>
int launch_relu_bwd(const EpilogueParams& p, const ReluBackward<T>& backward, void* stream) {
  const UnitGrid grid = relu_grid(p, V, backward.partial == nullptr ? INT32_MAX : kSumItems);
  const int32_t channels = static_cast<int32_t>(p.channels);
  return p.channels_last ? launch<relu_bwd_nhwc<T, V>>(grid.grid, grid.block, 0, stream, backward, grid.units, channels)
                         : launch<relu_bwd_nchw<T, V>>(grid.grid, grid.block, 0, stream, backward, grid.units,
                                                       Divider(relu_slots(p, V)), channels, p.height * p.width);
}

// ---------------------------------------------------------------- which kernel

PoolParams pool_params(const EpilogueParams& p) {
  return {p.dtype,     p.channels_last, p.batch, p.channels, p.height, p.width, p.out_height,
          p.out_width, p.window,        nullptr, nullptr,    p.code,   p.dy,    p.dz};
}

struct Stage {
  bool normalizing, pooling, aligned;
  LrnShape shape;

  explicit Stage(const EpilogueParams& p)
      : normalizing(p.lrn.size != 0),
        pooling(p.window.kernel_h != 0),
        aligned(aligned_16(p.dy) && aligned_16(p.dz) && aligned_16(p.r) && aligned_16(p.code)),
        shape{p.dtype, p.channels_last, p.batch, p.channels, p.height * p.width} {}

  // Neighbours in memory that a thread owns where there is neither LRN nor pool.
  template <class T>
  int relu_vector() const {
    return aligned && (!shape.channels_last || shape.channels % kVector<T> == 0) ? kVector<T> : 1;
  }

  template <class T>
  bool packs(const EpilogueParams& p) const {
    return pooling && normalizing && lrn_pool_bwd_packs<T>(p, shape, aligned);
  }

  template <class T>
  int64_t rows(const EpilogueParams& p) const {
    if (packs<T>(p)) {
      return LrnPoolPatches(p, kVector<T>, true).blocks;
    }
    if (pooling && normalizing && LrnPoolTiles<T>::take(p, shape)) {
      return LrnPoolTiles<T>(p).x.items();
    }
    if (normalizing && !pooling &&
        SliceTiles<T>::template take<true>(shape, p.lrn, static_cast<const T*>(p.r), static_cast<const T*>(p.dz))) {
      return SliceTiles<T>(shape, p.lrn.groups).x.items();
    }
    if (normalizing) {
      const int V = pooling ? lrn_bwd_vector<T, PooledGradient<T>>(shape, p.lrn, aligned)
                            : lrn_bwd_vector<T, PlainGradient<T>>(shape, p.lrn, aligned);
      return lrn_bwd_items(shape, p.lrn, V, true);
    }
    return pooling ? pool_bwd_rows(pool_params(p)) : relu_grid(p, relu_vector<T>(), kSumItems).grid.x;
  }
};

template <class T>
int launch_dz(const EpilogueParams& p, const Stage& stage, void* stream) {
  const T* r = static_cast<const T*>(p.r);
  const T* dy = static_cast<const T*>(p.dy);
  T* dz = static_cast<T*>(p.dz);
  float* partial = static_cast<float*>(p.db_partial);
  if (stage.packs<T>(p)) {
    return launch_lrn_pool_bwd<T>(p, stream);
  }
  if (stage.pooling && stage.normalizing && LrnPoolTiles<T>::take(p, stage.shape)) {
    return launch_lrn_pool_bwd_planes<T>(p, stream);
  }
  if (stage.normalizing) {
    const LrnBackward<T> backward{r, dz, partial};
    if (stage.pooling) {
      const PooledGradient<T> gradient(dy, p.code, PoolShape(p));
      return launch_lrn_bwd<true>(stage.shape, p.lrn, backward, gradient, stage.aligned, stream);
    }
    return launch_lrn_bwd<true>(stage.shape, p.lrn, backward, PlainGradient<T>{dy}, stage.aligned, stream);
  }
  if (stage.pooling) {
    return pool_bwd(pool_params(p), partial, stream);
  }
  const ReluBackward<T> backward{r, dy, dz, partial};
  return stage.relu_vector<T>() > 1 ? launch_relu_bwd<T, kVector<T>>(p, backward, stream)
                                    : launch_relu_bwd<T, 1>(p, backward, stream);
}

}  // namespace

// ---------------------------------------------------------------- launchers

int64_t epilogue_bwd_partial_rows(const EpilogueParams& p) {
  if (p.batch * p.channels * p.height * p.width == 0) {
    return 0;
  }
  const Stage stage(p);
  return p.dtype == DType::f32 ? stage.rows<float>(p) : stage.rows<bf16>(p);  // float16 is as wide as bfloat16
}

int epilogue_bwd(const EpilogueParams& p, void* stream) {
  if (p.batch * p.channels * p.height * p.width == 0) {
    return cudaSuccess;
  }
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const Stage stage(p);
    const int error = launch_dz<T>(p, stage, stream);
    if (error != cudaSuccess || p.db_partial == nullptr) {
      return error;
    }
    return launch_add_rows<T>(p.db_partial, stage.rows<T>(p), p.channels, p.db, stream);
  });
}

}  // namespace alexnet_fast::cuda
