// How the pointwise kernels lie over a tensor.
//
// A block is a rectangle: threadIdx.x counts vectors of V channels, threadIdx.y counts units, which are pixels or
// strips of pixels. A thread stays with one vector of channels and goes through units blockIdx.x, blockIdx.x +
// gridDim.x, ... of its place in the rectangle, so it can hold that vector's bias, or sum up its gradient. NHWC: a
// unit's channels are neighbours in memory, and so are units: a block covers one stretch of memory. NCHW: a block has
// one channel, and threadIdx.y runs along the pixels.
#pragma once

#include "cuda/common/launch.cuh"

namespace alexnet_fast::cuda {

// Kernels are bounded by (kThreads, 1): without the 1, ptxas cuts registers to the next step of occupancy, and spills
// some. LRN's forward walk through channels takes (kThreads, 2): left alone it grows to 153 registers, and then one
// block has the multiprocessor for itself. (Backward, at 140, would spill.)
constexpr int kThreads = 256;

struct Units {
  int64_t count;
  int32_t vectors;  // of channels

  __device__ __forceinline__ int32_t vector() const {
    return (blockIdx.y + gridDim.y * blockIdx.z) * blockDim.x + threadIdx.x;
  }
  __device__ __forceinline__ int64_t first() const { return first(threadIdx.y); }
  __device__ __forceinline__ int64_t first(uint32_t y) const { return int64_t{blockIdx.x} * blockDim.y + y; }
  __device__ __forceinline__ int64_t stride() const { return int64_t{gridDim.x} * blockDim.y; }
};

struct UnitGrid {
  Units units;
  dim3 grid, block;

  static constexpr int64_t kUnitsPerThread = 4;

  // At most `items` blocks along units. Large tensors give each thread several units, which share what is done once a
  // thread; others get blocks enough for every multiprocessor first.
  UnitGrid(int64_t count, int64_t vectors, bool channels_last, int64_t items = INT32_MAX,
           int64_t units_per_thread = kUnitsPerThread)
      : units{count, static_cast<int32_t>(vectors)} {
    const int64_t tiles = channels_last ? ceil_div<int64_t>(vectors, kThreads) : vectors;
    const int64_t x = ceil_div(vectors, tiles);
    const int64_t y = kThreads / x;
    block = dim3(x, y);
    constexpr int64_t kEnoughBlocks = 2048;
    const int64_t rectangles = ceil_div(count, y);
    const int64_t per_thread = std::clamp<int64_t>(rectangles * tiles / kEnoughBlocks, 1, units_per_thread);
    constexpr int64_t kMost = 65535;  // blocks in y and z
    grid = dim3(std::min(ceil_div(rectangles, per_thread), items), std::min(tiles, kMost), ceil_div(tiles, kMost));
  }
};

}  // namespace alexnet_fast::cuda
