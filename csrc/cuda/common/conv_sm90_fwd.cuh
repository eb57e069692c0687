// What Hopper's forward convolutions share (csrc/cuda/sm90): the tile, the producer that asks for its operands, the
// products, and bias, ReLU and rounding on the way out of the registers. In which order a block takes its tiles, and
// where they go, is each kernel's own: its arguments are an Arguments with
//
//   for_tiles<Tile>(body)   body(place), place being a TilePlace, for each tile of the block in their order: producer
//                           and consumers go through the same ones.
#pragma once

#include "cuda/common/conv_sm90.cuh"
#include "cuda/common/mma.cuh"

namespace alexnet_fast::cuda::sm90 {

// kSteps: sixteens of depth of a stage that are multiplied. kHeight: sums of 64 rows that a consumer keeps.
template <class T_, int kSteps_, int kHeight_, int kColumns_, int kStages_, int kConsumers_ = sm90::kConsumers>
struct WgmmaTile {
  using T = T_;
  static constexpr int kSteps = kSteps_, kHeight = kHeight_, kColumns = kColumns_, kStages = kStages_;
  static constexpr int kConsumers = kConsumers_, kThreads = 128 * (1 + kConsumers);
  static constexpr int kDepth = 16 * kSteps;  // channels of a stage
  static constexpr int kRows = 64 * kHeight * kConsumers;
  static constexpr int kWeightsAt = kRows * kLine, kStageBytes = kWeightsAt + kColumns * kLine;
  static constexpr int kStagesBytes = kStages * kStageBytes;
};

struct Arguments {
  TensorMap x[kMaxGroups];       // (channels, width, height, images), of each group
  TensorMap weight;              // (channels, taps, columns, groups)
  Divider column_tiles, groups;  // a tile's axes, fastest first; then what for_tiles() says
  Walk walk;
  int32_t columns, kernel_h, kernel_w;
  int32_t slabs;     // of a tap
  const void* bias;  // (groups * columns) or null
};

struct TilePlace {
  int32_t group, column, pixel;  // the first ones
};

template <class Tile, class Args>
__device__ __forceinline__ void produce(const Args& args, unsigned char* stages, Ring<Tile::kStages>& ring) {
  RingPlace<Tile::kStages> place;
  args.template for_tiles<Tile>([&](const TilePlace& at) {
    const FirstPixel first = args.walk.first(at.pixel);
    for (int32_t r = 0; r < args.kernel_h; ++r) {
      for (int32_t s = 0; s < args.kernel_w; ++s) {
        for (int32_t slab = 0; slab < args.slabs; ++slab) {
          mbarrier_wait(ring.empty + place.stage, place.parity ^ 1);
          Mbarrier* const barrier = ring.full + place.stage;
          mbarrier_expect(barrier, Tile::kStageBytes);
          unsigned char* stage = stages + place.stage * Tile::kStageBytes;
          args.walk.load(stage, args.x[at.group], barrier, slab * Tile::kDepth, first, r, s);
          bulk_load(stage + Tile::kWeightsAt, args.weight, barrier,
                    {slab * Tile::kDepth, r * args.kernel_w + s, at.column, at.group});
          place.advance();
        }
      }
    }
  });
}

// A consumer's sums of the tile whose first stage is at `place`.
template <class Tile>
__device__ __forceinline__ void multiply(const Arguments& args, const unsigned char* stages, Ring<Tile::kStages>& ring,
                                         RingPlace<Tile::kStages>& place,
                                         float (&sums)[Tile::kHeight][Tile::kColumns / 2]) {
  const int consumer = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int32_t count = args.kernel_h * args.kernel_w * args.slabs;
  uint32_t read = 0;  // the stage before
  for (int32_t i = 0; i < count; ++i) {
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
                                          float (&added)[kSlab / 4]) {
  const T* bias = static_cast<const T*>(args.bias);
#pragma unroll
  for (int e = 0; e < kSlab / 4; ++e) {
    const int32_t column = first + 8 * (e / 2) + 2 * (threadIdx.x % 4) + e % 2;
    added[e] = bias != nullptr && column < args.columns ? to_float(bias[group * args.columns + column]) : 0;
  }
}

// A warp's 16 rows of a slab, the columns from `first` of `sums` on, with bias, into shared memory. Four matrices of 8
// x 8 at a time: rows 0 to 7 and 8 to 15 of one chunk of 8 columns, and of the next one. at(chunk): where row lane % 16
// of chunk + lane / 16 goes.
template <class T, int kColumns, class At>
__device__ __forceinline__ void store_sums(const float (&sums)[kColumns], int first, const float (&added)[kSlab / 4],
                                           bool relu, At&& at) {
#pragma unroll
  for (int chunk = 0; chunk < kSlab / 8; chunk += 2) {
    uint32_t four[4];
#pragma unroll
    for (int matrix = 0; matrix < 4; ++matrix) {
      const int e = 2 * (chunk + matrix / 2);
      float pair[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float sum = sums[first / 2 + 2 * e + 2 * (matrix % 2) + k] + added[e + k];
        pair[k] = relu && sum <= 0 ? 0 : sum;
      }
      four[matrix] = pack_pair<T>(pair[0], pair[1]);
    }
    store_matrix(four, at(chunk));
  }
}

// ---------------------------------------------------------------- on the host

template <class Tile>
int set_arguments(const Convolution& c, Arguments& args) {
  const Gather& g = c.gather;
  if (const int error = encode_image(args.x, g, c.groups, c.x, Tile::kRows)) {
    return error;
  }
  const uint64_t channels = channels_of(g), taps = uint64_t(g.kernel_h) * g.kernel_w;
  const uint64_t k = c.columns, groups = c.groups;
  args.column_tiles = Divider(ceil_div(c.columns, int64_t{Tile::kColumns}));
  args.groups = Divider(c.groups);
  args.walk = Walk(g);
  args.columns = static_cast<int32_t>(c.columns);
  args.kernel_h = g.kernel_h;
  args.kernel_w = g.kernel_w;
  args.slabs = ceil_div(channels_of(g), Tile::kDepth);
  args.bias = c.bias;
  return encode_tiled<4>(args.weight, c.weight, {channels, taps, k, groups},
                         {channels * 2, taps * channels * 2, k * taps * channels * 2},
                         {kSlab, 1, uint32_t(Tile::kColumns), 1});
}

// Estimated cycles of a tile for each tap: as long as its products or its bytes out of L2 take. No GPU has measured it.
constexpr double kL2Bytes = 40;  // a cycle and multiprocessor

inline double cycles(const Gather& g, int depth, int rows, int columns) {
  const int channels = channels_of(g);
  const double products = double(ceil_div(channels, depth)) * depth * rows * columns / 2048;
  const double bytes = channels * (rows + columns) * 2 / kL2Bytes;
  return products > bytes ? products : bytes;
}

inline bool takes(DType dtype, const Gather& g, int64_t columns, int32_t groups, const void* y) {
  return dtype != DType::f32 && columns % 8 == 0 && columns <= INT32_MAX / groups && aligned_16(y) && walks(g, groups);
}

}  // namespace alexnet_fast::cuda::sm90
