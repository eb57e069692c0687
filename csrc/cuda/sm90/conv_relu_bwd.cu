// Gradients of Hopper's convolution, with respect to its input and its weight. With m = dy where y > 0 (or NaN) and 0
// elsewhere, written by a pass of its own unless dy is masked already:
//
//   dx  is the forward kernel's convolution of m with the weight turned by 180 degrees and its channels exchanged.
//   dw  is a product over pixels:  dw[k][(r, s, c)] = sum over pixels of m[pixel][k] * x[pixel's window][(r, s, c)].
//
//   db  is m's sum over pixels. With dw it comes on the way: the consumers of the first column tile add up the stages
//       that they multiply. Without dw the pass that masks can give it (epilogue_bwd.cu); it is not made here.
//
// dw's tile is 128 output channels x 3 blocks of 64 channels, each at a tap of its own; its depth is pixels, 64 a
// stage. Copies bring a line of 64 channels for each pixel, and wgmma takes just that as an operand that is contiguous
// along its rows or columns, so nothing is transposed. x comes in im2col mode, so a stage runs across rows and images.
// Pixels are cut into runs, each for blocks of its own, whose results a second kernel adds up in their order
// (add_splits): nothing depends on which block ends first. Roles, ring and barriers are the forward kernel's.
//
// The speed it should have is computed, not measured: nothing of this file has run on a card. A stage takes 768 cycles
// of products and 40 KB out of L2, 1024 cycles at the forward kernel's guess of 40 bytes a cycle: L2 binds, at 75% of
// the matrix rate. At batch 128 and 1.44 GHz, by choose_runs(), in us (cuDNN's measured times in brackets):
//
//   conv2 153 (132)   conv3 66 (59)   conv4 84 (62)   conv5 55 (58)   2012: conv2 153 (332)   conv4 80   conv5 42 (111)
//
// conv2's 192 output channels fill three quarters of the rows of two tiles, and the 48 channels of a group three
// quarters of a block, so tiles of 192 rows and blocks of 48 channels should be written next. dx is as forward with the
// channels exchanged.
//
// Where x is the output of a ReLU, dx can come masked (mask_dx): the forward kernel's consumers read x as they store,
// and so do those who add up pieces. The layer before then needs no pass that reads dx and x and writes m, three
// tensors; x is read once, two tensors less in memory. What it costs: a warp waits for x once a piece, 700 cycles if
// nothing hides them (a guess), in conv4 four times in a tile's 44237. db then comes with dw: a lane's 16 loads and 32
// sums a stage, in blocks of the first of a dozen column tiles, beside products that wait for L2.
//
// float32 has dx by TF32, as forward, and no dw: wgmma takes operands that are contiguous along rows or columns in 16
// bits alone. x and m would have to be written anew with pixels fastest: in conv2 at batch 128 24 and 72 MB, there and
// back 64 us at 3.0 TB/s, before the 147 us that its 57.3 GFLOP take at TF32's full rate; and im2col copies walk along
// channels.
#include "cuda/common/conv_sm90.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda::sm90 {
namespace {

constexpr int kBlocks = 3;  // of 64 channels, side by side
constexpr int kRows = 64 * kConsumers, kColumns = 64 * kBlocks;
constexpr int kPixels = 64, kBox = kPixels * kLine;  // of a stage; and 64 channels of them
constexpr int kStages = 5, kStageBytes = (kConsumers + kBlocks) * kBox;

// ---------------------------------------------------------------- weight gradient

struct Arguments {
  TensorMap x[kMaxGroups];          // (channels, width, height, images), of each group
  TensorMap dy;                     // (rows, groups, pixels, 1)
  Divider column_tiles, row_tiles;  // a block's axes, fastest first; then groups
  Divider slabs, kernel_w;          // 64s of channels of a tap; taps of a row
  Walk walk;
  int32_t blocks, rows, channels;  // 64s of the folded depth; output channels, and channels of x, of one group
  int32_t groups;
  int64_t depth, stages, stages_each;  // of all pixels, of one run
  float* out;                          // (runs, groups * rows, depth)
  float* bias;                         // (runs, groups * rows), or null
};

struct Column {
  int32_t channel, r, s;
};

// The first channel of the tile's block i, and its tap. Past the end the last one again, whose product is not stored.
__device__ __forceinline__ Column column_of(const Arguments& args, int64_t column_tile, int i) {
  const int32_t block = min(static_cast<int32_t>(column_tile) * kBlocks + i, args.blocks - 1);
  uint32_t slab, s;
  const uint32_t tap = args.slabs.divide_small(block, slab);
  const uint32_t r = args.kernel_w.divide_small(tap, s);
  return {static_cast<int32_t>(slab) * 64, static_cast<int32_t>(r), static_cast<int32_t>(s)};
}

// Adds to a lane's sums, of channels 16 warp + 2 (lane % 8) and + 1, every fourth pixel of a box: lanes of one pixel
// have two chunks of it, and those of four pixels, whose swizzles differ, meet in no bank.
template <class T>
__device__ __forceinline__ void add_pixels(const unsigned char* box, int warp, int lane, float (&sums)[2]) {
  const int chunk = 2 * warp + lane % 8 / 4;
#pragma unroll
  for (int i = 0; i < kPixels / 4; ++i) {
    const int pixel = i / 2 * 8 + lane / 8 * 2 + i % 2;
    const Pack<T, 2> pair = load<2>(
        reinterpret_cast<const T*>(box + pixel * kLine + (chunk ^ pixel % 8) * kChunkBytes + lane % 4 * 2 * sizeof(T)));
    sums[0] += element(pair, 0);
    sums[1] += element(pair, 1);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1) conv_weight_gradient(const ALEXNET_FAST_GRID_CONSTANT Arguments args) {
  unsigned char* const stages = dynamic_shared_at<kAlignment>();
  ALEXNET_FAST_SHARED(Ring<kStages>, ring);
  begin_ring(ring);
  dependency_wait();
  launch_dependents();
  int64_t column_tile, row_tile;
  const int64_t rest = args.column_tiles.divide(blockIdx.x, column_tile);
  const int32_t group = static_cast<int32_t>(args.row_tiles.divide(rest, row_tile));
  const int64_t begin = blockIdx.y * args.stages_each, end = min(begin + args.stages_each, args.stages);
  RingPlace<kStages> place;
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x != 0) {
      return;
    }
    Column columns[kBlocks];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      columns[i] = column_of(args, column_tile, i);
    }
    for (int64_t slab = begin; slab < end; ++slab) {
      const int32_t pixel = static_cast<int32_t>(slab) * kPixels;
      const FirstPixel first = args.walk.first(pixel);
      mbarrier_wait(ring.empty + place.stage, place.parity ^ 1);
      Mbarrier* const barrier = ring.full + place.stage;
      mbarrier_expect(barrier, kStageBytes);
      unsigned char* box = stages + place.stage * kStageBytes;
#pragma unroll
      for (int i = 0; i < kConsumers; ++i, box += kBox) {
        bulk_load(box, args.dy, barrier, {static_cast<int32_t>(row_tile) * kRows + 64 * i, group, pixel, 0});
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i, box += kBox) {
        args.walk.load(box, args.x[group], barrier, columns[i].channel, first, columns[i].r, columns[i].s);
      }
      place.advance();
    }
    return;
  }

  more_registers<kConsumerRegisters>();
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const bool sums_bias = args.bias != nullptr && column_tile == 0;
  float sums[kColumns / 2], bias[2] = {};
  uint32_t read = 0;
  for (int64_t slab = begin; slab < end; ++slab) {
    mbarrier_wait(ring.full + place.stage, place.parity);
    const unsigned char* stage = stages + place.stage * kStageBytes;
    const uint64_t rows = matrix_descriptor(stage + consumer * kBox);
    const uint64_t columns = matrix_descriptor(stage + kConsumers * kBox, kBox);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kPixels / 16; ++step) {
      wgmma<T, kColumns, Major::pixels, Major::pixels>(sums, rows + step * kDepthStep<Major::pixels>,
                                                       columns + step * kDepthStep<Major::pixels>,
                                                       slab != begin || step != 0);
    }
    wgmma_commit();
    if (sums_bias) {
      add_pixels<T>(stage + consumer * kBox, warp, lane, bias);
      __syncwarp();  // before the stage is given back
    }
    wgmma_wait<1>();
    if (slab != begin && lane == 0) {
      mbarrier_arrive(ring.empty + read);
    }
    read = place.stage;
    place.advance();
  }
  wgmma_wait<0>();
  wgmma_done(sums);

  const int64_t warp_row = row_tile * kRows + consumer * 64 + warp * 16, first_row = warp_row + lane / 4;
  const int64_t run_rows = (blockIdx.y * int64_t{args.groups} + group) * args.rows;
  if (sums_bias) {
#pragma unroll
    for (float& sum : bias) {
      sum += __shfl_xor_sync(0xffffffff, sum, 8);
      sum += __shfl_xor_sync(0xffffffff, sum, 16);
    }
    if (lane < 8 && warp_row + 2 * lane < args.rows) {
      store(args.bias + run_rows + warp_row + 2 * lane, pack<float>(bias));
    }
  }
  float* const out = args.out + run_rows * args.depth;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const Column column = column_of(args, column_tile, i);
    if (column_tile * kBlocks + i >= args.blocks) {
      break;
    }
    const int64_t at = (int64_t{column.r} * args.kernel_w.divisor + column.s) * args.channels + column.channel;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int32_t channel = 8 * j + 2 * (lane % 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + 8 * half;
        if (row < args.rows && column.channel + channel < args.channels) {
          const float* pair = sums + 32 * i + 4 * j + 2 * half;
          const float both[2] = {pair[0], pair[1]};
          store(out + row * args.depth + at + channel, pack<float>(both));
        }
      }
    }
  }
}

// ---------------------------------------------------------------- plan

// What follows from the shape: which operands are copied, how many runs, and what lies where in the workspace.
struct Plan {
  Image dy;
  bool fold_dy, fold_x;
  Fold dy_fold, x_fold;
  int64_t tiles, runs, stages_each;
  int64_t dy_at, x_at, weight_at, partial_at, dweight_at, dbias_at, bytes;
};

// The forward convolution of an image like dy to one like x. Its operands are still to come.
Convolution input_gradient_of(const ConvParams& p, const Fold& dy_fold) {
  ConvParams back = p;
  back.height = p.out_height;
  back.width = p.out_width;
  back.out_height = p.height;
  back.out_width = p.width;
  back.window.pad_h = p.dilation_h * (p.window.kernel_h - 1) - p.window.pad_h;
  back.window.pad_w = p.dilation_w * (p.window.kernel_w - 1) - p.window.pad_w;
  Convolution c{};
  c.dtype = p.dtype;
  c.allow_tf32 = p.allow_tf32;
  c.tile = p.tile;
  c.groups = p.groups;
  c.columns = p.channels / p.groups;
  c.gather = input_gather(back, dy_fold);
  c.y = p.dx;
  return c;
}

// Runs with the least estimated time, in cycles: rounds of tiles, and the runs' results on their way to memory and back
// at 2450 bytes a cycle. A stage is 768 cycles of products, or 1024 for its bytes. The result's rounding depends on it,
// hence on shapes alone.
int64_t choose_runs(int64_t tiles, int64_t stages, double weights) {
  constexpr int64_t kMultiprocessors = 132, kMostRuns = 64;
  int64_t best = 1;
  double least = 0;
  for (int64_t runs = 1; runs <= kMostRuns && (runs == 1 || runs * kStages <= stages); ++runs) {
    const double rounds = static_cast<double>(ceil_div(tiles * runs, kMultiprocessors));
    const double time = rounds * static_cast<double>(ceil_div(stages, runs)) * 1024 + runs * weights * 8 / 2450;
    if (runs == 1 || time < least) {
      best = runs;
      least = time;
    }
  }
  return best;
}

Plan plan(const ConvParams& p) {
  const int32_t rows = static_cast<int32_t>(p.out_channels / p.groups);
  Plan out{};
  out.dy = {p.dtype, p.batch, p.out_height, p.out_width, p.groups, rows, p.dy, p.y};
  out.fold_dy = p.y != nullptr || needs_fold(p.dtype, rows, p.dy);
  out.dy_fold = padding_fold(out.dy);
  out.fold_x = p.dweight != nullptr && needs_fold(p.dtype, p.channels / p.groups, p.x);
  out.x_fold = input_fold(p);
  const Gather gather = input_gather(p, out.x_fold);
  const int64_t depth = int64_t{gather.depth()} * (kChunkBytes / 2);
  const int64_t blocks = int64_t{gather.kernel_h} * gather.kernel_w * ceil_div(gather.chunks * (kChunkBytes / 2), 64);
  const int64_t stages = ceil_div(gather.pixels, int64_t{kPixels});
  out.tiles = ceil_div(blocks, int64_t{kBlocks}) * ceil_div(rows, kRows) * p.groups;
  out.stages_each = ceil_div(stages, choose_runs(out.tiles, stages, static_cast<double>(p.out_channels * depth)));
  out.runs = out.stages_each == 0 ? 0 : ceil_div(stages, out.stages_each);
  int64_t at = 0;
  const auto piece = [&](bool wanted, int64_t bytes) {
    const int64_t begin = at;
    at += wanted ? workspace_piece(bytes) : 0;
    return begin;
  };
  out.dy_at = piece(out.fold_dy, folded_bytes(out.dy, out.dy_fold));
  out.x_at = piece(out.fold_x, folded_bytes(input_of(p), out.x_fold));
  out.weight_at =
      piece(p.dx != nullptr, p.channels * p.window.kernel_h * p.window.kernel_w * out.dy_fold.chunks * kChunkBytes);
  out.partial_at = piece(p.dx != nullptr, partial_bytes(input_gradient_of(p, out.dy_fold)));
  out.dweight_at = piece(p.dweight != nullptr, out.runs * p.out_channels * depth * 4);
  out.dbias_at = piece(p.dbias != nullptr, out.runs * p.out_channels * 4);
  out.bytes = at;
  return out;
}

// ---------------------------------------------------------------- the two gradients

// m: dy as the kernels read it.
int input_gradient(const ConvParams& p, const Plan& plan, const char* m, void* stream) {
  char* const workspace = static_cast<char*>(p.workspace);
  char* const turned = workspace + plan.weight_at;
  Convolution c = input_gradient_of(p, plan.dy_fold);
  c.x = m;
  c.weight = turned;
  c.partial = reinterpret_cast<float*>(workspace + plan.partial_at);
  c.mask = p.mask_dx ? p.x : nullptr;
  if (p.window.stride_h != 1 || p.window.stride_w != 1) {
    return cudaErrorNotSupported;
  }
  if (const int error = transpose_kernel(kernel_of(p), p.groups, plan.dy_fold.chunks, turned, stream)) {
    return error;
  }
  return sm90::convolve(c, stream);
}

int encode(const ConvParams& p, const Plan& plan, const Gather& g, const char* m, const char* x, Arguments& args) {
  if (const int error = encode_image(args.x, p.dtype, g, p.groups, x, kPixels)) {
    return error;
  }
  const uint64_t rows = plan.dy_fold.chunks * (kChunkBytes / 2), groups = p.groups;
  return encode_tiled<4>(args.dy, operand_elements(p.dtype), m, {rows, groups, uint64_t(g.pixels), 1},
                         {rows * 2, rows * groups * 2, rows * groups * g.pixels * 2}, {64, 1, kPixels, 1});
}

int weight_gradient(const ConvParams& p, const Plan& plan, const char* m, void* stream) {
  char* workspace = static_cast<char*>(p.workspace);
  const char* x = static_cast<const char*>(p.x);
  if (plan.fold_x && plan.runs != 0) {
    x = workspace + plan.x_at;
    if (const int error = fold_image(input_of(p), plan.x_fold, workspace + plan.x_at, stream)) {
      return error;
    }
  }
  const Gather g = input_gather(p, plan.x_fold);
  float* const out = reinterpret_cast<float*>(workspace + plan.dweight_at);
  float* const bias = p.dbias == nullptr ? nullptr : reinterpret_cast<float*>(workspace + plan.dbias_at);
  if (plan.runs != 0) {
    Arguments args{};
    args.channels = channels_of(g, p.dtype);
    if (const int error = encode(p, plan, g, m, x, args)) {
      return error;
    }
    const int slabs = ceil_div(args.channels, 64);
    args.rows = static_cast<int32_t>(p.out_channels / p.groups);
    args.blocks = g.kernel_h * g.kernel_w * slabs;
    args.column_tiles = Divider(ceil_div(args.blocks, kBlocks));
    args.row_tiles = Divider(ceil_div(args.rows, kRows));
    args.slabs = Divider(slabs);
    args.kernel_w = Divider(g.kernel_w);
    args.walk = Walk(g);
    args.groups = p.groups;
    args.depth = int64_t{g.depth()} * (kChunkBytes / 2);
    args.stages = ceil_div(g.pixels, int64_t{kPixels});
    args.stages_each = plan.stages_each;
    args.out = out;
    args.bias = bias;
    const dim3 grid(plan.tiles, plan.runs);
    constexpr size_t kShared = kStages * kStageBytes + kAlignment;
    const int error = p.dtype == DType::f16
                          ? launch_early<90, conv_weight_gradient<f16>>(grid, kThreads, kShared, stream, args)
                          : launch_early<90, conv_weight_gradient<bf16>>(grid, kThreads, kShared, stream, args);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return add_splits(p, plan.x_fold, plan.runs, out, bias, stream);
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t conv_relu_bwd_workspace_bytes(const ConvParams& p) { return covers(p) ? plan(p).bytes : 0; }

int conv_relu_bwd(const ConvParams& p, void* stream) {
  int multiprocessors;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  if (!covers(p)) {
    return cudaErrorInvalidValue;
  }
  if (p.dweight != nullptr ? p.dtype == DType::f32 : p.dbias != nullptr) {
    return cudaErrorNotSupported;
  }
  const Plan plan_ = plan(p);
  const Gather forward = input_gather(p, plan_.x_fold);
  if (p.dweight != nullptr && !walks(forward, p.groups)) {
    return cudaErrorNotSupported;
  }
  const char* m = static_cast<const char*>(p.dy);
  if (plan_.fold_dy) {
    m = static_cast<const char*>(p.workspace) + plan_.dy_at;
    if (const int error = fold_image(plan_.dy, plan_.dy_fold, static_cast<char*>(p.workspace) + plan_.dy_at, stream)) {
      return error;
    }
  }
  if (p.dx != nullptr) {
    if (const int error = input_gradient(p, plan_, m, stream)) {
      return error;
    }
  }
  return p.dweight == nullptr ? cudaSuccess : weight_gradient(p, plan_, m, stream);
}

}  // namespace alexnet_fast::cuda::sm90
