// Hopper's convolution, bias and ReLU: implicit GEMM by wgmma, whose operands bulk copies bring (compute
// capability 9.0).
//
//   y[pixel][k] = relu(bias[k] + sum over (r, s, c) of x[pixel's window at (r, s)][c] * weight[k][r][s][c])
//
// Rows are output pixels of the whole batch, columns the output channels of one group, the depth is R S C/groups with
// the channel fastest. A block of three warpgroups stays on its multiprocessor and takes every gridDim-th tile:
//
//   producer    one thread. For each tap (r, s) and slab of 64 channels it waits until a stage of the ring is free, and
//               asks for the tile's pixels (im2col mode: they run across rows and images, and the padding is zeros) and
//               for the tile's weights at that tap.
//   consumers   two warpgroups, each with half of the tile's rows. They multiply a stage when its bytes have landed,
//               and give it back when the next stage's products are under way. At the end the sums get bias and ReLU in
//               registers and leave by bulk stores, 16 rows x 64 columns at a time, through 2 KB of shared memory for
//               each warp; these stores cut off what lies past the last pixel or channel. Meanwhile the loads for the
//               next tile are under way.
//
// Where a group's channels are no multiple of 64, that costs shared memory but no products: copies fill the slab up
// with zeros, which never cross the bus, and the consumers multiply only the sixteens of depth that hold channels. So
// 48 channels in a group take three of four steps.
//
// Without groups, the column tiles of the same pixels come one after the other, so that the blocks that work at a time
// share these pixels in L2.
//
// The speed it should have is computed, not measured: nothing of this file has run on a card. A multiprocessor makes
// 2048 multiply-adds a cycle; a step of a tile of rows x columns with 64 in depth takes rows columns / 32 cycles, and
// (rows + columns) 128 bytes out of L2: 53 bytes a cycle for 128 x 192, 64 for 128 x 128, 48 for 256 x 128, 37 for 256
// x 192. L2 is taken to give each 40, a guess. Shared memory gives 128 a cycle, of which wgmma reads 85 (192 columns),
// 96 (128) or 128 (64). Times at 1.44 GHz, where 132 multiprocessors make the 779 TFLOP/s of a large product on an
// H100, in whole waves of tiles, launches and the first loads not counted; the rate is of useful products (conv1 folds
// 363 to 432).
//
//                       batch 1             batch 128                                      batch 1024
//                       tile     tiles  us  tile     tiles waves  L2 MB wgmma us  us TF/s  tile     waves   us TF/s
//   conv1, folded       128x64      24   3  256x64    1513  11.5    418       38  58  312  256x64    91.7  442  326
//   conv2               128x64      18  11  256x192    365   2.8    523       80  80  717  256x192   22.1  613  748
//   conv3               128x64      12  12  256x128    255   1.9    338       38  46  623  256x192   10.2  317  725
//   conv4               128x64       8  23  256x128    170   1.3    451       77  92  415  256x128   10.2  507  604
//   conv5               128x64       8  15  256x128    170   1.3    301       51  61  415  256x128   10.2  338  604
//   2012 conv1, folded  128x64      48   3  256x128   1513  11.5    502       58  69  390  256x128   91.7  530  407
//   2012 conv2          128x64      24   8  256x128    730   5.5    673       80  96  597  256x128   44.2  720  637
//   2012 conv3          128x64      12  15  256x128    255   1.9    451       51  61  623  256x192   10.2  422  725
//   2012 conv4          128x64      12  12  256x192    170   1.3    263       58  58  498  256x192   10.2  317  725
//   2012 conv5          128x64       8  12  256x128    170   1.3    226       38  46  415  256x128   10.2  253  604
//
// cuDNN was measured at 96, 53, 61 and 48 us for conv2 to conv5 at batch 128, and 251, 67, 117 and 67 us for those of
// 2012. Where this falls short of it, at the two waves of conv4 and conv5, the last wave's tiles should be split in
// depth; then a cluster's two blocks could share the weights (multicast: 29 bytes a cycle for 256 x 192), and a second
// set of sums could hide the end of a tile.
#include "cuda/common/conv_sm90_fwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda::sm90 {
namespace {

constexpr int kPieceRows = 16, kPiece = kPieceRows * kLine;  // what a warp stores at once
constexpr int kPieces = 2;                                   // of a warp, one being written while the other is read

// ---------------------------------------------------------------- kernel

struct ReluArguments : Arguments {
  TensorMap y;  // (columns, groups, pixels)
  int64_t tiles;
  int32_t pixels;
  bool relu;

  // Every gridDim-th tile: column tiles first, then groups, then rows.
  template <class Tile, class Body>
  __device__ __forceinline__ void for_tiles(Body&& body) const {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      int64_t column_tile, group;
      const int64_t rest = column_tiles.divide(tile, column_tile);
      const int64_t row_tile = groups.divide(rest, group);
      body(TilePlace{static_cast<int32_t>(group), static_cast<int32_t>(column_tile) * Tile::kColumns,
                     static_cast<int32_t>(row_tile) * Tile::kRows});
    }
  }
};

template <class Tile>
__device__ __forceinline__ void consume(const ReluArguments& args, unsigned char* stages, Ring<Tile::kStages>& ring) {
  using T = typename Tile::T;
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  unsigned char* const pieces = stages + Tile::kStagesBytes + (4 * consumer + warp) * kPieces * kPiece;
  RingPlace<Tile::kStages> place;
  int piece = 0;
  float sums[Tile::kHeight][Tile::kColumns / 2];
  args.template for_tiles<Tile>([&](const TilePlace& at) {
    multiply<Tile>(args, stages, ring, place, sums);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; j += kSlab) {
      if (at.column + j >= args.columns) {
        break;
      }
      float added[kSlab / 4];
      load_bias<T>(args, at.group, at.column + j, added);
#pragma unroll
      for (int i = 0; i < Tile::kHeight; ++i) {
        const int32_t pixel = at.pixel + (consumer * Tile::kHeight + i) * 64 + warp * kPieceRows;
        if (pixel >= args.pixels) {
          break;
        }
        unsigned char* const to = pieces + piece * kPiece;
        piece = (piece + 1) % kPieces;
        if (lane == 0) {
          bulk_wait_read<kPieces - 1>();
        }
        __syncwarp();
        const int row = lane % 16, swizzle = lane / 16 ^ lane % 8;  // as the bulk store wants it
        store_sums<T>(sums[i], j, added, args.relu,
                      [&](int chunk) { return to + row * kLine + (chunk ^ swizzle) * 16; });
        async_proxy_fence();
        __syncwarp();
        if (lane == 0) {
          bulk_store(args.y, to, {at.column + j, at.group, pixel});
          bulk_commit();
        }
      }
    }
  });
  if (lane == 0) {
    bulk_wait_read<0>();  // shared memory is the block's until then
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    conv_relu_fwd(const ALEXNET_FAST_GRID_CONSTANT ReluArguments args) {
  unsigned char* const stages = dynamic_shared_at<kAlignment>();
  ALEXNET_FAST_SHARED(Ring<Tile::kStages>, ring);
  begin_ring(ring);
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Tile>(args, stages, ring);
    }
  } else {
    more_registers<kConsumerRegisters>();
    consume<Tile>(args, stages, ring);
  }
}

// ---------------------------------------------------------------- tiles

template <class Tile>
int launch_tile(const Convolution& c, int multiprocessors, void* stream) {
  const Gather& g = c.gather;
  ReluArguments args{};
  if (const int error = set_arguments<Tile>(c, args)) {
    return error;
  }
  const uint64_t k = c.columns, groups = c.groups;
  if (const int error = encode_tiled<3>(args.y, c.y, {k, groups, uint64_t(g.pixels)}, {k * 2, k * groups * 2},
                                        {kSlab, 1, kPieceRows})) {
    return error;
  }
  args.tiles = ceil_div(g.pixels, int64_t{Tile::kRows}) * args.column_tiles.divisor * c.groups;
  args.pixels = static_cast<int32_t>(g.pixels);
  args.relu = c.relu;
  const int64_t blocks = args.tiles < multiprocessors ? args.tiles : multiprocessors;
  constexpr size_t kShared = Tile::kStagesBytes + 4 * Tile::kConsumers * kPieces * kPiece + kAlignment;
  return launch_on<90, conv_relu_fwd<Tile>>(dim3(blocks), dim3(Tile::kThreads), kShared, stream, args);
}

struct TileChoice {
  int depth, rows, columns;  // channels of a stage
  int (*launch)(const Convolution&, int, void*);
};

template <class Tile>
constexpr TileChoice choice() {
  return {Tile::kDepth, Tile::kRows, Tile::kColumns, launch_tile<Tile>};
}

// As many stages as shared memory holds. Stages of 48 channels are for groups of 48, as AlexNet's first layer has when
// it is folded and the second where there are two towers.
template <class T>
constexpr TileChoice kTiles[] = {
    choice<WgmmaTile<T, 4, 2, 192, 3>>(), choice<WgmmaTile<T, 4, 1, 192, 4>>(), choice<WgmmaTile<T, 4, 2, 128, 4>>(),
    choice<WgmmaTile<T, 4, 1, 128, 6>>(), choice<WgmmaTile<T, 4, 2, 64, 4>>(),  choice<WgmmaTile<T, 4, 1, 64, 8>>(),
    choice<WgmmaTile<T, 3, 2, 128, 4>>(), choice<WgmmaTile<T, 3, 1, 128, 6>>(), choice<WgmmaTile<T, 3, 2, 64, 4>>(),
};

// The tile with the least estimated time, in whole waves of tiles.
double waves_cycles(const TileChoice& tile, const Convolution& c, int multiprocessors) {
  const int64_t tiles =
      ceil_div(c.gather.pixels, int64_t{tile.rows}) * ceil_div(c.columns, int64_t{tile.columns}) * c.groups;
  return static_cast<double>(ceil_div(tiles, int64_t{multiprocessors})) *
         cycles(c.gather, tile.depth, tile.rows, tile.columns);
}

}  // namespace

// ---------------------------------------------------------------- launchers

int convolve(const Convolution& c, void* stream) {
  int multiprocessors = 0;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  if (!takes(c.dtype, c.gather, c.columns, c.groups, c.y) || c.relu_output != nullptr) {
    return cudaErrorNotSupported;
  }
  const auto& tiles = c.dtype == DType::f16 ? kTiles<f16> : kTiles<bf16>;
  if (c.tile < 0 || c.tile > static_cast<int32_t>(std::size(tiles))) {
    return cudaErrorInvalidValue;
  }
  if (c.gather.pixels == 0) {
    return cudaSuccess;
  }
  const TileChoice* best = c.tile != 0 ? &tiles[c.tile - 1] : &tiles[0];
  for (const TileChoice& tile : tiles) {
    if (c.tile == 0 && waves_cycles(tile, c, multiprocessors) < waves_cycles(*best, c, multiprocessors)) {
      best = &tile;
    }
  }
  return best->launch(c, multiprocessors, stream);
}

int64_t conv_relu_fwd_workspace_bytes(const ConvParams& p) { return forward_workspace_bytes(p); }

int conv_relu_fwd(const ConvParams& p, void* stream) {
  int multiprocessors;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  if (!covers(p)) {
    return cudaErrorInvalidValue;
  }
  if (!takes(p.dtype, input_gather(p, input_fold(p)), p.out_channels / p.groups, p.groups, p.y)) {
    return cudaErrorNotSupported;
  }
  Convolution convolution;
  const int error = prepare(p, stream, convolution);
  return error != cudaSuccess ? error : sm90::convolve(convolution, stream);
}

}  // namespace alexnet_fast::cuda::sm90
