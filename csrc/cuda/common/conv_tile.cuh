// The part of a convolution kernel that is the same with and without pooling behind it: a block's tile of output pixels
// x output channels, its operands on their way through a ring of slabs in shared memory, and the product.
//
// A slab is 64 bytes of depth for the kRows + kColumns rows of both operands, and for kRows more with a mask. While one
// slab is multiplied kStages - 1 are in flight. One barrier for each slab is enough: behind it the slab has come for
// all threads, and all have read the slab before it, whose place the next copy takes.
//
//   for each slab: wait for my copies of it; mask what I copied; barrier; start copying slab + kStages - 1; multiply
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/common/conv_gather.cuh"
#include "cuda/common/warp_tile.cuh"

namespace alexnet_fast::cuda {

template <class Math_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct ConvTile {
  using Math = Math_;
  using T = typename Math::Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kRowsAtOnce = kThreads / kSlabChunks;  // rows of a slab that the block copies at once
  static_assert(kRows % kRowsAtOnce == 0 && kColumns % kRowsAtOnce == 0);
  using Product = WarpTile<Math, kWarpRows, kWarpColumns>;

  // Shared memory of one slab: A's rows, B's rows, the mask's rows.
  static constexpr int kBAt = kRows * kSlabBytes, kMaskAt = kBAt + kColumns * kSlabBytes;
  __host__ __device__ static constexpr int stage_bytes(bool mask) { return kMaskAt + (mask ? kRows * kSlabBytes : 0); }

  // Where the running warp's part of the tile begins.
  __device__ __forceinline__ static int warp_row() { return threadIdx.x / 32 / kWarpsAcross * kWarpRows; }
  __device__ __forceinline__ static int warp_column() { return threadIdx.x / 32 % kWarpsAcross * kWarpColumns; }

  __device__ __forceinline__ static void multiply(Product& product, const unsigned char* slab) {
    product.multiply_slabs(slab + warp_row() * kSlabBytes, slab + kBAt + warp_column() * kSlabBytes, threadIdx.x % 32);
  }
};

// The operands of one launch. `columns` and depth are those of one group.
struct ConvOperands {
  Gather gather;
  const char* x;
  const char* relu_output;  // null, or a tensor like x: see masked()
  const char* weight;       // (groups * columns, depth)
  int64_t columns;
  Tap step;  // from slab to slab
};

// What one thread copies of each slab: one chunk of depth, of every kRowsAtOnce-th row.
template <class Tile>
struct SlabReader {
  const Gather& gather;
  const Tap& step;
  const char* x;            // at the group's first channel
  const char* relu_output;  // the same
  const char* weight;       // this thread's chunk of its first weight row, in the next slab
  int64_t weight_stride;    // to its next one
  int32_t weight_rows;      // rows from its first one to the end of the weight
  int32_t left;             // chunks from its own one in the next slab to the end of the depth
  Tap tap;

  __device__ __forceinline__ SlabReader(const ConvOperands& in, int64_t group, int64_t first_column)
      : gather(in.gather), step(in.step) {
    const int64_t group_offset = group * gather.chunks * kChunkBytes;
    const int64_t row_bytes = int64_t{gather.depth()} * kChunkBytes;
    const int64_t row = first_column + own_row();
    x = in.x + group_offset;
    relu_output = in.relu_output == nullptr ? nullptr : in.relu_output + group_offset;
    weight = in.weight + (group * in.columns + row) * row_bytes + own_chunk() * kChunkBytes;
    weight_stride = Tile::kRowsAtOnce * row_bytes;
    weight_rows = static_cast<int32_t>(min(in.columns - row, int64_t{Tile::kColumns}));
    left = gather.depth() - own_chunk();
    tap = gather.tap(own_chunk());
  }

  static __device__ __forceinline__ int own_row() { return threadIdx.x / kSlabChunks; }
  static __device__ __forceinline__ int own_chunk() { return threadIdx.x % kSlabChunks; }
  // In the first of its rows; in the others, multiples of eight rows on, the swizzle is the same.
  static __device__ __forceinline__ int own_offset() { return slab_offset(own_row(), own_chunk()); }
  static_assert(Tile::kRowsAtOnce % 8 == 0);
  static constexpr int kPassBytes = Tile::kRowsAtOnce * kSlabBytes;
  static constexpr int kPasses = Tile::kRows / Tile::kRowsAtOnce;

  // Back to the first slab, for the next tile of pixels.
  __device__ __forceinline__ void rewind() {
    const int32_t all = gather.depth() - own_chunk();
    weight -= int64_t{all - left} * kChunkBytes;
    left = all;
    tap = gather.tap(own_chunk());
  }

  // Starts to copy the next slab. places: those of the tile's rows.
  __device__ __forceinline__ void fetch(unsigned char* slab, const RowPlace* places) {
    unsigned char* to = slab + own_offset();
    places += own_row();
    const bool exists = left > 0;
    if (gather.spread()) {
#pragma unroll 1
      for (int i = 0; i < kPasses; ++i) {
        int64_t offset = 0;
        const bool inside = exists && gather.inside_spread(places[i * Tile::kRowsAtOnce], tap, offset);
        copy(to + i * kPassBytes, x + offset, inside);
        if (relu_output != nullptr) {
          copy(to + i * kPassBytes + Tile::kMaskAt, relu_output + offset, inside);
        }
      }
    } else {
      copy_rows(to, places, x + tap.offset, exists);
      if (relu_output != nullptr) {
        copy_rows(to + Tile::kMaskAt, places, relu_output + tap.offset, exists);
      }
    }
    to += Tile::kBAt;
    const char* from = weight;
#pragma unroll
    for (int i = 0; i < Tile::kColumns / Tile::kRowsAtOnce; ++i) {
      copy(to + i * kPassBytes, from, exists & (i * Tile::kRowsAtOnce < weight_rows));
      from += weight_stride;
    }
    weight += kSlabBytes;
    left -= kSlabChunks;
    gather.advance(tap, step);
  }

  // Masks what this thread copied of a slab that has come.
  __device__ __forceinline__ void mask(unsigned char* slab) const {
    using T = typename Tile::T;
    constexpr int V = kVector<T>;
    if (relu_output != nullptr) {
      unsigned char* at = slab + own_offset();
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        T* dy = reinterpret_cast<T*>(at + i * kPassBytes);
        const T* y = reinterpret_cast<const T*>(at + i * kPassBytes + Tile::kMaskAt);
        store_shared(dy, masked(load<V>(dy), load<V>(y)));
      }
    }
  }

 private:
  static __device__ __forceinline__ void copy(unsigned char* to, const char* from, bool exists) {
    async_copy<kChunkBytes>(to, from, exists ? kChunkBytes : 0);
  }

  __device__ __forceinline__ void copy_rows(unsigned char* to, const RowPlace* places, const char* from,
                                            bool exists) const {
    // All places are loaded first, because a copy waits for the ordinary shared load before it.
    RowPlace place[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      place[i] = places[i * Tile::kRowsAtOnce];
    }
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      copy(to + i * kPassBytes, from + place[i].origin(), exists & gather.inside(place[i], tap));
    }
  }
};

}  // namespace alexnet_fast::cuda
