// Convolution, bias and ReLU as one matrix product that never writes its left operand down (implicit GEMM).
//
//   y[pixel][k] = relu(bias[k] + sum over (r, s, c) of x[pixel's window at (r, s)][c] * weight[k][r][s][c])
//
// Rows are output pixels of the whole batch, columns the output channels of one group, the depth is R S C/groups with
// the channel fastest (conv_gather.cuh). A block computes one tile, its warps side by side (conv_tile.cuh), adds the
// bias, applies the ReLU, and passes the tile through shared memory, so that each thread writes 16 bytes of
// neighbouring channels. The input gradient is this kernel too: on dy, masked, with the weight transposed
// (conv_relu_bwd.cu).
//
// Bytes: x, w and y cross the memory bus about once; x is read R S times out of L2. Shared memory carries, for each
// multiply-add of a tile of rows x columns whose warps own wr x wc, with e bytes an element,
//
//   e (1/wr + 1/wc) to the registers and e (1/rows + 1/columns) from L2
//
// bytes. In 16 bits: .094 for 128 x 128, .099 for 128 x 192, .141 for 128 x 64, .188 for 64 x 64. A multiprocessor of
// an H200 can make 2048 16-bit multiply-adds and move 128 bytes of shared memory a cycle, so shared memory holds these
// tiles to 67, 63, 44 and 33% of the full rate. On Hopper only wgmma, whose operands stay in shared memory, reaches the
// full rate; mma.sync is taken to reach 62% of it.
// Predictions, not measurements: 50 to 60% of the card's matrix rate for AlexNet's second to fifth layers (57.3, 28.7,
// 38.3 and 25.5 GFLOP at batch 128) where the two large tiles fill the card; 75% on sm_80, half as fast with the same
// shared memory. The last round of tiles costs what launch_best() counts: 92, 96, 85 and 85% of the card is busy.
//
// Considered and not taken: slabs of 128 bytes (half the barriers, but half the stages in the same memory); a table of
// offsets for each step in depth instead of Tap (one more load to wait for before each copy); row places in registers
// (four for each row, while now one 16-byte shared load for each copy is hidden behind the products).
#include "cuda/common/conv.cuh"
#include "cuda/common/conv_tile.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

// ---------------------------------------------------------------- kernel

template <class T>
struct ConvArguments {
  ConvOperands in;
  Divider column_tiles, groups;  // a block's axes, fastest first; then row tiles
  const T* bias;
  T* y;
  bool relu;
  bool vector_store;  // 16-byte stores: y is aligned, a group's channels are whole chunks
};

// The finished tile in shared memory. Its rows are eight elements longer, so that the eight rows a warp writes at a
// time begin in different banks.
template <class Tile>
constexpr int kPitch = Tile::kColumns + 8;

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv_relu_fwd(ConvArguments<typename Tile::T> args) {
  using T = typename Tile::T;
  constexpr int V = kVector<T>;
  const ConvOperands& in = args.in;
  int64_t column_tile, group;
  const int64_t rest = args.column_tiles.divide(blockIdx.x, column_tile);
  const int64_t first_pixel = args.groups.divide(rest, group) * Tile::kRows;
  const int64_t first_column = column_tile * Tile::kColumns;
  const int lane = threadIdx.x % 32;

  const int stage_bytes = Tile::stage_bytes(in.relu_output != nullptr);
  unsigned char* slabs = dynamic_shared();
  ALEXNET_FAST_SHARED(RowPlace[Tile::kRows], places);
  for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
    places[row] = in.gather.place(first_pixel + row, first_pixel + row < in.gather.pixels);
  }
  __syncthreads();

  SlabReader<Tile> reader(in, group, first_column);
  const int count = ceil_div(in.gather.depth(), kSlabChunks);
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    if (stage < count) {
      reader.fetch(slabs + stage * stage_bytes, places);
    }
    async_commit();
  }
  typename Tile::Product product;
  product.clear();
  unsigned char* current = slabs;
  unsigned char* next = slabs + (Tile::kStages - 1) * stage_bytes;
  unsigned char* const end = slabs + Tile::kStages * stage_bytes;
  for (int slab = 0; slab < count; ++slab) {
    async_wait<Tile::kStages - 2>();
    reader.mask(current);
    __syncthreads();
    if (slab + Tile::kStages - 1 < count) {
      reader.fetch(next, places);
    }
    async_commit();
    Tile::multiply(product, current);
    current = current + stage_bytes == end ? slabs : current + stage_bytes;
    next = next + stage_bytes == end ? slabs : next + stage_bytes;
  }

  if (args.bias != nullptr) {
    const T* bias = args.bias + group * in.columns;
    product.add_to_columns(lane, [&](int column) {
      const int64_t c = first_column + Tile::warp_column() + column;
      return c < in.columns ? to_float(bias[c]) : 0.0f;
    });
  }
  __syncthreads();  // every warp has read the last slab
  T* tile = reinterpret_cast<T*>(slabs);
  product.for_pairs(lane, [&](int row, int column, float first, float second) {
    const float pair[2] = {args.relu && first <= 0 ? 0 : first, args.relu && second <= 0 ? 0 : second};
    store_shared(tile + (Tile::warp_row() + row) * kPitch<Tile> + Tile::warp_column() + column, pack<T>(pair));
  });
  __syncthreads();
  T* y = args.y + group * in.columns + first_column;
  const int64_t pixels = in.gather.pixels - first_pixel, columns = in.columns - first_column;
  const int64_t stride = args.groups.divisor * in.columns;
  constexpr int kChunks = Tile::kColumns / V;
#pragma unroll 4
  for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += Tile::kThreads) {
    const int row = i / kChunks, column = i % kChunks * V;
    if (row >= pixels || column >= columns) {
      continue;
    }
    const T* from = tile + row * kPitch<Tile> + column;
    T* to = y + (first_pixel + row) * stride + column;
    if (args.vector_store) {
      store(to, load<V>(from));
    } else {
      for (int e = 0; e < V && column + e < columns; ++e) {
        to[e] = from[e];
      }
    }
  }
}

// ---------------------------------------------------------------- tiles

template <class Tile>
int launch_tile(const Convolution& c, void* stream) {
  using T = typename Tile::T;
  const int64_t column_tiles = ceil_div(c.columns, int64_t{Tile::kColumns});
  const int64_t row_tiles = ceil_div(c.gather.pixels, int64_t{Tile::kRows});
  ConvArguments<T> args{};
  args.in.gather = c.gather;
  args.in = {c.gather,
             static_cast<const char*>(c.x),
             static_cast<const char*>(c.relu_output),
             static_cast<const char*>(c.weight),
             c.columns,
             c.gather.tap(kSlabChunks)};
  args.column_tiles = Divider(column_tiles);
  args.groups = Divider(c.groups);
  args.bias = static_cast<const T*>(c.bias);
  args.y = static_cast<T*>(c.y);
  args.relu = c.relu;
  args.vector_store = c.columns % kVector<T> == 0 && aligned_16(c.y);
  const size_t ring = size_t{Tile::kStages} * Tile::stage_bytes(c.relu_output != nullptr);
  const size_t staging = size_t{Tile::kRows} * kPitch<Tile> * sizeof(T);
  return launch<conv_relu_fwd<Tile>>(dim3(row_tiles * column_tiles * c.groups), dim3(Tile::kThreads),
                                     ring > staging ? ring : staging, stream, args);
}

struct TileChoice {
  int rows, columns;
  double shared_bytes;  // a multiply-add, 16-bit elements, as counted above
  int (*launch)(const Convolution&, void*);
};

template <class Tile>
constexpr TileChoice choice() {
  return {Tile::kRows, Tile::kColumns,
          2 * (1.0 / Tile::kWarpRows + 1.0 / Tile::kWarpColumns + 1.0 / Tile::kRows + 1.0 / Tile::kColumns),
          launch_tile<Tile>};
}

// rows, columns; rows and columns of a warp; stages. With a mask the largest ring takes 98 KB: sm_86 and sm_89
// allow 99.
template <class Math>
constexpr TileChoice kHalfTiles[] = {
    choice<ConvTile<Math, 128, 128, 64, 64, 4>>(),
    choice<ConvTile<Math, 128, 192, 64, 48, 3>>(),
    choice<ConvTile<Math, 128, 64, 64, 32, 4>>(),
    choice<ConvTile<Math, 64, 64, 32, 32, 4>>(),
};
constexpr TileChoice kTf32Tiles[] = {
    choice<ConvTile<TensorCores<float>, 128, 128, 64, 64, 4>>(),
    choice<ConvTile<TensorCores<float>, 64, 64, 32, 32, 4>>(),
};
constexpr TileChoice kFloatTiles[] = {
    choice<ConvTile<MultiplyAdd, 128, 64, 64, 32, 4>>(),
};

// The tile with the least estimated time: multiprocessors work in rounds, and a tile takes its full time even where it
// reaches beyond the output.
// No GPU has measured the estimate. Results do not depend on the choice: each output's sum runs through the depth in
// the same order.
constexpr int kMultiprocessors = 132;

template <size_t kCount>
int launch_best(const TileChoice (&tiles)[kCount], const Convolution& c, void* stream) {
  const TileChoice* best = nullptr;
  double least = 0;
  for (const TileChoice& tile : tiles) {
    const int64_t count =
        ceil_div(c.gather.pixels, int64_t{tile.rows}) * ceil_div(c.columns, int64_t{tile.columns}) * c.groups;
    const double time =
        static_cast<double>(ceil_div(count, int64_t{kMultiprocessors})) * tile.rows * tile.columns * tile.shared_bytes;
    if (best == nullptr || time < least) {
      best = &tile;
      least = time;
    }
  }
  if (c.tile != 0) {
    if (c.tile < 0 || c.tile > static_cast<int32_t>(kCount)) {
      return cudaErrorInvalidValue;
    }
    best = &tiles[c.tile - 1];
  }
  return best->launch(c, stream);
}

}  // namespace

// ---------------------------------------------------------------- launchers

int convolve(const Convolution& c, void* stream) {
  if (c.gather.pixels == 0) {
    return cudaSuccess;
  }
  switch (c.dtype) {
    case DType::f16:
      return launch_best(kHalfTiles<TensorCores<f16>>, c, stream);
    case DType::bf16:
      return launch_best(kHalfTiles<TensorCores<bf16>>, c, stream);
    case DType::f32:
      return c.allow_tf32 ? launch_best(kTf32Tiles, c, stream) : launch_best(kFloatTiles, c, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

int64_t conv_relu_fwd_workspace_bytes(const ConvParams& p) { return forward_workspace_bytes(p); }

int conv_relu_fwd(const ConvParams& p, void* stream) {
  Convolution convolution;
  const int error = prepare(p, stream, convolution);
  return error != cudaSuccess ? error : convolve(convolution, stream);
}

}  // namespace alexnet_fast::cuda
