// A whole stage on Hopper in one kernel: convolution, bias, ReLU, and max-pooling by windows of 3 with stride 2. The
// convolution's output is never written to memory. Producer, products and rounding are conv_relu_fwd.cu's
// (common/conv_sm90_fwd.cuh); what differs is the order of the tiles, and where they go.
//
// A block takes bands of an image, by one tile of columns each. It goes through the band's convolution rows from top to
// bottom, a tile of pixels at a time, and the consumers write each tile into a ring of whole rows in shared memory.
// When all of their warps have (an mbarrier), every row of the pooled output whose windows are there by now is computed
// and written, 16 bytes a thread, in training with 8 of codes. The next tile's products run before anyone writes over
// rows that are being pooled; another mbarrier says when that is allowed. A pixel in the ring has 16 bytes more than
// its channels take, so neither writing (stmatrix) nor pooling meets bank conflicts.
//
// With many images a band is an image. With few, the image is cut into bands that fill the card, each of which begins
// with the row that ends the band above: one row of the convolution is computed twice.
//
// The speed it should have is computed, not measured: nothing of this file has run on a card. Guesses are those of
// conv_relu_fwd.cu (40 bytes a cycle of L2, 128 of shared memory, 1.44 GHz, 132 multiprocessors, launches and first
// loads not counted). Pooling eight channels of an output reads 144 bytes of shared memory and takes 91 instructions,
// in training 185: shared memory binds in inference, issue slots in training, and products wait meanwhile. `two` is
// conv_relu_fwd.cu's prediction and, in inference, the pass of epilogue_fwd.cu (2.5 bytes an element at 2.1 TB/s).
//
//                 batch 1                 batch 128                                          batch 1024
//                 tile    bands  us       tile     tiles rounds L2 MB wgmma us us train two  rounds   us train two
//   conv1, folded 256x64     27   5       256x64      12    1.0   425       29 64    66  87     7.8  514   525 674
//   conv2         128x64     13  11       128x192      6    1.0   786       80 111  112 101     7.8  891   899 781
//   conv5         128x64      2  16       192x128      1    1.9   377       38  53   53  55    15.5  421   423 374
//   2012 conv5    128x64      2  12       192x128      1    1.9   283       29  40   40  44    15.5  319   321 296
//
// float32 by TF32 takes twice as many steps, and its rows twice the room: 128 x 64 for conv1, 128 x 128 for the others.
// Pooling compares one channel at a time, 128 instructions for four channels and their codes where 16 bits take 185 for
// eight.
//
// conv1 goes by conv_first_fwd.cu in 16 bits: 31 us at batch 128, and 232. So this one should win where tiles that
// begin with the image fit the card better than those that do not. It should lose in conv2: beside the ring there is no
// room for 256 x 192, and 128 x 192 waits for L2. Above 45 bytes a cycle, or with weights shared in a cluster
// (multicast: 28 KB a step for 40), it would not. At batch 1 it should lose in conv2 and conv5, whose depth
// conv_relu_fwd.cu cuts (4 and 3 us, and a pass). Which it is the card says.
#include "cuda/common/conv_first_sm90.cuh"
#include "cuda/common/conv_sm90_fwd.cuh"
#include "cuda/common/pool_fwd.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda::sm90 {
namespace {

constexpr int K = 3, S = 2;  // the window and its stride

// A pixel in the ring: 16 bytes longer than the tile is wide, so that neighbouring pixels begin in different
// banks.
template <class Tile>
constexpr int kPitch = Tile::kColumns + kVector<typename Tile::T>;

// ---------------------------------------------------------------- kernel

// Of the consumers' warps: a tile is in the ring; and what could be pooled is.
struct RowBarriers {
  Mbarrier written, pooled;
};

struct BandPlace : TilePlace {
  int64_t image;
  int32_t first, rows;  // of the pooled output: the band's
  int32_t done;         // pixels of the band in earlier tiles
};

struct StageArguments : Arguments {
  Divider bands;  // of an image: after columns and groups, before images
  Divider out_width;
  int64_t jobs;
  int32_t out_height, band_rows, ring_rows;
  void* y;
  uint8_t* code;  // or null

  template <class Tile>
  __device__ __forceinline__ BandPlace place(int64_t job) const {
    int64_t band;
    BandPlace at;
    at.image = bands.divide(columns_of<Tile>(job, at), band);
    at.first = static_cast<int32_t>(band) * band_rows;
    at.rows = min(band_rows, out_height - at.first);
    at.pixel =
        static_cast<int32_t>(at.image * walk.image.divisor) + at.first * S * static_cast<int32_t>(walk.row.divisor);
    at.done = 0;
    return at;
  }

  // Every gridDim-th band, from top to bottom.
  template <class Tile, class Body>
  __device__ __forceinline__ void for_tiles(Body&& body) const {
    const int32_t width = static_cast<int32_t>(walk.row.divisor);
    for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
      BandPlace at = place<Tile>(job);
      const int32_t pixels = ((at.rows - 1) * S + K) * width;
      for (; at.done < pixels; at.done += Tile::kRows) {
        body(at);
        at.pixel += Tile::kRows;
      }
    }
  }
};

// Pools rows [begin, end) of the band; `top` is where the first one's window begins, in rows of the ring.
template <class Tile, bool kCodes>
__device__ __forceinline__ void pool_rows(const StageArguments& args, const typename Tile::T* ring, const BandPlace& at,
                                          int32_t begin, int32_t end, int32_t top) {
  using T = typename Tile::T;
  constexpr int V = kVector<T>, kChunks = Tile::kColumns / V;
  constexpr uint32_t kBytes = 0x01010101;
  constexpr uint32_t kRowPlace[K] = {0, K * kBytes, 2 * K * kBytes}, kColumnPlace[K] = {0, kBytes, 2 * kBytes};
  const int64_t channels = args.groups.divisor * args.columns;
  const int64_t out = (at.image * args.out_height + at.first + begin) * args.out_width.divisor * channels +
                      int64_t{at.group} * args.columns + at.column;
  const int32_t items = (end - begin) * static_cast<int32_t>(args.out_width.divisor) * kChunks;
#pragma unroll 1
  for (int32_t item = threadIdx.x - 128; item < items; item += Tile::kThreads - 128) {
    const int32_t pixel = item / kChunks, column = item % kChunks * V;
    if (at.column + column >= args.columns) {
      continue;
    }
    uint32_t j;
    const int32_t i = args.out_width.divide_small(pixel, j);
    const T* line[K];
    Pack<T, V> x[K][K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int32_t row = top + S * i + k;
      row -= row >= args.ring_rows ? args.ring_rows : 0;
      line[k] = ring +
                (row * static_cast<int32_t>(args.walk.row.divisor) + S * static_cast<int32_t>(j)) * kPitch<Tile> +
                column;
#pragma unroll
      for (int w = 0; w < K; ++w) {
        x[k][w] = load<V>(line[k] + w * kPitch<Tile>);
      }
    }
    const int64_t to = out + pixel * channels + column;
    T* const y = static_cast<T*>(args.y);
    if constexpr (sizeof(T) == 4) {
      Best best[V];
#pragma unroll
      for (int c = 0; c < V; ++c) {
        best[c] = {element(x[0][0], c), 0};
#pragma unroll
        for (int k = 1; k < K * K; ++k) {
          best[c].take(element(x[k / K][k % K], c), k);
        }
      }
      store_best<true>(best, to, y, args.code);
    } else {
      const PackedBest<V> best = best_of_nine<T, V, kCodes>(x, kRowPlace, kColumnPlace);
      if (store_packed<true, kCodes, true>(best, 0, to, y, args.code) == 0) {
        continue;
      }
      // Rare: the place of a NaN, or in bfloat16 of 2^121 or more. Channel by channel.
#pragma unroll 1
      for (int c = 0; c < V; ++c) {
        Best of_channel[1] = {{-INFINITY, 0}};
#pragma unroll
        for (int k = 0; k < K * K; ++k) {
          of_channel[0].take(element(load<1>(line[k / K] + k % K * kPitch<Tile> + c), 0), k);
        }
        store_best<true>(of_channel, to + c, y, args.code);
      }
    }
  }
}

template <class Tile>
__device__ __forceinline__ void consume(const StageArguments& args, unsigned char* stages, Ring<Tile::kStages>& ring,
                                        RowBarriers& barriers) {
  using T = typename Tile::T;
  const int consumer = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  T* const rows = reinterpret_cast<T*>(stages + Tile::kStagesBytes);
  const int32_t ring_pixels = args.ring_rows * static_cast<int32_t>(args.walk.row.divisor);
  RingPlace<Tile::kStages> place;
  uint32_t parity = 0;
  int32_t pooled = 0, top = 0, begin = 0;  // rows of the band; in the ring, the next one's window and the next tile
  float sums[Tile::kHeight][Tile::kColumns / 2];
  args.template for_tiles<Tile>([&](const BandPlace& at) {
    multiply<Tile>(at, stages, ring, place, sums);
    if (at.done == 0) {
      pooled = top = begin = 0;
    }
    mbarrier_wait(&barriers.pooled, parity ^ 1);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; j += kSlab<T>) {
      if (at.column + j >= args.columns) {
        break;
      }
      float added[kSlab<T> / 4];
      load_bias<T>(args, at.group, at.column + j, added);
#pragma unroll
      for (int i = 0; i < Tile::kHeight; ++i) {
        store_sums<T>(sums[i], j, added, true, [&](int row, int column) {
          int32_t pixel = begin + (consumer * Tile::kHeight + i) * 64 + warp * 16 + row;
          pixel -= pixel >= ring_pixels ? ring_pixels : 0;
          return rows + pixel * kPitch<Tile> + j + column;
        });
      }
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(&barriers.written);
    }
    mbarrier_wait(&barriers.written, parity);
    // Rows of the convolution that are there as a whole hold windows that are there.
    const int32_t whole = static_cast<int32_t>(args.walk.row.divide(at.done + Tile::kRows));
    const int32_t ready = min((whole - K + S) / S, at.rows);
    if (ready > pooled) {
      if (args.code != nullptr) {
        pool_rows<Tile, true>(args, rows, at, pooled, ready, top);
      } else {
        pool_rows<Tile, false>(args, rows, at, pooled, ready, top);
      }
      top += S * (ready - pooled);
      top -= top >= args.ring_rows ? args.ring_rows : 0;
      pooled = ready;
    }
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(&barriers.pooled);
    }
    parity ^= 1;
    begin += Tile::kRows;
    begin -= begin >= ring_pixels ? ring_pixels : 0;
  });
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    conv_stage_fwd(const ALEXNET_FAST_GRID_CONSTANT StageArguments args) {
  unsigned char* const stages = dynamic_shared_at<kAlignment>();
  ALEXNET_FAST_SHARED(Ring<Tile::kStages>, ring);
  ALEXNET_FAST_SHARED(RowBarriers, barriers);
  if (threadIdx.x == 0) {
    mbarrier_init(&barriers.written, 4 * Tile::kConsumers);
    mbarrier_init(&barriers.pooled, 4 * Tile::kConsumers);
  }
  begin<Tile>(args, ring);
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce<Tile>(args, stages, ring);
    }
  } else {
    more_registers<Tile::kConsumers == 2 ? kConsumerRegisters : 160>();  // 128 at the start of 512 threads
    consume<Tile>(args, stages, ring, barriers);
  }
}

// ---------------------------------------------------------------- tiles and bands

// Rows of the convolution that the ring holds. As a tile begins, the first row that is still needed lies less than
// three rows above the one in which the tile begins. No more than the tiles of a band write.
template <class Tile>
int64_t ring_rows(int64_t width, int64_t band_rows) {
  const int64_t band = round_up(((band_rows - 1) * S + K) * width, Tile::kRows);
  return std::min<int64_t>((Tile::kRows - 2) / width + 4, ceil_div(band, width));
}

template <class Tile>
int64_t shared_bytes(int64_t width, int64_t band_rows) {
  return Tile::kStagesBytes + ring_rows<Tile>(width, band_rows) * width * kPitch<Tile> * sizeof(typename Tile::T) +
         kAlignment;
}

template <class Tile>
int launch_stage(const StageParams& p, const Convolution& c, int64_t band_rows, int multiprocessors, void* stream) {
  StageArguments args{};
  if (const int error = set_arguments<Tile>(c, args)) {
    return error;
  }
  args.bands = Divider(ceil_div(p.pooled_height, band_rows));
  args.out_width = Divider(p.pooled_width);
  args.jobs = p.conv.batch * args.bands.divisor * args.column_tiles.divisor * c.groups;
  args.out_height = static_cast<int32_t>(p.pooled_height);
  args.band_rows = static_cast<int32_t>(band_rows);
  args.ring_rows = static_cast<int32_t>(ring_rows<Tile>(p.conv.out_width, band_rows));
  args.y = p.pooled;
  args.code = p.code;
  return launch_early<90, conv_stage_fwd<Tile>>(dim3(std::min<int64_t>(args.jobs, multiprocessors)),
                                                dim3(Tile::kThreads), shared_bytes<Tile>(p.conv.out_width, band_rows),
                                                stream, args);
}

struct TileChoice {
  int depth, rows, columns;
  int64_t (*shared_bytes)(int64_t, int64_t);
  int (*launch)(const StageParams&, const Convolution&, int64_t, int, void*);
};

template <class Tile>
constexpr TileChoice choice() {
  return {Tile::kDepth, Tile::kRows, Tile::kColumns, shared_bytes<Tile>, launch_stage<Tile>};
}

// For AlexNet's first, second and fifth stage, and for few images of the latter two. Rows of float32 leave less room
// for stages: its first three are smaller, and two of them one.
template <class T>
constexpr TileChoice kHalfTiles[] = {
    choice<WgmmaTile<T, 3, 2, 64, 4>>(),
    choice<WgmmaTile<T, 4, 1, 192, 3>>(),
    choice<WgmmaTile<T, 4, 1, 128, 4, 3>>(),
    choice<WgmmaTile<T, 4, 1, 64, 6>>(),
};
template <class T>
constexpr TileChoice kTf32Tiles[] = {
    choice<WgmmaTile<T, 3, 1, 64, 4>>(),
    choice<WgmmaTile<T, 4, 1, 128, 3>>(),
    choice<WgmmaTile<T, 4, 1, 64, 6>>(),
};

struct Tiles {
  const TileChoice* first;
  int32_t count;
};

Tiles tiles_of(DType dtype) {
  return dtype == DType::f32
             ? Tiles{kTf32Tiles<float>, std::size(kTf32Tiles<float>)}
             : Tiles{dtype == DType::f16 ? kHalfTiles<f16> : kHalfTiles<bf16>, std::size(kHalfTiles<f16>)};
}

constexpr int64_t kSharedLimit = 226 * 1024;  // what a block of sm_90 may have, less its barriers

struct Plan {
  const TileChoice* tile = nullptr;
  int64_t band_rows = 0;
  double cycles = INFINITY;
};

// The tile, or the one that is asked for, and the bands with the least estimated time, in whole rounds of bands; of
// equal ones the larger bands. No tile if none takes the stage.
Plan choose(const StageParams& p, const Gather& g, int multiprocessors) {
  Plan best;
  const Tiles tiles = tiles_of(p.conv.dtype);
  for (int32_t i = 0; i < tiles.count; ++i) {
    const TileChoice& tile = tiles.first[i];
    if (p.conv.tile != 0 && i != p.conv.tile - 1) {
      continue;
    }
    const int64_t columns = ceil_div(p.conv.out_channels / p.conv.groups, int64_t{tile.columns}) * p.conv.groups;
    for (int64_t rows = p.pooled_height; rows > 0; --rows) {
      const int64_t jobs = p.conv.batch * columns * ceil_div(p.pooled_height, rows);
      const int64_t tiles_each = ceil_div(((rows - 1) * S + K) * p.conv.out_width, int64_t{tile.rows});
      const double time = static_cast<double>(ceil_div(jobs, int64_t{multiprocessors}) * tiles_each) * g.kernel_h *
                          g.kernel_w * cycles(g, p.conv.dtype, tile.depth, tile.rows, tile.columns);
      if (tile.shared_bytes(p.conv.out_width, rows) <= kSharedLimit && time < best.cycles) {
        best = {&tile, rows, time};
      }
    }
  }
  return best;
}

// Windows of 3 with stride 2 that all lie within the image, and no LRN.
bool pools(const StageParams& p) {
  return p.lrn.size == 0 && p.r == nullptr && overlapping_3_by_2(p.pool) && (p.pool.pad_h | p.pool.pad_w) == 0 &&
         (p.pooled_height - 1) * S + K <= p.conv.out_height && (p.pooled_width - 1) * S + K <= p.conv.out_width;
}

}  // namespace

// ---------------------------------------------------------------- launcher

int64_t conv_stage_fwd_workspace_bytes(const StageParams& p) { return forward_workspace_bytes(p.conv); }

int conv_stage_fwd(const StageParams& p, void* stream) {
  int multiprocessors;
  if (const int error = hopper_multiprocessors(multiprocessors)) {
    return error;
  }
  const int32_t own_tiles = tiles_of(p.conv.dtype).count;
  if (!covers(p.conv) || p.conv.tile < 0 || p.conv.tile > own_tiles + kFirstTiles) {
    return cudaErrorInvalidValue;
  }
  const Gather gather = input_gather(p.conv, input_fold(p.conv));
  if (!takes(p.conv.dtype, p.conv.allow_tf32, gather, p.conv.out_channels / p.conv.groups, p.conv.groups, p.pooled) ||
      !pools(p) || !aligned_16(p.code)) {
    return cudaErrorNotSupported;
  }
  const FirstPooling pooling{p.pooled_height, p.pooled_width, p.pooled, p.code};
  const bool own = p.conv.tile <= own_tiles, first = p.conv.tile == 0 || !own;
  const Plan plan = own ? choose(p, gather, multiprocessors) : Plan{};
  const FirstPlan first_plan = first ? plan_first(shape_of(p.conv, input_fold(p.conv)), pooling, multiprocessors,
                                                  std::max(p.conv.tile - own_tiles, 0))
                                     : FirstPlan{};
  if (plan.tile == nullptr && first_plan.tile == 0) {
    return cudaErrorNotSupported;
  }
  if (p.conv.batch == 0) {
    return cudaSuccess;
  }
  Convolution convolution;
  if (const int error = prepare(p.conv, stream, convolution)) {
    return error;
  }
  return first_plan.cycles < plan.cycles ? launch_first(convolution, pooling, first_plan, multiprocessors, stream)
                                         : plan.tile->launch(p, convolution, plan.band_rows, multiprocessors, stream);
}

}  // namespace alexnet_fast::cuda::sm90
