// What Hopper's forward convolutions share (csrc/cuda/sm90): the tile, the producer that asks for its operands, the
// products, and bias, ReLU and rounding on the way out of the registers. In which order a block takes its tiles, and
// where they go, is each kernel's own: its arguments are an Arguments with
//
//   for_tiles<Tile>(body)   body(place), place being a TilePlace, for each tile of the block in their order: producer
//                           and consumers go through the same ones.
//   place<Tile>(index)      the first of them, at blockIdx.x.
#pragma once

#include "cuda/common/conv_sm90.cuh"
#include "cuda/common/mma.cuh"

namespace alexnet_fast::cuda::sm90 {

// T: the operands' type, float for TF32. kSteps: of a stage's depth, 32 bytes each, that are multiplied. kHeight: sums
// of 64 rows that a consumer keeps.
template <class T_, int kSteps_, int kHeight_, int kColumns_, int kStages_, int kConsumers_ = sm90::kConsumers>
struct WgmmaTile {
  using T = T_;
  static constexpr int kSteps = kSteps_, kHeight = kHeight_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kConsumers = kConsumers_, kThreads = 128 * (1 + kConsumers);
  static constexpr int kDepth = kMmaDepth<T> * kSteps;  // channels of a stage
  static constexpr int kRows = 64 * kHeight * kConsumers;
  static constexpr int kWeightsAt = kRows * kLine, kStageBytes = kWeightsAt + kColumns * kLine;
  static constexpr int kStagesBytes = kStages * kStageBytes;
};

struct TilePlace {
  int32_t group, column, pixel;  // the first ones
  int32_t begin, end;            // steps of the depth: taps, of each its slabs
};

struct Arguments {
  TensorMap x[kMaxGroups];       // (channels, width, height, images), of each group
  TensorMap weight;              // (channels, taps, columns, groups)
  Divider column_tiles, groups;  // a tile's axes, fastest first; then what for_tiles() says
  Divider slabs, kernel_w;       // of a tap; taps of a row
  Walk walk;
  int32_t columns, steps;
  const void* bias;  // (groups * columns) or null

  // The columns of a tile, whose whole depth is taken. Returns the rest of its index.
  template <class Tile>
  __device__ __forceinline__ int64_t columns_of(int64_t index, TilePlace& at) const {
    int64_t column_tile, group;
    const int64_t rest = groups.divide(column_tiles.divide(index, column_tile), group);
    at.group = static_cast<int32_t>(group);
    at.column = static_cast<int32_t>(column_tile) * Tile::kColumns;
    at.begin = 0;
    at.end = steps;
    return rest;
  }
};

// What a kernel begins with. All that comes before the wait is done while the kernel before still runs. The weights of
// the block's first stages go as far as L2 there, asked for by the first row of tiles: into shared memory they might
// come too early, for nothing says here that the kernel before, an optimizer's or a conversion, did not write them.
template <class Tile, class Args>
__device__ __forceinline__ void begin(const Args& args, Ring<Tile::kStages>& ring) {
  if (threadIdx.x == 0) {
    const TilePlace at = args.template place<Tile>(blockIdx.x);
    const bool asks = blockIdx.x < args.column_tiles.divisor * args.groups.divisor;
    prefetch_map(args.x[at.group]);
    prefetch_map(args.weight);
#pragma unroll 1
    for (int32_t step = at.begin; asks && step < min(at.end, at.begin + Tile::kStages); ++step) {
      uint32_t slab;
      const int32_t tap = args.slabs.divide_small(step, slab);
      bulk_prefetch(args.weight, {static_cast<int32_t>(slab) * Tile::kDepth, tap, at.column, at.group});
    }
  }
  begin_ring(ring, Tile::kConsumers);
  dependency_wait();
  launch_dependents();
}

template <class Tile, class Args>
__device__ __forceinline__ void produce(const Args& args, unsigned char* stages, Ring<Tile::kStages>& ring) {
  RingPlace<Tile::kStages> place;
  args.template for_tiles<Tile>([&](const TilePlace& at) {
    const FirstPixel first = args.walk.first(at.pixel);
#pragma unroll 1
    for (int32_t step = at.begin; step < at.end; ++step) {
      uint32_t slab, s;
      const int32_t tap = args.slabs.divide_small(step, slab), r = args.kernel_w.divide_small(tap, s);
      const int32_t channel = static_cast<int32_t>(slab) * Tile::kDepth;
      mbarrier_wait(ring.empty + place.stage, place.parity ^ 1);
      Mbarrier* const barrier = ring.full + place.stage;
      mbarrier_expect(barrier, Tile::kStageBytes);
      unsigned char* stage = stages + place.stage * Tile::kStageBytes;
      args.walk.load(stage, args.x[at.group], barrier, channel, first, r, static_cast<int32_t>(s));
      bulk_load(stage + Tile::kWeightsAt, args.weight, barrier, {channel, tap, at.column, at.group});
      place.advance();
    }
  });
}

// A consumer's sums of the tile whose first stage is at `place`.
template <class Tile>
__device__ __forceinline__ void multiply(const TilePlace& at, const unsigned char* stages, Ring<Tile::kStages>& ring,
                                         RingPlace<Tile::kStages>& place,
                                         float (&sums)[Tile::kHeight][Tile::kColumns / 2]) {
  const int consumer = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  uint32_t read = 0;  // the stage before
  for (int32_t i = 0; i < at.end - at.begin; ++i) {
    mbarrier_wait(ring.full + place.stage, place.parity);
    const unsigned char* stage = stages + place.stage * Tile::kStageBytes;
    const uint64_t rows = matrix_descriptor(stage + consumer * 64 * Tile::kHeight * kLine);
    const uint64_t columns = matrix_descriptor(stage + Tile::kWeightsAt);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < Tile::kHeight; ++j) {
        wgmma<typename Tile::T, Tile::kColumns>(sums[j], rows + (j * 64 * kLine >> 4) + step * kDepthStep<Major::depth>,
                                                columns + step * kDepthStep<Major::depth>, (i | step) != 0);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    if (i != 0 && lane == 0) {
      mbarrier_arrive(ring.empty + read);
    }
    read = place.stage;
    place.advance();
  }
  wgmma_wait<0>();
  if (lane == 0) {
    mbarrier_arrive(ring.empty + read);
  }
#pragma unroll
  for (int i = 0; i < Tile::kHeight; ++i) {
    wgmma_done(sums[i]);
  }
}

// The bias of a lane's columns of a slab: `added`[2 c + e] is that of element e of the pair in chunk c of 8 columns.
template <class T>
__device__ __forceinline__ void load_bias(const Arguments& args, int32_t group, int32_t first,
                                          float (&added)[kSlab<T> / 4]) {
  const T* bias = static_cast<const T*>(args.bias);
#pragma unroll
  for (int e = 0; e < kSlab<T> / 4; ++e) {
    const int32_t column = first + 8 * (e / 2) + 2 * (threadIdx.x % 4) + e % 2;
    added[e] = bias != nullptr && column < args.columns ? to_float(bias[group * args.columns + column]) : 0;
  }
}

// A warp's 16 rows of a slab, the columns from `first` of `sums` on, with bias, into shared memory. at(row, column):
// where an element of them goes. 16 bits go in four matrices of 8 x 8 at a time: rows 0 to 7 and 8 to 15 of one chunk
// of 8 columns, and of the next one. float32 goes in pairs; lanes of odd rows take the chunks in another order, so that
// no two of half a warp, which have the same two chunks of 16 bytes in neighbouring rows, meet in a bank.
template <class T, int kColumns, class At>
__device__ __forceinline__ void store_sums(const float (&sums)[kColumns], int first, const float (&added)[kSlab<T> / 4],
                                           bool relu, At&& at) {
  const int lane = threadIdx.x % 32;
  const auto result = [&](int chunk, int half, int k) {
    const float sum = sums[first / 2 + 4 * chunk + 2 * half + k] + added[2 * chunk + k];
    return relu && sum <= 0 ? 0 : sum;
  };
  if constexpr (sizeof(T) == 4) {
    const bool odd = lane / 4 % 2;
#pragma unroll
    for (int chunk = 0; chunk < kSlab<T> / 8; ++chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float pair[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          pair[k] = odd ? result(chunk ^ 2, half, k) : result(chunk, half, k);
        }
        store_shared(at(lane / 4 + 8 * half, 8 * (odd ? chunk ^ 2 : chunk) + 2 * (lane % 4)), pack<T>(pair));
      }
    }
  } else {
#pragma unroll
    for (int chunk = 0; chunk < kSlab<T> / 8; chunk += 2) {
      uint32_t four[4];
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int c = chunk + matrix / 2;
        four[matrix] = pack_pair<T>(result(c, matrix % 2, 0), result(c, matrix % 2, 1));
      }
      store_matrix(four, at(lane % 16, 8 * (chunk | lane / 16)));
    }
  }
}

// ---------------------------------------------------------------- on the host

template <class Tile>
int set_arguments(const Convolution& c, Arguments& args) {
  const Gather& g = c.gather;
  if (const int error = encode_image(args.x, c.dtype, g, c.groups, c.x, Tile::kRows)) {
    return error;
  }
  const uint64_t channels = channels_of(g, c.dtype), bytes = element_bytes(c.dtype),
                 taps = uint64_t(g.kernel_h) * g.kernel_w;
  const uint64_t k = c.columns, groups = c.groups;
  args.column_tiles = Divider(ceil_div(c.columns, int64_t{Tile::kColumns}));
  args.groups = Divider(c.groups);
  args.slabs = Divider(ceil_div(channels_of(g, c.dtype), Tile::kDepth));
  args.kernel_w = Divider(g.kernel_w);
  args.walk = Walk(g);
  args.columns = static_cast<int32_t>(c.columns);
  args.steps = static_cast<int32_t>(taps * args.slabs.divisor);
  args.bias = c.bias;
  return encode_tiled<4>(args.weight, operand_elements(c.dtype), c.weight, {channels, taps, k, groups},
                         {channels * bytes, taps * channels * bytes, k * taps * channels * bytes},
                         {kSlab<typename Tile::T>, 1, uint32_t(Tile::kColumns), 1});
}

// Estimated cycles of a tile for each tap: as long as its products or its bytes out of L2 take. No GPU has measured it.
constexpr double kL2Bytes = 40;  // a cycle and multiprocessor

inline double cycles(const Gather& g, DType dtype, int depth, int rows, int columns) {
  const int channels = channels_of(g, dtype), element = static_cast<int>(element_bytes(dtype));
  const double products = double(ceil_div(channels, depth)) * depth * rows * columns * element / 4096;
  const double bytes = channels * (rows + columns) * element / kL2Bytes;
  return products > bytes ? products : bytes;
}

// float32 only by TF32, where that is allowed; of y a group's columns in whole chunks of 16 bytes.
inline bool takes(DType dtype, bool allow_tf32, const Gather& g, int64_t columns, int32_t groups, const void* y) {
  return (dtype != DType::f32 || allow_tf32) && columns * element_bytes(dtype) % 16 == 0 &&
         columns <= INT32_MAX / groups && aligned_16(y) && walks(g, groups);
}

}  // namespace alexnet_fast::cuda::sm90
