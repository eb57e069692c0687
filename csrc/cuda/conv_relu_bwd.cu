// Gradients of relu(w * x + b). With m = dy where y > 0 (or NaN) and 0 elsewhere:
//
//   dx  is the convolution of m with the weight turned by 180 degrees and its channels exchanged: conv_relu_fwd.cu's
//       kernel, which masks dy as it arrives in shared memory. Padding is dilation (R - 1) - padding. With a stride, m
//       is read as if stride - 1 zeros lay between its pixels; they are multiplied too, stride^2 times the useful
//       arithmetic. In AlexNet only the first layer has a stride, and its input needs no gradient.
//   dw  is a product over pixels:  dw[k][(r, s, c)] = sum over pixels of m[pixel][k] * x[pixel's window][(r, s, c)].
//       Pixels are cut into `splits` runs, each for blocks of its own, and a second kernel adds the runs' results up in
//       their order: nothing depends on which block ends first.
//   db  is m's sum over pixels: the blocks of dw's first column of tiles add it up as they mask.
//
// dw's kernel copies lines of pixels (a pixel's output channels for A, its window's piece of (r, s, c) for B), so the
// depth is the operands' slow axis, and ldmatrix transposes on the way to the registers (float32: single words). A slab
// is 64 bytes' worth of pixels, 32 or 16.
//
// Bytes: dy, y and x once from memory if the blocks of a run share them in L2, and R S times through L2; the runs'
// results once out and once in, 8 bytes for each weight and split: 14 MB for the fourth layer at batch 128 with 2
// splits, beside 29 MB of tensors. Arithmetic and shared memory are the forward kernel's with the same tile.
// Predictions, not measurements: dx as forward, less the mask's two loads and one store of shared memory a chunk; dw 45
// to 55% of the card's matrix rate, for the second pass and for depths (1600, 432) that are no multiple of 128.
//
// Considered and not taken: atomic additions (their order, and so the result, varies from run to run); a column of ones
// in B for db (one more tile where the depth is a multiple of the tile's).
#include "cuda/common/async_copy.cuh"
#include "cuda/common/conv.cuh"
#include "cuda/common/warp_tile.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

// ---------------------------------------------------------------- weight gradient

template <class Math_, int kRows_, int kColumns_, int kWarpRows_, int kWarpColumns_, int kStages_>
struct WeightTile {
  using Math = Math_;
  using T = typename Math::Element;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_;  // output channels, (r, s, c)
  static constexpr int kWarpRows = kWarpRows_, kWarpColumns = kWarpColumns_;
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = 32 * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kPixels = 64 / sizeof(T);  // of one slab
  using Product = WarpTile<Math, kWarpRows, kWarpColumns>;

  // A line holds one pixel of the tile; the block copies so many lines at once, a chunk a thread.
  static constexpr int kLineA = kRows * sizeof(T), kLineB = kColumns * sizeof(T);
  static constexpr int kChunksA = kLineA / kChunkBytes, kChunksB = kLineB / kChunkBytes;
  static constexpr int kLinesA = kThreads / kChunksA, kLinesB = kThreads / kChunksB;
  static constexpr int kPassesA = kPixels / kLinesA, kPassesB = kPixels / kLinesB;
  static_assert(kPassesA * kLinesA == kPixels && kPassesB * kLinesB == kPixels);

  // Shared memory of one slab: A's lines, B's lines, the mask's lines.
  static constexpr int kBAt = kPixels * kLineA, kMaskAt = kBAt + kPixels * kLineB;
  __host__ __device__ static constexpr int stage_bytes(bool mask) { return kMaskAt + (mask ? kPixels * kLineA : 0); }
};

struct WeightArguments {
  Gather gather;  // of x, over output pixels
  const char* x;
  const char* dy;                   // (pixels, groups, dy_chunks)
  const char* relu_output;          // null, or like dy
  int32_t dy_chunks;                // of one group
  int64_t rows;                     // output channels of one group
  Divider column_tiles, row_tiles;  // a block's axes, fastest first; then groups
  int32_t groups;
  int64_t slabs_each;  // of one split
  float* dweight;      // (splits, groups * rows, depth), or null
  float* dbias;        // (splits, groups * rows), or null
};

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) conv_weight_gradient(WeightArguments args) {
  using T = typename Tile::T;
  constexpr int V = kVector<T>;
  const Gather& gather = args.gather;
  int64_t column_tile, row_tile;
  int64_t group = args.column_tiles.divide(blockIdx.x, column_tile);
  group = args.row_tiles.divide(group, row_tile);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool masks = args.relu_output != nullptr, products = args.dweight != nullptr;
  const bool sums_bias = args.dbias != nullptr && column_tile == 0;

  unsigned char* slabs = dynamic_shared();
  const int stage_bytes = Tile::stage_bytes(masks);
  ALEXNET_FAST_SHARED(RowPlace[2][Tile::kPixels], places);

  const int64_t first_slab = blockIdx.y * args.slabs_each;
  const int64_t all_slabs = ceil_div(gather.pixels, int64_t{Tile::kPixels});
  const int64_t count = min(args.slabs_each, all_slabs - first_slab);

  // What this thread copies: one chunk of every kLinesA-th line of A, and of every kLinesB-th line of B.
  const int a_line = threadIdx.x / Tile::kChunksA, a_chunk = threadIdx.x % Tile::kChunksA;
  const int b_line = threadIdx.x / Tile::kChunksB, b_chunk = threadIdx.x % Tile::kChunksB;
  const int64_t dy_chunk = row_tile * Tile::kChunksA + a_chunk;
  const bool a_exists = dy_chunk < args.dy_chunks;
  const int64_t pixel_bytes = int64_t{args.groups} * args.dy_chunks * kChunkBytes;
  const int64_t dy_offset = (group * args.dy_chunks + dy_chunk) * kChunkBytes;
  const int64_t depth_chunk = column_tile * Tile::kChunksB + b_chunk;
  const bool b_exists = products && depth_chunk < gather.depth();
  const Tap tap = gather.tap(b_exists ? static_cast<int32_t>(depth_chunk) : 0);
  const char* x = args.x + group * gather.chunks * kChunkBytes + tap.offset;

  const auto stage = [&](int64_t slab) { return slabs + slab % Tile::kStages * stage_bytes; };
  const auto a_at = [&](int pass) {
    const int line = a_line + pass * Tile::kLinesA;
    return line * Tile::kLineA + ((a_chunk ^ column_swizzle<T>(line)) << 4);
  };
  const auto find_places = [&](int64_t slab) {
    if (threadIdx.x < Tile::kPixels) {
      const int64_t pixel = (first_slab + slab) * Tile::kPixels + threadIdx.x;
      places[slab % 2][threadIdx.x] = gather.place(pixel, pixel < gather.pixels);
    }
  };
  const auto fetch = [&](int64_t slab) {
    unsigned char* to = stage(slab);
    const int64_t first_pixel = (first_slab + slab) * Tile::kPixels;
#pragma unroll
    for (int i = 0; i < Tile::kPassesA; ++i) {
      const int64_t pixel = first_pixel + a_line + i * Tile::kLinesA;
      const int64_t offset = pixel * pixel_bytes + dy_offset;
      const int bytes = a_exists && pixel < gather.pixels ? kChunkBytes : 0;
      async_copy<kChunkBytes>(to + a_at(i), args.dy + offset, bytes);
      if (masks) {
        async_copy<kChunkBytes>(to + Tile::kMaskAt + a_at(i), args.relu_output + offset, bytes);
      }
    }
    if (products) {
      RowPlace place[Tile::kPassesB];
#pragma unroll
      for (int i = 0; i < Tile::kPassesB; ++i) {
        place[i] = places[slab % 2][b_line + i * Tile::kLinesB];
      }
#pragma unroll
      for (int i = 0; i < Tile::kPassesB; ++i) {
        const int line = b_line + i * Tile::kLinesB;
        async_copy<kChunkBytes>(to + Tile::kBAt + line * Tile::kLineB + ((b_chunk ^ column_swizzle<T>(line)) << 4),
                                x + place[i].origin(), b_exists & gather.inside(place[i], tap) ? kChunkBytes : 0);
      }
    }
  };

  typename Tile::Product product;
  product.clear();
  float bias[V] = {};
#pragma unroll 1
  for (int64_t slab = 0; slab < Tile::kStages - 1; ++slab) {
    find_places(slab);
    __syncthreads();
    if (slab < count) {
      fetch(slab);
    }
    async_commit();
  }
  find_places(Tile::kStages - 1);
#pragma unroll 1
  for (int64_t slab = 0; slab < count; ++slab) {
    async_wait<Tile::kStages - 2>();
    unsigned char* current = stage(slab);
    if (masks || sums_bias) {
#pragma unroll
      for (int i = 0; i < Tile::kPassesA; ++i) {
        T* at = reinterpret_cast<T*>(current + a_at(i));
        auto chunk = load<V>(at);
        if (masks) {
          chunk = masked(chunk, load<V>(reinterpret_cast<const T*>(current + Tile::kMaskAt + a_at(i))));
          store_shared(at, chunk);
        }
        if (sums_bias) {
#pragma unroll
          for (int e = 0; e < V; ++e) {
            bias[e] += element(chunk, e);
          }
        }
      }
    }
    __syncthreads();
    if (slab + Tile::kStages - 1 < count) {
      fetch(slab + Tile::kStages - 1);
    }
    async_commit();
    find_places(slab + Tile::kStages);
    if (products) {
      product.template multiply_columns<Tile::kPixels, Tile::kLineA, Tile::kLineB>(
          current, warp / Tile::kWarpsAcross * Tile::kWarpRows * static_cast<int>(sizeof(T)) / kChunkBytes,
          current + Tile::kBAt,
          warp % Tile::kWarpsAcross * Tile::kWarpColumns * static_cast<int>(sizeof(T)) / kChunkBytes, lane);
    }
  }

  const int64_t first_row = row_tile * Tile::kRows;
  const int64_t split_row = (int64_t{blockIdx.y} * args.groups + group) * args.rows + first_row;
  const int64_t rows = args.rows - first_row;
  if (products) {
    const int64_t depth = int64_t{gather.depth()} * V, first_column = column_tile * Tile::kColumns;
    product.for_pairs(lane, [&](int row, int column, float first, float second) {
      row += warp / Tile::kWarpsAcross * Tile::kWarpRows;
      column += warp % Tile::kWarpsAcross * Tile::kWarpColumns;
      if (row < rows && first_column + column < depth) {
        const float pair[2] = {first, second};
        store(args.dweight + (split_row + row) * depth + first_column + column, pack<float>(pair));
      }
    });
  }
  if (sums_bias) {
    __syncthreads();                                 // every warp has read the last slab
    float* lines = reinterpret_cast<float*>(slabs);  // (kLinesA, kRows)
#pragma unroll
    for (int e = 0; e < V; ++e) {
      lines[a_line * Tile::kRows + a_chunk * V + e] = bias[e];
    }
    __syncthreads();
    for (int row = threadIdx.x; row < min(rows, int64_t{Tile::kRows}); row += Tile::kThreads) {
      float sum = 0;
#pragma unroll
      for (int line = 0; line < Tile::kLinesA; ++line) {
        sum += lines[line * Tile::kRows + row];
      }
      args.dbias[split_row + row] = sum;
    }
  }
}

// ---------------------------------------------------------------- tiles

template <class Tile>
int launch_weight_tile(const WeightArguments& args, int64_t blocks, int64_t splits, void* stream) {
  const size_t ring = size_t{Tile::kStages} * Tile::stage_bytes(args.relu_output != nullptr);
  static_assert(Tile::kStages * Tile::stage_bytes(false) >= Tile::kLinesA * Tile::kRows * 4);
  return launch<conv_weight_gradient<Tile>>(dim3(blocks, splits), dim3(Tile::kThreads), ring, stream, args);
}

struct WeightTileChoice {
  int rows, columns;
  int (*launch)(const WeightArguments&, int64_t blocks, int64_t splits, void* stream);
};

template <class Tile>
constexpr WeightTileChoice weight_choice() {
  return {Tile::kRows, Tile::kColumns, launch_weight_tile<Tile>};
}

template <class Math>
constexpr WeightTileChoice kHalfTiles[] = {
    weight_choice<WeightTile<Math, 128, 128, 64, 64, 4>>(),
    weight_choice<WeightTile<Math, 64, 128, 32, 64, 4>>(),
};
template <class Math>
constexpr WeightTileChoice kFloatTiles[] = {weight_choice<WeightTile<Math, 64, 128, 32, 64, 4>>()};

// ---------------------------------------------------------------- plan

// Everything that follows from the shape: which operands are copied, the tile, the splits, and what lies where in the
// workspace.
struct Plan {
  Image dy;
  bool fold_dy, fold_x;
  Fold dy_fold, x_fold;
  WeightTileChoice tile;
  int64_t row_tiles, column_tiles, splits, slabs_each;
  int64_t dy_at, x_at, weight_at, dweight_at, dbias_at, bytes;
};

// Splits with the least estimated time, in cycles: rounds of tiles over the multiprocessors, and the runs' results on
// their way to memory and back. An H200's 2048 multiply-adds a cycle and multiprocessor are taken at 62%, 1270; its
// memory moves 2450 bytes a cycle. No GPU has measured the estimate. The result's rounding depends on the splits, hence
// on shapes alone.
int64_t choose_splits(int64_t tiles, int64_t slabs, double slab_multiply_adds, double weights) {
  constexpr int64_t kMultiprocessors = 132, kMostSplits = 64;
  int64_t best = 1;
  double least = 0;
  for (int64_t splits = 1; splits <= kMostSplits && (splits == 1 || splits * 8 <= slabs); ++splits) {
    const double rounds = static_cast<double>(ceil_div(tiles * splits, kMultiprocessors));
    const double time = rounds * static_cast<double>(ceil_div(slabs, splits)) * slab_multiply_adds / 1270 +
                        static_cast<double>(splits) * weights * 8 / 2450;
    if (splits == 1 || time < least) {
      best = splits;
      least = time;
    }
  }
  return best;
}

int plan(const ConvParams& p, Plan& out) {
  if (!covers(p)) {
    return cudaErrorInvalidValue;
  }
  const int64_t rows = p.out_channels / p.groups, element = element_bytes(p.dtype);
  out.dy = {p.dtype, p.batch, p.out_height, p.out_width, p.groups, static_cast<int32_t>(rows), p.dy, p.y};
  out.fold_dy = needs_fold(p.dtype, rows, p.dy) || !aligned_16(p.y);
  out.dy_fold = padding_fold(out.dy);
  out.fold_x = p.dweight != nullptr && needs_fold(p.dtype, p.channels / p.groups, p.x);
  out.x_fold = input_fold(p);

  const int64_t depth = int64_t{input_gather(p, out.x_fold).depth()} * kChunkBytes / element;
  const WeightTileChoice* tiles = nullptr;
  int count = 0;
  switch (p.dtype) {
    case DType::f16:
      tiles = kHalfTiles<TensorCores<f16>>;
      count = 2;
      break;
    case DType::bf16:
      tiles = kHalfTiles<TensorCores<bf16>>;
      count = 2;
      break;
    case DType::f32:
      tiles = p.allow_tf32 ? kFloatTiles<TensorCores<float>> : kFloatTiles<MultiplyAdd>;
      count = 1;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  // p.tile counts for both gradients: here it is checked for dweight, and convolve() checks it for dx.
  const int32_t asked = p.dweight == nullptr ? 0 : p.tile;
  if (p.tile < 0 || asked > count) {
    return cudaErrorInvalidValue;
  }
  // Half a tile of rows is worth a narrower one.
  out.tile = tiles[asked != 0 ? asked - 1 : count == 2 && (rows + 63) / 64 % 2 == 1 ? 1 : 0];
  out.row_tiles = ceil_div(rows, int64_t{out.tile.rows});
  out.column_tiles = p.dweight == nullptr ? 1 : ceil_div(depth, int64_t{out.tile.columns});
  const int64_t slabs = ceil_div(p.batch * p.out_height * p.out_width, 64 / element);
  const int64_t most = choose_splits(out.row_tiles * out.column_tiles * p.groups, slabs,
                                     static_cast<double>(out.tile.rows) * out.tile.columns * 64 / element,
                                     static_cast<double>(p.out_channels) * depth);
  out.slabs_each = ceil_div(slabs, most);
  out.splits = out.slabs_each == 0 ? 1 : ceil_div(slabs, out.slabs_each);

  int64_t at = 0;
  const auto piece = [&](bool wanted, int64_t bytes) {
    const int64_t begin = at;
    at += wanted ? workspace_piece(bytes) : 0;
    return begin;
  };
  const int64_t turned = int64_t{p.window.kernel_h} * p.window.kernel_w * p.channels * out.dy_fold.chunks * kChunkBytes;
  out.dy_at = piece(out.fold_dy, folded_bytes(out.dy, out.dy_fold));
  out.x_at = piece(out.fold_x, folded_bytes(input_of(p), out.x_fold));
  out.weight_at = piece(p.dx != nullptr, turned);
  out.dweight_at = piece(p.dweight != nullptr, out.splits * p.out_channels * depth * 4);
  out.dbias_at = piece(p.dbias != nullptr, out.splits * p.out_channels * 4);
  out.bytes = at;
  return cudaSuccess;
}

// ---------------------------------------------------------------- the two gradients

// m: dy as the kernels read it, masked already where relu_output is null.
int input_gradient(const ConvParams& p, const Plan& plan, const char* m, const void* relu_output, void* stream) {
  char* turned = static_cast<char*>(p.workspace) + plan.weight_at;
  if (const int error = transpose_kernel(kernel_of(p), p.groups, plan.dy_fold.chunks, turned, stream)) {
    return error;
  }
  Convolution c{};
  c.dtype = p.dtype;
  c.allow_tf32 = p.allow_tf32;
  c.tile = p.tile;
  c.groups = p.groups;
  c.columns = p.channels / p.groups;
  c.x = m;
  c.relu_output = relu_output;
  c.weight = turned;
  c.y = p.dx;
  // The forward convolution of an image like dy to one like x.
  ConvParams back = p;
  back.height = p.out_height;
  back.width = p.out_width;
  back.out_height = p.height;
  back.out_width = p.width;
  back.window.stride_h = back.window.stride_w = 1;
  back.window.pad_h = p.dilation_h * (p.window.kernel_h - 1) - p.window.pad_h;
  back.window.pad_w = p.dilation_w * (p.window.kernel_w - 1) - p.window.pad_w;
  c.gather = input_gather(back, plan.dy_fold);
  c.gather.spread_h = p.window.stride_h;
  c.gather.spread_w = p.window.stride_w;
  return convolve(c, stream);
}

int weight_gradient(const ConvParams& p, const Plan& plan, const char* m, const void* relu_output, void* stream) {
  char* workspace = static_cast<char*>(p.workspace);
  WeightArguments args{};
  args.x = static_cast<const char*>(p.x);
  if (plan.fold_x) {
    args.x = workspace + plan.x_at;
    if (const int error = fold_image(input_of(p), plan.x_fold, workspace + plan.x_at, stream)) {
      return error;
    }
  }
  args.gather = input_gather(p, plan.x_fold);
  args.dy = m;
  args.relu_output = static_cast<const char*>(relu_output);
  args.dy_chunks = plan.dy_fold.chunks;
  args.rows = p.out_channels / p.groups;
  args.column_tiles = Divider(plan.column_tiles);
  args.row_tiles = Divider(plan.row_tiles);
  args.groups = p.groups;
  args.slabs_each = plan.slabs_each;
  args.dweight = p.dweight == nullptr ? nullptr : reinterpret_cast<float*>(workspace + plan.dweight_at);
  args.dbias = p.dbias == nullptr ? nullptr : reinterpret_cast<float*>(workspace + plan.dbias_at);
  const int64_t blocks = plan.column_tiles * plan.row_tiles * p.groups;
  if (const int error = plan.tile.launch(args, blocks, plan.splits, stream)) {
    return error;
  }
  return add_splits(p, plan.x_fold, plan.splits, args.dweight, args.dbias, stream);
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t conv_relu_bwd_workspace_bytes(const ConvParams& p) {
  Plan plan_{};
  return plan(p, plan_) == cudaSuccess ? plan_.bytes : 0;
}

int conv_relu_bwd(const ConvParams& p, void* stream) {
  Plan plan_{};
  if (const int error = plan(p, plan_)) {
    return error;
  }
  if (p.mask_dx) {
    return cudaErrorNotSupported;
  }
  const char* m = static_cast<const char*>(p.dy);
  const void* relu_output = p.y;
  if (plan_.fold_dy) {
    m = static_cast<const char*>(p.workspace) + plan_.dy_at;
    relu_output = nullptr;
    if (const int error = fold_image(plan_.dy, plan_.dy_fold, static_cast<char*>(p.workspace) + plan_.dy_at, stream)) {
      return error;
    }
  }
  if (p.dx != nullptr) {
    if (const int error = input_gradient(p, plan_, m, relu_output, stream)) {
      return error;
    }
  }
  if (p.dweight != nullptr || p.dbias != nullptr) {
    return weight_gradient(p, plan_, m, relu_output, stream);
  }
  return cudaSuccess;
}

}  // namespace alexnet_fast::cuda
