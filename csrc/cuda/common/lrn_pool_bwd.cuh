// Backward of AlexNet's stages, for epilogue_bwd.cu: from the gradient of the pool's output, through windows of 3 with
// stride 2, LrnOfFive and the ReLU, to dz and sums for the bias. common/lrn_bwd.cuh has the formula.
//
// NHWC: a thread owns V channels of a patch of 2 x 2 pixels. It gathers the pool's gradient of all four at
// once (gather_patch) and takes LRN's backward pixel by pixel: t and its powers once for each channel, and the products
// q of the two channels on either side from the threads beside it, through shared memory, one barrier a pixel. The
// ReLU's output x is LRN's input and the mask.
//
// NCHW: a tile of planes (common/lrn_planes.cuh) in shared memory. Threads gather the pool's gradient of patches of 2 x
// 2 pixels first, channel by channel, and leave it in float32; then each walks through a pixel's channels as without a
// pool.
#pragma once

#include "cuda/common/lrn_bwd.cuh"
#include "cuda/common/pool.cuh"

namespace alexnet_fast::cuda {

// Half of a block elsewhere: a barrier holds up fewer warps, and registers divide into smaller pieces.
constexpr int kPatchThreads = 128;

template <class T>
struct LrnPoolBackward {
  const T* x;
  T* dx;
  float* partial;  // (blocks, channels): sums of dx for the bias, or null
  PooledGradient<T> gradient;
  Divider columns, rows;  // patches in a row and in a column of the image
  int32_t patches;        // of the batch
};

template <class T, int V>
__global__ void __launch_bounds__(kPatchThreads, 5)
    lrn_pool_bwd_packed(LrnPoolBackward<T> p, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int S = 2, Halo = 2;
  static_assert(V >= 2 * Halo);
  ALEXNET_FAST_SHARED(float[2][kPatchThreads][2 * Halo], shown);  // q of a thread's first and last channels, in turns
  const PoolShape& shape = p.gradient.shape;
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int32_t channel = threadIdx.x * V;
  const Neighbourhood<Plain<T>, T, V, Halo> near(Plain<T>{p.x}, channel, group_channels);
  float total[V] = {};
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.patches; first += int64_t{gridDim.x} * blockDim.y) {
    const uint32_t patch = first + threadIdx.y;
    const bool there = patch < static_cast<uint32_t>(p.patches);
    uint32_t column, row;
    const int64_t image = p.rows.divide_small(p.columns.divide_small(patch, column), row);
    const int32_t top = row * S - shape.window.pad_h, left = column * S - shape.window.pad_w;
    const auto is_active = [&](int pixel) {
      const int32_t h = top + pixel / S, w = left + pixel % S;
      return there && h >= 0 && h < shape.height && w >= 0 && w < shape.width;
    };
    const int64_t in = image * shape.in.image + (int64_t{top} * shape.width + left) * channels + channel;
    const auto offset = [&](int pixel) { return in + (int64_t{pixel / S} * shape.width + pixel % S) * channels; };
    // Pixels that are not there are zeros, whose gradient is zero too.
    using Values = typename Neighbourhood<Plain<T>, T, V, Halo>::Values;
    Values values = is_active(0) ? near.load(offset(0)) : Values{};
    float dy[S][S][V] = {};
    if (there) {
      gather_patch(p.gradient, image * shape.out.image + channel, row, column, channels, dy);
    }
#pragma unroll
    for (int pixel = 0; pixel < S * S; ++pixel) {
      float (&a)[V] = dy[pixel / S][pixel % S];
      float x[Halo + V + Halo], q[Halo + V + Halo], t[V], power[V], reciprocal[V];
      values.unpack(x);
      if (pixel + 1 < S * S) {  // on its way while this one is worked on
        values = is_active(pixel + 1) ? near.load(offset(pixel + 1)) : Values{};
      }
      scales<Halo>(x, lrn, t);
      inverse_power<T>(t, lrn, power, reciprocal);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] *= power[i];
        q[Halo + i] = a[i] * x[Halo + i] * reciprocal[i];
      }
      float (&turn)[kPatchThreads][2 * Halo] = shown[pixel % 2];
      const float ends[2 * Halo] = {q[Halo], q[Halo + 1], q[V], q[V + 1]};
      store_shared(&turn[thread][0], pack<float>(ends));
      __syncthreads();
      float before[Halo] = {}, after[Halo] = {};
      if (Halo <= near.before) {
        unpack(load<Halo>(&turn[thread - 1][Halo]), before);
      }
      if (0 < near.after) {
        unpack(load<Halo>(&turn[thread + 1][0]), after);
      }
#pragma unroll
      for (int i = 0; i < Halo; ++i) {
        q[i] = before[i];
        q[Halo + V + i] = after[i];
      }
      float sum[V];
      window_sums<Halo>(q, lrn.after, lrn.before, sum);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = fmaf(-lrn.slope * x[Halo + i], sum[i], a[i]);
        if (x[Halo + i] <= 0) {
          a[i] = 0;
        }
        total[i] += a[i];
      }
      if (is_active(pixel)) {
        store(p.dx + offset(pixel), pack<T>(a));
      }
    }
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, true);
  }
}

// ---------------------------------------------------------------- NCHW, in shared memory

// A tile is some rows of an image, an even number, and a chunk of channels. In shared memory: rows of x, which dx takes
// the place of; of dy and codes those of the windows over the tile; and the gradient through the pool, in float32.
template <class T>
struct LrnPoolTiles {
  static constexpr int32_t kHalo = 2, kLongestChunk = 32;
  static constexpr int64_t kMostBytes = 66 * 1024;                               // two blocks on sm_80, three on sm_90
  static constexpr int kVectors = 2, kLanes = 16, kDyLanes = 8, kCodeLanes = 4;  // of rows, and what each lane has

  PlaneTiles x, dy, code;
  int32_t channels, height, width, out_height, out_width;
  int32_t rows, slices;  // of a tile; and how many threads share the channels of a patch of 2 x 2 pixels
  Divider patches, patch_columns;
  int32_t dy_at, code_at, gradient_at, bytes;
  bool fit;

  explicit LrnPoolTiles(const EpilogueParams& p)
      : x({p.dtype, false, p.batch, p.channels, p.height * p.width}, p.lrn.groups, kLongestChunk),
        dy({p.dtype, false, p.batch, p.channels, p.out_height * p.out_width}, p.lrn.groups, kLongestChunk),
        code(dy),
        channels(static_cast<int32_t>(p.channels)),
        height(static_cast<int32_t>(p.height)),
        width(static_cast<int32_t>(p.width)),
        out_height(static_cast<int32_t>(p.out_height)),
        out_width(static_cast<int32_t>(p.out_width)),
        fit(false) {
    const int64_t pairs = ceil_div<int64_t>(p.height, 2);
    for (int64_t bands = 1; bands <= pairs && !fit; ++bands) {
      const int64_t in_band = ceil_div(pairs, bands);
      rows = static_cast<int32_t>(2 * in_band);
      const int64_t pixels = std::min<int64_t>(rows, height) * p.width, outputs = (in_band + 1) * p.out_width;
      if (pixels > PlaneTiles::longest_run(sizeof(T), kVectors * kLanes) ||
          outputs > PlaneTiles::longest_run(sizeof(T), kVectors * kDyLanes) ||
          outputs > PlaneTiles::longest_run(1, kVectors * kCodeLanes)) {
        continue;
      }
      x.cut(pixels, sizeof(T));
      dy.cut(outputs, sizeof(T));
      code.cut(outputs, 1);
      const int32_t chunk = x.chunk + 2 * kHalo;
      dy_at = x.bytes(chunk + 2 * kHalo, sizeof(T));
      code_at = dy_at + dy.bytes(chunk, sizeof(T));
      gradient_at = code_at + code.bytes(chunk, 1);
      bytes = gradient_at + chunk * x.width * static_cast<int32_t>(sizeof(float));
      patch_columns = Divider(ceil_div<int64_t>(p.width, 2));
      patches = Divider(in_band * patch_columns.divisor);
      slices = x.block().x / static_cast<int32_t>(patches.divisor);
      fit = bytes <= kMostBytes && slices > 0;
    }
  }

  // Whether the kernel takes that stage.
  static bool take(const EpilogueParams& p, const LrnShape& shape) {
    return PlaneTiles::take<true>(shape, p.lrn) && overlapping_3_by_2(p.window) && windows_inside(p) &&
           alike_in_16(static_cast<const T*>(p.r), static_cast<const T*>(p.dz)) && LrnPoolTiles(p).fit;
  }
};

// The gradient through the pool, of `count` channels: gather_patch has the arithmetic. A thread stays with its patch,
// and goes through every `slices`th channel, or in 16 bits pair of channels: the codes of two are compared by one
// instruction, and a mask leaves of their dy what belongs to a pixel.
template <class T>
__device__ __forceinline__ void gather_tile(const LrnPoolTiles<T>& tiles, int32_t first_row, int32_t tile_rows,
                                            int32_t out_begin, const T* dy, const uint8_t* code, float* gradient,
                                            int32_t count) {
  constexpr int K = 3, S = 2, N = 4 / sizeof(T);  // channels at once
  uint32_t patch, patch_column;
  const int32_t slice = tiles.patches.divide_small(threadIdx.x, patch);
  const int32_t row = tiles.patch_columns.divide_small(patch, patch_column), column = patch_column;
  if (slice >= tiles.slices || row * S >= tile_rows) {
    return;
  }
  // A window that is not there is read as the nearest one that is, and compared with codes that nobody has.
  constexpr uint32_t kNobody = 1 << 10, kEach = N == 2 ? 0x10001 : 1;
  int32_t from[2][2];
  uint32_t nobody[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int32_t y = first_row / S + row - i, x = column - j;
      const int32_t near_y = min(max(y, 0), tiles.out_height - 1), near_x = min(max(x, 0), tiles.out_width - 1);
      from[i][j] = (near_y - out_begin) * tiles.out_width + near_x;
      nobody[i][j] = y == near_y && x == near_x ? 0 : kNobody * kEach;
    }
  }
  const bool tall = row * S + 1 < tile_rows, wide = column * S + 1 < tiles.width;
  const int32_t step = N * tiles.slices;
  dy += N * slice * tiles.dy.stride;
  code += N * slice * tiles.code.stride;
  gradient += N * slice * tiles.x.width + row * S * tiles.width + column * S;
#pragma unroll 1
  for (int32_t channel = N * slice; channel < count; channel += step) {
    float sums[S][S][N];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const T* const its_dy = dy + from[i][j];
        const uint8_t* const its_code = code + from[i][j];
        uint32_t places = its_code[0] + nobody[i][j];
        Pack<T, N> values;
        if constexpr (N == 2) {
          places += static_cast<uint32_t>(its_code[tiles.code.stride]) << 16;
          values = pack_two(its_dy[0], its_dy[tiles.dy.stride]);
        } else {
          values = load<1>(its_dy);
        }
#pragma unroll
        for (int h = 0; h + i * S < K && h < S; ++h) {
#pragma unroll
          for (int w = 0; w + j * S < K && w < S; ++w) {
            const uint32_t place = (K * (h + i * S) + w + j * S) * kEach;
            const uint32_t mask = N == 2 ? equal_pair(places, place) : places == place ? ~0u : 0u;
            const Pack<T, N> own{{values.words[0] & mask}};
#pragma unroll
            for (int n = 0; n < N; ++n) {
              sums[h][w][n] = i + j == 0 ? element(own, n) : sums[h][w][n] + element(own, n);
            }
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < S; ++h) {
#pragma unroll
      for (int w = 0; w < S; ++w) {
        if ((h == 0 || tall) && (w == 0 || wide)) {
#pragma unroll
          for (int n = 0; n < N; ++n) {
            gradient[h * tiles.width + w + n * tiles.x.width] = sums[h][w][n];
          }
        }
      }
    }
    dy += step * tiles.dy.stride;
    code += step * tiles.code.stride;
    gradient += step * tiles.x.width;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    lrn_pool_bwd_planes(const T* __restrict__ x, const T* __restrict__ dy, const uint8_t* __restrict__ code,
                        T* __restrict__ dx, float* __restrict__ partial, LrnPoolTiles<T> tiles, LrnOfFive lrn) {
  using Tiles = LrnPoolTiles<T>;
  constexpr int Halo = Tiles::kHalo, kStep = PlaneTiles::kStep;
  unsigned char* const room = dynamic_shared();
  const PlaneTile tile(tiles.x);
  const int32_t first = tile.begin - Halo, count = ceil_div(tile.channels(), kStep) * kStep + 2 * Halo;
  const int32_t first_row = tile.place * tiles.rows, tile_rows = min(tiles.rows, tiles.height - first_row);
  const int32_t out_begin = max(first_row / 2 - 1, 0), out_end = min((first_row + tile_rows + 1) / 2, tiles.out_height);
  const int32_t out_first = out_begin * tiles.out_width, outputs = (out_end - out_begin) * tiles.out_width;
  const PlaneTile dy_tile(tile, tiles.dy, out_first, outputs), code_tile(tile, tiles.code, out_first, outputs);
  T* const x_rows = place_run(room, x + tile.offset(first - Halo));
  T* const dy_rows = place_run(room + tiles.dy_at, dy + dy_tile.offset(first));
  uint8_t* const code_rows = place_run(room + tiles.code_at, code + code_tile.offset(first));
  float* const gradient = reinterpret_cast<float*>(room + tiles.gradient_at);
  dy_tile.template fetch<Tiles::kDyLanes, Tiles::kVectors>(dy_rows, dy, first, count);
  code_tile.template fetch<Tiles::kCodeLanes, Tiles::kVectors>(code_rows, code, first, count);
  tile.template fetch<Tiles::kLanes, Tiles::kVectors>(x_rows, x, first - Halo, count + 2 * Halo);
  await_runs();
  gather_tile(tiles, first_row, tile_rows, out_begin, dy_rows, code_rows, gradient, count);
  __syncthreads();
  lrn_bwd_of_tile<true, Tiles::kLanes, Tiles::kVectors>(
      tile, x_rows, gradient, tiles.x.width, x_rows + 2 * Halo * tiles.x.stride, dx, partial, tiles.channels, lrn);
}

// ---------------------------------------------------------------- launch

struct LrnPoolPatches {
  int64_t in_row, in_column, all;
  dim3 block;
  int64_t blocks;  // and so rows of `partial`

  LrnPoolPatches(const EpilogueParams& p, int V, bool summing)
      : in_row(ceil_div<int64_t>(p.width + p.window.pad_w, 2)),
        in_column(ceil_div<int64_t>(p.height + p.window.pad_h, 2)),
        all(p.batch * in_row * in_column),
        block(p.channels / V, kPatchThreads / (p.channels / V)) {
    constexpr int64_t kEnoughBlocks = 4096, kSumBlocks = 1320;  // twice as many as 132 multiprocessors hold at once
    const int64_t groups = ceil_div<int64_t>(all, block.y);
    blocks = ceil_div(groups, std::clamp<int64_t>(groups / kEnoughBlocks, 1, 4));
    blocks = summing ? std::min(blocks, kSumBlocks) : blocks;
  }
};

// Whether the kernel takes that stage.
template <class T>
bool lrn_pool_bwd_packs(const EpilogueParams& p, const LrnShape& shape, bool aligned) {
  constexpr int V = kVector<T>;
  return p.channels_last && aligned && lrn_in_vectors(shape, p.lrn, V) && p.channels / V <= kPatchThreads &&
         overlapping_3_by_2(p.window) && LrnOfFive::is(p.lrn) &&
         LrnPoolPatches(p, V, false).all <= INT32_MAX - kPatchThreads;
}

template <class T>
int launch_lrn_pool_bwd(const EpilogueParams& p, void* stream) {
  constexpr int V = kVector<T>;
  const LrnPoolPatches lie(p, V, p.db_partial != nullptr);
  const LrnPoolBackward<T> backward{static_cast<const T*>(p.r),
                                    static_cast<T*>(p.dz),
                                    static_cast<float*>(p.db_partial),
                                    PooledGradient<T>(p.dy, p.code, PoolShape(p)),
                                    Divider(lie.in_row),
                                    Divider(lie.in_column),
                                    static_cast<int32_t>(lie.all)};
  return launch<lrn_pool_bwd_packed<T, V>>(dim3(lie.blocks), lie.block, 0, stream, backward,
                                           static_cast<int32_t>(p.channels),
                                           static_cast<int32_t>(p.channels / p.lrn.groups), LrnOfFive(p.lrn));
}

template <class T>
int launch_lrn_pool_bwd_planes(const EpilogueParams& p, void* stream) {
  const LrnPoolTiles<T> tiles(p);
  return launch<lrn_pool_bwd_planes<T>>(tiles.x.grid(), tiles.x.block(), tiles.bytes, stream,
                                        static_cast<const T*>(p.r), static_cast<const T*>(p.dy),
                                        static_cast<const uint8_t*>(p.code), static_cast<T*>(p.dz),
                                        static_cast<float*>(p.db_partial), tiles, LrnOfFive(p.lrn));
}

}  // namespace alexnet_fast::cuda
