// A whole stage in one kernel: convolution, bias, ReLU and max-pooling. The convolution's output is never written to
// memory: shared memory holds the part of it that pooling still needs.
//
// A block owns one image and one tile of output channels. It goes through the image's output pixels from top to bottom,
// kRows at a time, as conv_relu_fwd.cu goes through the batch's; copies for the next tile are in flight while one ends.
// A finished tile, with bias and ReLU, goes into a ring of pixels in shared memory; then every row of the pooled output
// whose last convolution row is there is computed and written, with its codes. Windows that overlap find earlier rows
// where they were left: no convolution output is computed twice.
//
// The ring holds kRows + kernel_h * width - 1 pixels: when a tile begins, the first row that pooling still needs lies
// less than kernel_h rows above it. AlexNet's first stage, 55 wide, tiles of 128 x 64: 292 pixels of 64 channels, 42 KB
// in bfloat16 beside 48 KB for four slabs. Tiles end with the image: 3025 pixels fill 24 tiles of 128 to 98%, 729 fill
// 6 to 95%, 169 fill 3 of 64 to 88%.
//
// Bytes, first stage at batch 128: 40 MB in (folded), 12 MB out, 6 MB of codes. Two kernels write and read 50 MB more
// each way, 2.7 times as much. Pooling takes about 420 instructions for eight channels of a window: 19 thousand cycles
// of a multiprocessor's issue slots for an image, beside 66 thousand for its 84 million multiply-adds at 62% of the
// full rate; the second block on a multiprocessor can overlap the two. Predictions, not measurements: 35 to 40% of the
// card's matrix rate for the first stage, whose tile shared memory holds to 44%, and a gain over two kernels by the
// pass that it saves; for the second and the fifth, conv_relu_fwd.cu's larger tiles and a separate pass may win.
//
// With LRN, or where the ring does not fit, the launcher runs conv_relu_fwd and then epilogue_fwd over its output. LRN
// inside would need all channels of a pixel in one block: for 128 rows of 256 half of a multiprocessor's registers.
#include "cuda/common/conv.cuh"
#include "cuda/common/conv_tile.cuh"
#include "cuda/common/pool.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

// ---------------------------------------------------------------- kernel

template <class T>
struct StageArguments {
  ConvOperands in;
  Divider column_tiles, groups;  // a block's axes, fastest first; then images
  const T* bias;
  T* y;
  uint8_t* code;  // or null
  Window pool;
  int32_t height, width;  // of the convolution's output
  int32_t out_height, out_width;
  int32_t ring_pixels;
  bool vector_store;  // y and code are aligned, a group's channels are whole chunks
};

// A pixel in the ring: eight elements longer than the tile is wide, so that neighbouring pixels begin in different
// banks.
template <class Tile>
constexpr int kPitch = Tile::kColumns + 8;

// Writes rows [begin, end) of the pooled output. tile_begin: the newest tile's first pixel, which lies at ring_begin.
template <class Tile>
__device__ __forceinline__ void pool_rows(const StageArguments<typename Tile::T>& args, const typename Tile::T* ring,
                                          int begin, int end, int tile_begin, int ring_begin, int64_t image,
                                          int64_t first_channel, int64_t columns) {
  using T = typename Tile::T;
  constexpr int V = kVector<T>, kChunks = Tile::kColumns / V;
  const int64_t channels = args.groups.divisor * args.in.columns;
  const int items = (end - begin) * args.out_width * kChunks;
  for (int item = threadIdx.x; item < items; item += Tile::kThreads) {
    const int column = item % kChunks * V;
    if (column >= columns) {
      continue;
    }
    const int i = begin + item / kChunks / args.out_width, j = item / kChunks % args.out_width;
    const int top = i * args.pool.stride_h - args.pool.pad_h, left = j * args.pool.stride_w - args.pool.pad_w;
    const int h_end = min(top + args.pool.kernel_h, args.height), w_end = min(left + args.pool.kernel_w, args.width);
    Best best[V];
#pragma unroll
    for (Best& b : best) {
      b = {-INFINITY, 0};
    }
    for (int h = max(top, 0); h < h_end; ++h) {
      for (int w = max(left, 0); w < w_end; ++w) {
        int at = ring_begin + h * args.width + w - tile_begin;
        at += at < 0 ? args.ring_pixels : at >= args.ring_pixels ? -args.ring_pixels : 0;
        const auto chunk = load<V>(ring + at * kPitch<Tile> + column);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          best[e].take(element(chunk, e), (h - top) * args.pool.kernel_w + w - left);
        }
      }
    }
    float values[V];
    int32_t codes[V];
#pragma unroll
    for (int e = 0; e < V; ++e) {
      values[e] = best[e].value;
      codes[e] = best[e].value <= 0 ? kClosed : best[e].place;
    }
    const int64_t to = ((image * args.out_height + i) * args.out_width + j) * channels + first_channel + column;
    if (args.vector_store) {
      store(args.y + to, pack<T>(values));
      if (args.code != nullptr) {
        store(args.code + to, pack_bytes(codes));
      }
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (column + e < columns) {
          from_float(values[e], args.y[to + e]);
          if (args.code != nullptr) {
            args.code[to + e] = static_cast<uint8_t>(codes[e]);
          }
        }
      }
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv_stage_fwd(StageArguments<typename Tile::T> args) {
  using T = typename Tile::T;
  const ConvOperands& in = args.in;
  int64_t column_tile, group;
  const int64_t rest = args.column_tiles.divide(blockIdx.x, column_tile);
  const int64_t image = args.groups.divide(rest, group);
  const int64_t first_column = column_tile * Tile::kColumns;
  const int lane = threadIdx.x % 32;

  constexpr int kStageBytes = Tile::stage_bytes(false);
  unsigned char* slabs = dynamic_shared();
  T* ring = reinterpret_cast<T*>(slabs + Tile::kStages * kStageBytes);
  ALEXNET_FAST_SHARED(RowPlace[2][Tile::kRows], places);

  const int pixels = args.height * args.width;
  const int tiles = ceil_div(pixels, Tile::kRows), count = ceil_div(in.gather.depth(), kSlabChunks);
  const auto find_places = [&](int tile) {
    for (int row = threadIdx.x; row < Tile::kRows; row += Tile::kThreads) {
      const int pixel = tile * Tile::kRows + row;
      places[tile % 2][row] = in.gather.place(image * pixels + pixel, pixel < pixels);
    }
  };

  // The slab to fetch next. Its tile's places were found before the barrier that came last.
  SlabReader<Tile> reader(in, group, first_column);
  int next_tile = 0, next_slab = 0, next_stage = 0;
  const auto fetch = [&] {
    if (next_tile < tiles) {
      reader.fetch(slabs + next_stage * kStageBytes, places[next_tile % 2]);
      next_stage = next_stage + 1 == Tile::kStages ? 0 : next_stage + 1;
      if (++next_slab == count) {
        next_slab = 0;
        reader.rewind();
        find_places(++next_tile);
      }
    }
    async_commit();
  };
  find_places(0);
#pragma unroll 1
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
    __syncthreads();
    fetch();
  }

  int stage = 0, pooled = 0, ring_begin = 0;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    typename Tile::Product product;
    product.clear();
#pragma unroll 1
    for (int slab = 0; slab < count; ++slab) {
      async_wait<Tile::kStages - 2>();
      __syncthreads();
      fetch();
      Tile::multiply(product, slabs + stage * kStageBytes);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    }
    if (args.bias != nullptr) {
      const T* bias = args.bias + group * in.columns;
      product.add_to_columns(lane, [&](int column) {
        const int64_t c = first_column + Tile::warp_column() + column;
        return c < in.columns ? to_float(bias[c]) : 0.0f;
      });
    }
    const int tile_begin = tile * Tile::kRows;
    product.for_pairs(lane, [&](int row, int column, float first, float second) {
      row += Tile::warp_row();
      const int place = ring_begin + row;
      const float pair[2] = {first <= 0 ? 0 : first, second <= 0 ? 0 : second};
      if (tile_begin + row < pixels) {
        store_shared(ring + (place >= args.ring_pixels ? place - args.ring_pixels : place) * kPitch<Tile> +
                         Tile::warp_column() + column,
                     pack<T>(pair));
      }
    });
    __syncthreads();
    // Pooled rows whose windows end within the convolution rows that are complete.
    const int rows = min(tile_begin + Tile::kRows, pixels) / args.width;
    const int free = rows + args.pool.pad_h - args.pool.kernel_h;
    const int ready = rows == args.height ? args.out_height
                      : free < 0          ? 0
                                          : min(free / args.pool.stride_h + 1, args.out_height);
    if (ready > pooled) {
      pool_rows<Tile>(args, ring, pooled, ready, tile_begin, ring_begin, image, group * in.columns + first_column,
                      in.columns - first_column);
      pooled = ready;
    }
    ring_begin += Tile::kRows;
    ring_begin -= ring_begin >= args.ring_pixels ? args.ring_pixels : 0;
  }
}

// ---------------------------------------------------------------- tiles

template <class Tile>
int64_t ring_pixels(const StageParams& p) {
  const int64_t needed = Tile::kRows + int64_t{p.pool.kernel_h} * p.conv.out_width - 1;
  const int64_t image = round_up(p.conv.out_height * p.conv.out_width, Tile::kRows);
  return needed < image ? needed : image;
}

template <class Tile>
int64_t shared_bytes(const StageParams& p) {
  return int64_t{Tile::kStages} * Tile::stage_bytes(false) +
         ring_pixels<Tile>(p) * kPitch<Tile> * static_cast<int64_t>(sizeof(typename Tile::T));
}

template <class Tile>
int launch_stage(const StageParams& p, const Convolution& c, void* stream) {
  using T = typename Tile::T;
  const int64_t column_tiles = ceil_div(c.columns, int64_t{Tile::kColumns});
  StageArguments<T> args{};
  args.in = {c.gather,  static_cast<const char*>(c.x), nullptr, static_cast<const char*>(c.weight),
             c.columns, c.gather.tap(kSlabChunks)};
  args.column_tiles = Divider(column_tiles);
  args.groups = Divider(c.groups);
  args.bias = static_cast<const T*>(c.bias);
  args.y = static_cast<T*>(p.pooled);
  args.code = p.code;
  args.pool = p.pool;
  args.height = static_cast<int32_t>(p.conv.out_height);
  args.width = static_cast<int32_t>(p.conv.out_width);
  args.out_height = static_cast<int32_t>(p.pooled_height);
  args.out_width = static_cast<int32_t>(p.pooled_width);
  args.ring_pixels = static_cast<int32_t>(ring_pixels<Tile>(p));
  args.vector_store = c.columns % kVector<T> == 0 && aligned_16(p.pooled) && aligned_16(p.code);
  return launch<conv_stage_fwd<Tile>>(dim3(p.conv.batch * column_tiles * c.groups), dim3(Tile::kThreads),
                                      shared_bytes<Tile>(p), stream, args);
}

struct StageTileChoice {
  int rows, columns;
  int64_t (*shared_bytes)(const StageParams&);
  int (*launch)(const StageParams&, const Convolution&, void*);
};

template <class Tile>
constexpr StageTileChoice stage_choice() {
  return {Tile::kRows, Tile::kColumns, shared_bytes<Tile>, launch_stage<Tile>};
}

template <class Math>
constexpr StageTileChoice kHalfTiles[] = {
    stage_choice<ConvTile<Math, 128, 64, 64, 32, 4>>(),
    stage_choice<ConvTile<Math, 64, 128, 32, 64, 4>>(),
};
template <class Math>
constexpr StageTileChoice kFloatTiles[] = {stage_choice<ConvTile<Math, 64, 64, 32, 32, 3>>()};

// What sm_86 and sm_89 give a block, less the places of two tiles.
constexpr int64_t kSharedLimit = (99 - 4) * 1024;

struct StageTiles {
  const StageTileChoice* rows;
  int count;
};

StageTiles tiles_of(const ConvParams& p) {
  switch (p.dtype) {
    case DType::f16:
      return {kHalfTiles<TensorCores<f16>>, 2};
    case DType::bf16:
      return {kHalfTiles<TensorCores<bf16>>, 2};
    case DType::f32:
      return {p.allow_tf32 ? kFloatTiles<TensorCores<float>> : kFloatTiles<MultiplyAdd>, 1};
    default:
      return {nullptr, 0};
  }
}

// The tile that is asked for, or else the one that takes the fewest multiply-adds, counted in whole rounds over the
// multiprocessors. Null if that one, or none of them, takes the stage: with LRN, without pooling, or with rows too wide
// for shared memory.
const StageTileChoice* choose(const StageParams& p) {
  constexpr int64_t kMultiprocessors = 132;
  if (p.lrn.size != 0 || p.pool.kernel_h == 0 || p.conv.out_height * p.conv.out_width > INT32_MAX / 2) {
    return nullptr;
  }
  const StageTiles tiles = tiles_of(p.conv);
  const StageTileChoice* best = nullptr;
  int64_t least = 0;
  for (int i = 0; i < tiles.count; ++i) {
    if (p.conv.tile != 0 && p.conv.tile != i + 1) {
      continue;
    }
    const StageTileChoice& tile = tiles.rows[i];
    const int64_t column_tiles = ceil_div(p.conv.out_channels / p.conv.groups, int64_t{tile.columns});
    const int64_t time = ceil_div(p.conv.batch * p.conv.groups * column_tiles, kMultiprocessors) * tile.columns *
                         round_up(p.conv.out_height * p.conv.out_width, tile.rows);
    if (tile.shared_bytes(p) <= kSharedLimit && (best == nullptr || time < least)) {
      best = &tile;
      least = time;
    }
  }
  return best;
}

int64_t convolution_bytes(const ConvParams& p) {
  return p.batch * p.out_height * p.out_width * p.out_channels * element_bytes(p.dtype);
}

// The convolution's output in memory: in p.r, where training keeps it with LRN, else in the workspace.
int two_kernels(const StageParams& p, void* stream) {
  ConvParams conv = p.conv;
  conv.y = p.r != nullptr ? p.r : static_cast<char*>(p.conv.workspace) + forward_workspace_bytes(p.conv);
  if (const int error = conv_relu_fwd(conv, stream)) {
    return error;
  }
  EpilogueParams rest{};
  rest.dtype = conv.dtype;
  rest.channels_last = true;
  rest.batch = conv.batch;
  rest.channels = conv.out_channels;
  rest.height = conv.out_height;
  rest.width = conv.out_width;
  rest.out_height = p.pooled_height;
  rest.out_width = p.pooled_width;
  rest.lrn = p.lrn;
  rest.window = p.pool;
  rest.z = conv.y;
  rest.y = p.pooled;
  rest.code = p.code;
  return epilogue_fwd(rest, stream);
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t conv_stage_fwd_workspace_bytes(const StageParams& p) {
  const bool needs_output = choose(p) == nullptr && p.r == nullptr;
  return forward_workspace_bytes(p.conv) + (needs_output ? workspace_piece(convolution_bytes(p.conv)) : 0);
}

int conv_stage_fwd(const StageParams& p, void* stream) {
  if (p.conv.tile < 0 || p.conv.tile > tiles_of(p.conv).count) {
    return cudaErrorInvalidValue;
  }
  if (p.conv.batch * p.pooled_height * p.pooled_width == 0) {
    return cudaSuccess;
  }
  const StageTileChoice* tile = choose(p);
  if (tile == nullptr) {
    return p.conv.tile == 0 ? two_kernels(p, stream) : cudaErrorNotSupported;
  }
  Convolution convolution;
  const int error = prepare(p.conv, stream, convolution);
  return error != cudaSuccess ? error : tile->launch(p, convolution, stream);
}

}  // namespace alexnet_fast::cuda
