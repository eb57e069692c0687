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
//                       batch 128                                      batch 1024
//                       tile     tiles waves  L2 MB wgmma us  us TF/s  tile     waves   us TF/s
//   conv1, folded       256x64    1513  11.5    418       38  58  312  256x64    91.7  442  326
//   conv2               256x192    365   2.8    523       80  80  717  256x192   22.1  613  748
//   conv3               256x128    255   1.9    338       38  46  623  256x192   10.2  317  725
//   conv4               256x128    170   1.3    451       77  92  415  256x128   10.2  507  604
//   conv5               256x128    170   1.3    301       51  61  415  256x128   10.2  338  604
//   2012 conv1, folded  256x128   1513  11.5    502       58  69  390  256x128   91.7  530  407
//   2012 conv2          256x128    730   5.5    673       80  96  597  256x128   44.2  720  637
//   2012 conv3          256x128    255   1.9    451       51  61  623  256x192   10.2  422  725
//   2012 conv4          256x192    170   1.3    263       58  58  498  256x192   10.2  317  725
//   2012 conv5          256x128    170   1.3    226       38  46  415  256x128   10.2  253  604
//
// conv1 goes by conv_first_fwd.cu, which brings each pixel once instead of nine times: 30 and 232 us, and 59 and 463
// that of 2012.
//
// Where that leaves multiprocessors idle, the depth is cut into pieces: a block multiplies one piece of a tile
// (conv_split_fwd), and another kernel adds up what the pieces gave, in their order, with bias and ReLU
// (conv_add_splits). The least of these is taken, in cycles: rounds of whole tiles; or rounds of pieces, 2000 for each
// kernel more (a guess), and 8 bytes an output and piece, there and back, through L2; or as many whole rounds as there
// are of tiles of 256 x 128, and pieces of those that are left. The last one is taken of
//
//                 batch 128                            batch 1024
//                 left  pieces  MB  us instead of  TF/s  left  pieces  us instead of  TF/s
//   conv4           38       3  29  68         92   563    32       4 480        507   638
//   conv5           38       3  29  48         61   536    32       4 322        338   634
//   2012 conv5      38       3  29  37         46   513    32       4 244        253   629
//
// With few images all is cut, into pieces of tiles of 128 x 64. At batch 1, MB being those of the pieces, and the
// weights', which come out of memory:
//
//                       steps  tiles  us whole  pieces  steps each  blocks   MB  weights MB  us
//   conv1, folded           9     24       2.9                                          0.1  2.9
//   conv2                  25     18      10.7       7           4     126  7.8         0.6  4.1
//   conv3                  27     12      11.5       9           3     108  4.7         1.3  3.3
//   conv4                  54      8      23.0      14           4     112  4.8         1.8  3.7
//   conv5                  36      8      15.4      12           3      96  4.2         1.2  3.2
//   2012 conv1, folded      9     48       2.9                                          0.1  2.9
//   2012 conv2             25     24       8.0       5           5     120  7.5         0.6  4.0
//   2012 conv3             36     12      15.4       9           4     108  4.7         1.8  3.7
//   2012 conv4             27     12      11.5       9           3     108  4.7         1.3  3.3
//   2012 conv5             27      8      11.5      14           2     112  4.8         0.9  2.9
//
// So five layers take 17 us where they took 64. At batch 8 conv3 to conv5 are still cut, at batch 32 none is. That the
// last block of a tile adds it up would save the second launch, and cost more: conv4's 14 pieces of 32 KB are 8 us for
// one multiprocessor, and 0.3 us for all. Blocks of a cluster could add through their shared memory, but 8 at most.
//
// Kernels are launched early (common/dependent.cuh): barriers, tensor maps, and into L2 the weights of a block's first
// stages, which at batch 1 are all of them, come while the kernel before still runs.
//
// float32 goes the same way by TF32, where torch allows it: a line of 128 bytes is 32 channels, and a product takes as
// many cycles for 8 of depth as for 16. So there are twice the steps, of the same cycles and bytes each. By the same
// estimates, in us, y's bytes not counted:
//
//                conv1 conv2 conv3 conv4 conv5   2012: conv1 conv2 conv3 conv4 conv5
//   batch 1          4     6     4     5     4             5     6     5     4     4
//   batch 128      115   160    92   129    89           138   192   123   115    68
//   batch 1024     883  1227   634   952   637          1060  1440   845   634   480
//
// Where 24 channels of a slab are multiplied, in conv1 and 2012's first two, copies bring 32: a sixth more bytes than
// counted (48 channels in two slabs, the second one's last 8 not there). Copies round to the nearest number that TF32
// has (common/tma.cuh), and an operand errs by 2^-11 of itself at most. So an output errs by no more than about 2^-10
// of the sum of its products' absolute values, and what float32 sums err by. Products alone would cut operands off,
// towards zero and by up to 2^-10.
//
// cuDNN was measured, in 16 bits, at 96, 53, 61 and 48 us for conv2 to conv5 at batch 128, and 251, 67, 117 and 67 us
// for those of 2012. Where this falls short of it, in conv4, a cluster's two blocks could share the weights (multicast:
// 40 bytes a cycle for 256 x 128, which L2 is taken to give), and a second set of sums could hide the end of a tile.
#include "cuda/common/conv_first_sm90.cuh"
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
  const void* mask;  // null, or a tensor like y, which is 0 where that is not positive

  // Column tiles first, then groups, then rows.
  template <class Tile>
  __device__ __forceinline__ TilePlace place(int64_t tile) const {
    TilePlace at;
    at.pixel = static_cast<int32_t>(columns_of<Tile>(tile, at)) * Tile::kRows;
    return at;
  }

  // Every gridDim-th tile.
  template <class Tile, class Body>
  __device__ __forceinline__ void for_tiles(Body&& body) const {
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      body(place<Tile>(tile));
    }
  }
};

// Where an element of a piece lies, as the bulk store wants it.
template <class T>
__device__ __forceinline__ T* piece_at(unsigned char* piece, int row, int column) {
  constexpr int V = kVector<T>;
  return reinterpret_cast<T*>(piece + row * kLine + (column / V ^ row % 8) * 16) + column % V;
}

// Of a piece what the mask does not let pass becomes 0, 16 bytes a lane at a time. NaN lets pass, as in PyTorch.
template <class T>
__device__ __forceinline__ void mask_piece(const ReluArguments& args, int32_t group, int32_t column, int32_t pixel,
                                           unsigned char* piece) {
  constexpr int V = kVector<T>, kChunks = kLine / 16, kRows = 32 / kChunks;  // rows at once
  // Loads under way: beside the sums of its largest tile float32 has no registers for more.
  [[maybe_unused]] constexpr int kUnroll = sizeof(T) == 4 ? 2 : 4;
  const int64_t channels = args.groups.divisor * args.columns;
  const int first = threadIdx.x % 32 / kChunks, within = threadIdx.x % kChunks * V;
  const T* mask = static_cast<const T*>(args.mask) + int64_t{group} * args.columns + column + within;
  if (column + within >= args.columns) {
    return;
  }
#pragma unroll kUnroll
  for (int row = first; row < kPieceRows; row += kRows) {
    if (pixel + row < args.pixels) {
      const Pack<T, V> open = load<V>(mask + (pixel + row) * channels);
      T* const at = piece_at<T>(piece, row, within);
      float values[V];
      unpack(load<V>(at), values);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        values[e] = element(open, e) <= 0 ? 0 : values[e];
      }
      store_shared_16(at, pack<T>(values));
    }
  }
}

// kMasked: with the mask instead of bias and ReLU.
template <class Tile, bool kMasked>
__device__ __forceinline__ void consume(const ReluArguments& args, unsigned char* stages, Ring<Tile::kStages>& ring) {
  using T = typename Tile::T;
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  unsigned char* const pieces = stages + Tile::kStagesBytes + (4 * consumer + warp) * kPieces * kPiece;
  RingPlace<Tile::kStages> place;
  int piece = 0;
  float sums[Tile::kHeight][Tile::kColumns / 2];
  args.template for_tiles<Tile>([&](const TilePlace& at) {
    multiply<Tile>(at, stages, ring, place, sums);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; j += kSlab<T>) {
      if (at.column + j >= args.columns) {
        break;
      }
      float added[kSlab<T> / 4] = {};
      if constexpr (!kMasked) {
        load_bias<T>(args, at.group, at.column + j, added);
      }
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
        store_sums<T>(sums[i], j, added, !kMasked && args.relu,
                      [&](int row, int column) { return piece_at<T>(to, row, column); });
        if constexpr (kMasked) {
          __syncwarp();
          mask_piece<T>(args, at.group, at.column + j, pixel, to);
        }
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

template <class Tile, bool kMasked>
__device__ __forceinline__ void convolve_tiles(const ReluArguments& args) {
  unsigned char* const stages = dynamic_shared_at<kAlignment>();
  ALEXNET_FAST_SHARED(Ring<Tile::kStages>, ring);
  begin<Tile>(args, ring);
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Tile>(args, stages, ring);
    }
  } else {
    more_registers<kConsumerRegisters>();
    consume<Tile, kMasked>(args, stages, ring);
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    conv_relu_fwd(const ALEXNET_FAST_GRID_CONSTANT ReluArguments args) {
  convolve_tiles<Tile, false>(args);
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    conv_masked_gradient(const ALEXNET_FAST_GRID_CONSTANT ReluArguments args) {
  convolve_tiles<Tile, true>(args);
}

// ---------------------------------------------------------------- the depth in pieces

struct SplitArguments : Arguments {
  float* partial;                     // (splits, pixels, groups * columns)
  int32_t first, pixels, steps_each;  // pixels from the first one on

  // As above; blockIdx.y is the piece.
  template <class Tile>
  __device__ __forceinline__ TilePlace place(int64_t tile) const {
    TilePlace at;
    at.pixel = first + static_cast<int32_t>(columns_of<Tile>(tile, at)) * Tile::kRows;
    at.begin = static_cast<int32_t>(blockIdx.y) * steps_each;
    at.end = min(at.begin + steps_each, steps);
    return at;
  }

  template <class Tile, class Body>
  __device__ __forceinline__ void for_tiles(Body&& body) const {
    body(place<Tile>(blockIdx.x));
  }
};

// A block multiplies one tile's piece. Of the smaller tile two fit a multiprocessor, so that the next layer's can begin
// beside it.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kHeight == 1 ? 2 : 1)
    conv_split_fwd(const ALEXNET_FAST_GRID_CONSTANT SplitArguments args) {
  unsigned char* const stages = dynamic_shared_at<kAlignment>();
  ALEXNET_FAST_SHARED(Ring<Tile::kStages>, ring);
  begin<Tile>(args, ring);
  if (threadIdx.x < 128) {
    if constexpr (Tile::kHeight > 1) {
      fewer_registers<kProducerRegisters>();
    }
    if (threadIdx.x == 0) {
      produce<Tile>(args, stages, ring);
    }
    return;
  }
  if constexpr (Tile::kHeight > 1) {
    more_registers<kConsumerRegisters>();
  }
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const TilePlace at = args.place<Tile>(blockIdx.x);
  RingPlace<Tile::kStages> place;
  float sums[Tile::kHeight][Tile::kColumns / 2];
  multiply<Tile>(at, stages, ring, place, sums);
  const int64_t channels = args.groups.divisor * args.columns;
  float* const partial = args.partial + blockIdx.y * args.pixels * channels + int64_t{at.group} * args.columns;
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 8; ++j) {
    const int32_t column = at.column + 8 * j + 2 * (lane % 4);
    if (column >= args.columns) {
      break;
    }
#pragma unroll
    for (int i = 0; i < 2 * Tile::kHeight; ++i) {
      const int32_t row = (consumer * Tile::kHeight + i / 2) * 64 + warp * 16 + i % 2 * 8 + lane / 4;
      const int32_t pixel = at.pixel - args.first + row;
      if (pixel < args.pixels) {
        const float* pair = sums[i / 2] + 4 * j + 2 * (i % 2);
        const float both[2] = {pair[0], pair[1]};
        store(partial + pixel * channels + column, pack<float>(both));
      }
    }
  }
}

constexpr int kAddThreads = 128, kAdded = 4, kLoads = 8;  // a thread's elements, and pieces under way

template <class T>
struct AddArguments {
  const float* partial;  // (splits, count)
  const T* bias;         // (channels) or null
  T* y;
  int64_t count;
  int32_t splits;
  Divider channels;
  bool relu;
  const T* mask;  // as ReluArguments::mask
};

// y from the pieces, which are added in their order.
template <class T>
__global__ void __launch_bounds__(kAddThreads) conv_add_splits(const AddArguments<T> args) {
  dependency_wait();
  launch_dependents();
  const int64_t at = (int64_t{blockIdx.x} * kAddThreads + threadIdx.x) * kAdded;
  if (at >= args.count) {
    return;
  }
  Pack<T, kAdded> mask{};
  if (args.mask != nullptr) {
    mask = load<kAdded>(args.mask + at);
  }
  float sums[kAdded] = {};
#pragma unroll 1
  for (int32_t first = 0; first < args.splits; first += kLoads) {
    // Past the last one that again, which is not added: a branch would let loads wait for one another.
    Pack<float, kAdded> pieces[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
      pieces[k] = load<kAdded>(args.partial + min(first + k, args.splits - 1) * args.count + at);
    }
#pragma unroll
    for (int k = 0; k < kLoads; ++k) {
#pragma unroll
      for (int i = 0; i < kAdded; ++i) {
        sums[i] += first + k < args.splits ? element(pieces[k], i) : 0;
      }
    }
  }
  int64_t channel;
  args.channels.divide(at, channel);
#pragma unroll
  for (int i = 0; i < kAdded; ++i) {
    sums[i] += args.bias == nullptr ? 0 : to_float(args.bias[channel + i]);
    sums[i] = (args.relu && sums[i] <= 0) || (args.mask != nullptr && element(mask, i) <= 0) ? 0 : sums[i];
  }
  store(args.y + at, pack<T>(sums));
}

// The depth of the pixels from the first one on, in so many pieces of so many steps.
struct Split {
  int64_t first, pieces, steps_each;
  int tile;  // of kSplitTiles
};

template <class Tile>
int launch_split(const Convolution& c, const Split& split, void* stream) {
  using T = typename Tile::T;
  SplitArguments args{};
  if (const int error = set_arguments<Tile>(c, args)) {
    return error;
  }
  const int64_t pixels = c.gather.pixels - split.first, channels = c.columns * c.groups;
  args.partial = c.partial;
  args.first = static_cast<int32_t>(split.first);
  args.pixels = static_cast<int32_t>(pixels);
  args.steps_each = static_cast<int32_t>(split.steps_each);
  const dim3 grid(ceil_div(pixels, int64_t{Tile::kRows}) * args.column_tiles.divisor * c.groups, split.pieces);
  if (const int error = launch_early<90, conv_split_fwd<Tile>>(grid, dim3(Tile::kThreads),
                                                               Tile::kStagesBytes + kAlignment, stream, args)) {
    return error;
  }
  const AddArguments<T> add{c.partial,
                            static_cast<const T*>(c.bias),
                            static_cast<T*>(c.y) + split.first * channels,
                            pixels * channels,
                            static_cast<int32_t>(split.pieces),
                            Divider(channels),
                            c.relu,
                            c.mask == nullptr ? nullptr : static_cast<const T*>(c.mask) + split.first * channels};
  return launch_early<90, conv_add_splits<T>>(dim3(ceil_div(add.count, int64_t{kAddThreads * kAdded})),
                                              dim3(kAddThreads), 0, stream, add);
}

// ---------------------------------------------------------------- tiles

// The first rows of tiles.
template <class Tile>
int launch_tile(const Convolution& c, int64_t rows, int multiprocessors, void* stream) {
  const Gather& g = c.gather;
  ReluArguments args{};
  if (const int error = set_arguments<Tile>(c, args)) {
    return error;
  }
  const uint64_t k = c.columns, groups = c.groups, bytes = element_bytes(c.dtype);
  if (const int error = encode_tiled<3>(args.y, stored_elements(c.dtype), c.y, {k, groups, uint64_t(g.pixels)},
                                        {k * bytes, k * groups * bytes}, {kSlab<typename Tile::T>, 1, kPieceRows})) {
    return error;
  }
  args.tiles = rows * args.column_tiles.divisor * c.groups;
  args.pixels = static_cast<int32_t>(g.pixels);
  args.relu = c.relu;
  args.mask = c.mask;
  const int64_t blocks = args.tiles < multiprocessors ? args.tiles : multiprocessors;
  constexpr size_t kShared = Tile::kStagesBytes + 4 * Tile::kConsumers * kPieces * kPiece + kAlignment;
  const auto launch = c.mask == nullptr ? launch_early<90, conv_relu_fwd<Tile>, ReluArguments>
                                        : launch_early<90, conv_masked_gradient<Tile>, ReluArguments>;
  return launch(dim3(blocks), dim3(Tile::kThreads), kShared, stream, args);
}

struct TileShape {
  int depth, rows, columns;  // channels of a stage

  int64_t rows_of(int64_t pixels) const { return ceil_div(pixels, int64_t{rows}); }
  int64_t tiles_of_row(const Convolution& c) const { return ceil_div(c.columns, int64_t{columns}) * c.groups; }
  // Estimated, of a tile's whole depth.
  double tile_cycles(const Convolution& c) const {
    return double(c.gather.kernel_h) * c.gather.kernel_w * cycles(c.gather, c.dtype, depth, rows, columns);
  }
};

struct TileChoice : TileShape {
  int (*launch)(const Convolution&, int64_t, int, void*);
};

template <class Tile>
constexpr TileChoice choice() {
  return {{Tile::kDepth, Tile::kRows, Tile::kColumns}, launch_tile<Tile>};
}

// As many stages as shared memory holds. Stages of 48 channels, in float32 24, are for groups of 48, as AlexNet's first
// layer has when it is folded and the second where there are two towers.
template <class T>
constexpr TileChoice kTiles[] = {
    choice<WgmmaTile<T, 4, 2, 192, 3>>(), choice<WgmmaTile<T, 4, 1, 192, 4>>(), choice<WgmmaTile<T, 4, 2, 128, 4>>(),
    choice<WgmmaTile<T, 4, 1, 128, 6>>(), choice<WgmmaTile<T, 4, 2, 64, 4>>(),  choice<WgmmaTile<T, 4, 1, 64, 8>>(),
    choice<WgmmaTile<T, 3, 2, 128, 4>>(), choice<WgmmaTile<T, 3, 1, 128, 6>>(), choice<WgmmaTile<T, 3, 2, 64, 4>>(),
};

constexpr int kTileCount = std::size(kTiles<bf16>);

const TileChoice (&tiles_of(DType dtype)) [kTileCount] {
  return dtype == DType::f32 ? kTiles<float> : dtype == DType::f16 ? kTiles<f16> : kTiles<bf16>;
}

// Estimated time, in whole rounds of tiles.
double rounds_cycles(const TileShape& tile, const Convolution& c, int64_t rows, int64_t multiprocessors) {
  return static_cast<double>(ceil_div(rows * tile.tiles_of_row(c), multiprocessors)) * tile.tile_cycles(c);
}

// ---------------------------------------------------------------- pieces

struct SplitChoice : TileShape {
  int (*launch)(const Convolution&, const Split&, void*);
};

template <class Tile>
constexpr SplitChoice split_choice() {
  return {{Tile::kDepth, Tile::kRows, Tile::kColumns}, launch_split<Tile>};
}

template <class T>
constexpr SplitChoice kSplitTiles[] = {split_choice<WgmmaTile<T, 4, 1, 64, 4>>(),
                                       split_choice<WgmmaTile<T, 4, 2, 128, 4>>()};
const SplitChoice (&split_tiles_of(DType dtype))[2] {
  return dtype == DType::f32 ? kSplitTiles<float> : dtype == DType::f16 ? kSplitTiles<f16> : kSplitTiles<bf16>;
}
constexpr int kWholeTile = 2;  // of kTiles, before pieces: 256 x 128

// What may be asked for beside the rows of kTiles: all of the depth in pieces, and that of the lower half of the tiles;
// then conv_first_fwd.cu's tiles.
constexpr int32_t kAllInPieces = kTileCount + 1, kHalfInPieces = kAllInPieces + 1;

// What is estimated to take the least time. The sums' rounding depends on it, hence on shapes alone: not on the card.
Split choose_split(const Convolution& c) {
  constexpr int64_t kMultiprocessors = 132;
  constexpr double kLaunch = 2000;  // of one kernel more, and its first loads: a guess
  const int64_t pixels = c.gather.pixels, taps = int64_t{c.gather.kernel_h} * c.gather.kernel_w;
  const TileChoice& whole = tiles_of(c.dtype)[kWholeTile];
  Split best{pixels, 1, 0, 0};
  double least = INFINITY;
  for (const TileChoice& tile : tiles_of(c.dtype)) {
    least = std::min(least, rounds_cycles(tile, c, tile.rows_of(pixels), kMultiprocessors));
  }
  least = std::min(least, plan_first(c, {}, kMultiprocessors, 0).cycles);
  const auto consider = [&](int tile_number, int64_t rows, bool asked_for) {
    const SplitChoice& tile = split_tiles_of(c.dtype)[tile_number];
    const int64_t steps = taps * ceil_div(channels_of(c.gather, c.dtype), tile.depth), first = rows * whole.rows;
    const int64_t tiles = tile.rows_of(pixels - first) * tile.tiles_of_row(c);
    const double before = rows == 0 ? 0 : rounds_cycles(whole, c, rows, kMultiprocessors) + kLaunch;
    const double step = tile.tile_cycles(c) / steps;
    const double bytes = 8.0 * (pixels - first) * c.columns * c.groups;  // of a piece, there and back
    if (asked_for) {
      best = {first, 1, steps, tile_number};
      least = INFINITY;
    }
    for (int64_t pieces = 2; pieces <= steps && tiles * (pieces - 1) < 2 * kMultiprocessors; ++pieces) {
      const int64_t each = ceil_div(steps, pieces);
      if (ceil_div(steps, each) != pieces) {
        continue;
      }
      const double time = before + ceil_div(tiles * pieces, kMultiprocessors) * each * step + kLaunch +
                          pieces * bytes / (kL2Bytes * kMultiprocessors);
      if (time < least) {
        best = {first, pieces, each, tile_number};
        least = time;
      }
    }
  };
  if (c.tile == kHalfInPieces) {
    consider(1, whole.rows_of(pixels) / 2, true);
  } else {
    consider(0, 0, c.tile == kAllInPieces);
  }
  // Of the tiles that make no whole round the depth alone.
  const int64_t each_row = whole.tiles_of_row(c);
  const int64_t rows = whole.rows_of(pixels) * each_row / kMultiprocessors * kMultiprocessors / each_row;
  for (int tile = 0; c.tile == 0 && rows > 0 && rows < whole.rows_of(pixels) && tile < 2; ++tile) {
    consider(tile, rows, false);
  }
  return best;
}

}  // namespace

// ---------------------------------------------------------------- launchers

int64_t partial_bytes(const Convolution& c) {
  const Split split = choose_split(c);
  return split.pieces * (c.gather.pixels - split.first) * c.columns * c.groups * 4;
}

int convolve(const Convolution& c, void* stream) {
  int multiprocessors = 0;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  if (!takes(c.dtype, c.allow_tf32, c.gather, c.columns, c.groups, c.y) || c.relu_output != nullptr ||
      !aligned_16(c.mask)) {
    return cudaErrorNotSupported;
  }
  const int32_t first_tile = std::max(c.tile - kHalfInPieces, 0);
  const bool cut = c.partial != nullptr && first_tile == 0 && (c.tile == 0 || c.tile >= kAllInPieces);
  if (c.tile < 0 || first_tile > kFirstTiles || (first_tile == 0 && c.tile > (cut ? kHalfInPieces : kTileCount))) {
    return cudaErrorInvalidValue;
  }
  const int64_t pixels = c.gather.pixels;
  const Split split = cut ? choose_split(c) : Split{pixels, 1, 0, 0};
  if (split.first > 0) {
    const bool any = c.tile == 0 && split.first == pixels;
    // It masks nothing. That choose_split() counts on it all the same keeps room for pieces the same with a mask.
    const bool tries_first = (any || first_tile != 0) && c.mask == nullptr;
    const FirstPlan first = tries_first ? plan_first(c, {}, multiprocessors, first_tile) : FirstPlan{};
    if (first_tile != 0 && first.tile == 0) {
      return cudaErrorNotSupported;
    }
    const auto& tiles = tiles_of(c.dtype);
    const auto time = [&](const TileChoice& of) { return rounds_cycles(of, c, of.rows_of(pixels), multiprocessors); };
    const TileChoice* best = &tiles[split.first < pixels ? kWholeTile : any || first_tile != 0 ? 0 : c.tile - 1];
    for (const TileChoice& tile : tiles) {
      best = any && time(tile) < time(*best) ? &tile : best;
    }
    if (first.tile != 0 && (first_tile != 0 || first.cycles < time(*best))) {
      return launch_first(c, {}, first, multiprocessors, stream);
    }
    if (const int error = best->launch(c, best->rows_of(split.first), multiprocessors, stream)) {
      return error;
    }
  }
  if (split.first == pixels) {
    return cudaSuccess;
  }
  return split_tiles_of(c.dtype)[split.tile].launch(c, split, stream);
}

int64_t conv_relu_fwd_workspace_bytes(const ConvParams& p) {
  return covers(p) ? forward_workspace_bytes(p) + partial_bytes(shape_of(p, input_fold(p))) : 0;
}

int conv_relu_fwd(const ConvParams& p, void* stream) {
  int multiprocessors;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  if (!covers(p)) {
    return cudaErrorInvalidValue;
  }
  if (!takes(p.dtype, p.allow_tf32, input_gather(p, input_fold(p)), p.out_channels / p.groups, p.groups, p.y)) {
    return cudaErrorNotSupported;
  }
  Convolution convolution;
  const int error = prepare(p, stream, convolution);
  convolution.partial = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + forward_workspace_bytes(p));
  return error != cudaSuccess ? error : sm90::convolve(convolution, stream);
}

}  // namespace alexnet_fast::cuda::sm90
