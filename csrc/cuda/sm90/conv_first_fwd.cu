// AlexNet's first convolution on Hopper: weights on the rows of the products and in registers, pixels on their columns,
// and an image that is read once (compute capability 9.0). Followed by bias and ReLU alone (conv_relu_fwd.cu hands it
// on), or by max-pooling too, by windows of 3 with stride 2 (conv_stage_fwd.cu).
//
// It takes, in 16 bits and one group, 3 x 3 taps with stride 1 over 33 to 48 channels, which is what 11 x 11 with
// stride 4 over 3 folds to (common/conv.cuh), and up to 128 filters.
//
//   weights    64 filters x 432 are 27 products of 64 x 16: 108 registers of each of a warpgroup's threads. They are
//              loaded once, for a block stays on its multiprocessor, and both of its warpgroups go through bands of
//              rows until none is left. More than 64 filters take both warpgroups, on the same bands.
//   image      A row comes by one copy of five axes, (8 channels, pixels, chunks of channels, rows, images), so that it
//              lies in shared memory as six planes of pixels of 16 bytes. Eight successive pixels of a plane are a core
//              matrix of an operand without swizzle, whichever pixel they begin with: the operand of the tap (r, s) is
//              row r of three from its pixel s on, 16 s bytes further. im2col is thus a matter of descriptors. Padding,
//              and channels past the last one, are zeros that the copy makes.
//   products   27 for a row of 56 pixels (or 64), one batch. Each of the block's warpgroups has a ring of six rows, of
//              which three are multiplied and three are on their way.
//   results    A warp's rows of the product are filters 2 g and 2 g + 1 in turn (load_weights): a lane's sums of a
//              pixel are neighbours in NHWC, and the 8 lanes of a pixel write a sector of 32 bytes. Nothing goes
//              through shared memory, and no warp waits for another one.
//   pooling    is maxima within the lane's registers, one shuffle for every two pixels, and a running maximum from row
//              to row (FirstPool). A band of pooled rows begins with the row that ends the band above: one row of the
//              convolution is computed twice.
//
// conv_relu_fwd.cu and conv_stage_fwd.cu, which bring each pixel once a tap, wait for L2 here. Shared memory gives 128
// bytes a cycle; a product of 64 x 56 x 16 takes 28 cycles, and reads 1792 bytes of pixels: 64 a cycle. Weights in
// shared memory would be 2048 more, 137 together, and bind.
//
// The speed it should have is computed, not measured: nothing of this file has run on a card. Guesses are those of
// conv_relu_fwd.cu (2048 multiply-adds a cycle, 40 bytes a cycle of L2, 1.44 GHz, 132 multiprocessors, the fold,
// launches and first loads not counted), and two of its own. What follows the products of a row takes 300 cycles, in
// which the other warpgroup's products run where it has any. And a copy's chunks of 16 bytes cost L2 a sector of 32
// each, and take two cycles at most: 696 for a row's 348, while its products take 756. us, of which 1.0 is for the
// weights (1.4 for 96 filters); `before` is what the other two files predict.
//
//                        batch 1               batch 128             batch 1024
//                        bands  us  before     bands  us  before     bands  us   before
//   conv1                   55  1.7     2.9        5  29.8     58        1  232     442
//   and pooling             27  3.2       5        3  30.9     66        1  232     525
//   2012 conv1, 96          55  2.6     2.9        1  59.2     69        1  463     530
//
// At batch 128 products are 28.9 us, L2 12.6, and what one warpgroup does alone 24.2. Writing conv1's output, 50 MB,
// takes 17 us at 3 TB/s. Of the columns 55 of 56 are of use. 96 filters leave a quarter of the rows empty: 32 filters
// of two rows of pixels in one product, whose depth is then four taps high, would take 90 products for two rows instead
// of 108.
#include "cuda/common/conv_first_sm90.cuh"
#include "cuda/common/conv_sm90_fwd.cuh"
#include "cuda/common/packed_max.cuh"
#include "cuda/common/pool.cuh"

namespace alexnet_fast::cuda::sm90 {
namespace {

constexpr int K = 3, S = 2;                              // the pooling window and its stride
constexpr int kTaps = 3;                                 // of the kernel, along either axis
constexpr int kSixteens = 3, kChunks = 2 * kSixteens;    // of depth in a tap; chunks of 16 bytes in a pixel
constexpr int kProducts = kTaps * kTaps * kSixteens;     // of a row
constexpr int kFilters = 64;                             // of a warpgroup
constexpr int kTapBytes = kFilters * kLine;              // its weights at a tap, in shared memory
constexpr int kWeightBytes = kTaps * kTaps * kTapBytes;  // and all of them
constexpr int kRingRows = 6;                             // of the image, for each warpgroup: three are multiplied
constexpr uint32_t kNan = 0x7fff;                        // above all other outputs of a ReLU, as integers

// kPixels: of a row, that a product takes.
template <class T_, int kPixels_>
struct FirstTile {
  using T = T_;
  static constexpr int kPixels = kPixels_, kPairs = kPixels / 8;  // pairs of them that a lane has
  static constexpr int kRead = kPixels + kTaps - 1;               // what their windows cover
  static constexpr int kPlane = kRead * kChunkBytes;              // a chunk of these
  static constexpr int kRowBytes = kChunks * kPlane;
  static constexpr int kSlot = (kRowBytes + 127) / 128 * 128;
  static constexpr int kRingBytes = kRingRows * kSlot;
};

// ---------------------------------------------------------------- the order of work

// A band of an image by a tile of columns.
struct FirstPlace {
  int32_t image, column, first, rows;  // first pixel of the rows, first row, and how many, of the convolution
};

struct FirstArguments {
  TensorMap x;       // (8 channels, width, chunks, height, images)
  TensorMap weight;  // (channels, taps, filters)
  Divider tiles, bands;
  uint32_t jobs;
  int32_t filter_tiles;                     // of 64: two take both warpgroups
  int32_t tile_step, band_step, band_rows;  // pixels from tile to tile; rows from band to band, and in one
  int32_t pad_h, pad_w;
  int32_t height, width;          // of the convolution's output: rows that are asked for, and its width
  int32_t out_height, out_width;  // of what is written
  int32_t columns;
  bool relu;
  const void* bias;  // or null
  void* y;
  uint8_t* code;

  // The jobs of a warpgroup: blocks come first, so that a few jobs lie in as many multiprocessors.
  template <class Body>
  __device__ __forceinline__ void for_jobs(int warpgroup, Body&& body) const {
    const bool apart = filter_tiles == 1;
    const uint32_t step = apart ? 2 * gridDim.x : gridDim.x;
    for (uint32_t job = blockIdx.x + (apart ? warpgroup * gridDim.x : 0); job < jobs; job += step) {
      uint32_t tile, band;
      FirstPlace at;
      at.image = static_cast<int32_t>(bands.divide_small(tiles.divide_small(job, tile), band));
      at.column = static_cast<int32_t>(tile) * tile_step;
      at.first = static_cast<int32_t>(band) * band_step;
      at.rows = min(band_rows, height - at.first);
      body(at);
    }
  }
};

struct FirstBarriers {
  Mbarrier weights;
  Ring<kRingRows> rings[kConsumers];
};

// ---------------------------------------------------------------- producers

template <class Tile>
__device__ __forceinline__ void produce_rows(const FirstArguments& args, int warpgroup, unsigned char* rows,
                                             Ring<kRingRows>& ring) {
  RingPlace<kRingRows> place;
  args.for_jobs(warpgroup, [&](const FirstPlace& at) {
#pragma unroll 1
    for (int32_t row = 0; row < at.rows + kTaps - 1; ++row) {
      mbarrier_wait(ring.empty + place.stage, place.parity ^ 1);
      mbarrier_expect(ring.full + place.stage, Tile::kRowBytes);
      bulk_load(rows + place.stage * Tile::kSlot, args.x, ring.full + place.stage,
                {0, at.column - args.pad_w, 0, at.first + row - args.pad_h, at.image});
      place.advance();
    }
  });
}

// ---------------------------------------------------------------- consumers

// A warp's 16 rows of A are its 16 filters in an order of their own: row g is filter 2 g, and row g + 8 filter 2 g + 1.
// So a lane's sums of a pixel belong to neighbours in NHWC, and a warp's store fills whole sectors.
__device__ __forceinline__ void load_weights(const unsigned char* taps, uint32_t (&weights)[kProducts][4]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int filter = 16 * warp + 2 * (lane % 8) + lane / 8 % 2;
#pragma unroll
  for (int product = 0; product < kProducts; ++product) {
    const int chunk = 2 * (product % kSixteens) + lane / 16;
    load_matrix(weights[product],
                taps + product / kSixteens * kTapBytes + filter * kLine + (chunk ^ filter % 8) * kChunkBytes);
  }
}

// A lane's two filters; a word holds what both have of one pixel.
struct FirstFilters {
  int32_t first;
  bool there;
  float bias[2];
  bool relu;

  template <class T>
  __device__ __forceinline__ uint32_t finish(float a, float b) const {
    a += bias[0];
    b += bias[1];
    return pack_pair<T>(relu && a <= 0 ? 0 : a, relu && b <= 0 ? 0 : b);
  }
};

// words[j][e]: pixel 8 j + 2 t + e, of which sums[4 j + 2 h + e] is filter h.
template <class T, int kPairs>
__device__ __forceinline__ void finish_row(const float (&sums)[4 * kPairs], const FirstFilters& filters,
                                           uint32_t (&words)[kPairs][2]) {
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      words[j][e] = filters.finish<T>(sums[4 * j + e], sums[4 * j + 2 + e]);
    }
  }
}

// The pixel behind each pair is the first one of the next lane's pair, or behind the fourth lane's that of the first
// lane's next one. Behind the tile's last pair there is none.
template <int kPairs>
__device__ __forceinline__ void pixels_behind(const uint32_t (&words)[kPairs][2], uint32_t (&behind)[kPairs]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const uint32_t next = j + 1 < kPairs ? words[j + 1][0] : 0;
    behind[j] = __shfl_sync(0xffffffff, lane % 4 == 0 ? next : words[j][0], lane / 4 * 4 + (lane + 1) % 4);
  }
}

template <class Tile>
__device__ __forceinline__ void write_row(const FirstArguments& args, const FirstPlace& at, int32_t row,
                                          const float (&sums)[4 * Tile::kPairs], const FirstFilters& filters) {
  using T = typename Tile::T;
  const int64_t line = (int64_t{at.image} * args.height + at.first + row) * args.width;
  T* const y = static_cast<T*>(args.y) + filters.first;
  uint32_t words[Tile::kPairs][2];
  finish_row<T>(sums, filters, words);
#pragma unroll
  for (int j = 0; j < Tile::kPairs; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t column = at.column + 8 * j + threadIdx.x % 4 * 2 + e;
      if (filters.there && column < args.width) {
        store(y + (line + column) * args.columns, Pack<T, 2>{{words[j][e]}});
      }
    }
  }
}

// Max-pooling in registers. A lane has pairs of columns of the convolution, (2 q, 2 q + 1), of two filters: with the
// column behind them that is the window of q. Rows come one after the other: an odd one is a window's middle, an even
// one ends a window and begins the next.
//
// Without codes a window's two maxima are halves of a word. With codes each is a number of 32 bits, its own bits above
// and below them 8 - place, of NaN 8 + place: the largest number is the window's maximum, of equal ones the first, and
// of several NaN the last one. Places are counted in the row, and moved to the window's row as rows meet.
template <class Tile, bool kCodes>
struct FirstPool {
  using T = typename Tile::T;
  static constexpr int kPairs = Tile::kPairs;
  static constexpr int kEach = kCodes ? 2 : 1;

  uint32_t best[kPairs][kEach];

  static __device__ __forceinline__ uint32_t key(uint32_t word, int half, uint32_t tag) {
    return (half == 0 ? word << 16 : word & 0xffff0000) | tag;
  }

  // Of a row that is the window's i-th.
  static __device__ __forceinline__ uint32_t moved(uint32_t of_row, uint32_t i) {
    return kCodes ? (of_row >= kNan << 16 ? of_row + K * i : of_row - K * i) : of_row;
  }

  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b, uint32_t c) {
    return kCodes ? max(max(a, b), c) : max_of_rectified<T>(a, b, c);
  }

  static __device__ __forceinline__ void best_of_row(const uint32_t (&words)[kPairs][2],
                                                     uint32_t (&of_row)[kPairs][kEach]) {
    uint32_t behind[kPairs];
    pixels_behind(words, behind);
    uint32_t most = 0;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      if constexpr (kCodes) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          of_row[j][h] = larger(key(words[j][0], h, 8), key(words[j][1], h, 7), key(behind[j], h, 6));
          most = max(most, of_row[j][h]);
        }
      } else {
        of_row[j][0] = larger(words[j][0], words[j][1], behind[j]);
      }
    }
    if (kCodes && most >= kNan << 16) {  // rare
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
          if (of_row[j][h] >= kNan << 16) {
            const uint32_t place = key(behind[j], h, 0) >= kNan << 16 ? 2 : key(words[j][1], h, 0) >= kNan << 16;
            of_row[j][h] = kNan << 16 | (8 + place);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void take(const FirstArguments& args, const FirstPlace& at, int32_t row,
                                       const float (&sums)[4 * kPairs], const FirstFilters& filters) {
    uint32_t words[kPairs][2], of_row[kPairs][kEach];
    finish_row<T>(sums, filters, words);
    best_of_row(words, of_row);
    const bool middle = row % S == 1, ends = !middle && row > 0;
    if (row > 0) {
      const uint32_t i = middle ? 1 : 2;
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
          const uint32_t here = moved(of_row[j][h], i);
          best[j][h] = larger(best[j][h], here, here);
        }
      }
    }
    if (ends) {
      write(args, at, (at.first + row) / S - 1, filters);
    }
    if (!middle) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
#pragma unroll
        for (int h = 0; h < kEach; ++h) {
          best[j][h] = of_row[j][h];
        }
      }
    }
  }

  __device__ __forceinline__ void write(const FirstArguments& args, const FirstPlace& at, int32_t row,
                                        const FirstFilters& filters) const {
    const int64_t line = (int64_t{at.image} * args.out_height + row) * args.out_width;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int32_t pair = 4 * j + threadIdx.x % 4, column = at.column / S + pair;
      if (filters.there && pair < Tile::kPixels / 2 - 1 && column < args.out_width) {
        const int64_t to = (line + column) * args.columns + filters.first;
        T* const y = static_cast<T*>(args.y) + to;
        if constexpr (kCodes) {
          int32_t places[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int32_t tag = static_cast<int32_t>(best[j][h] & 0xffff) - 8;
            places[h] = best[j][h] >> 16 == 0 ? kClosed : tag < 0 ? -tag : tag;
          }
          store(y, Pack<T, 2>{{best[j][0] >> 16 | (best[j][1] & 0xffff0000)}});
          store(args.code + to, pack_bytes(places));
        } else {
          store(y, Pack<T, 2>{{best[j][0]}});
        }
      }
    }
  }
};

template <class Tile, bool kPools, bool kCodes>
__device__ __forceinline__ void consume(const FirstArguments& args, int warpgroup, const unsigned char* taps,
                                        const unsigned char* rows, FirstBarriers& barriers) {
  using T = typename Tile::T;
  const int filter_tile = args.filter_tiles == 1 ? 0 : warpgroup, lane = threadIdx.x % 32;
  FirstFilters filters;
  filters.first = filter_tile * kFilters + threadIdx.x / 32 % 4 * 16 + lane / 4 * 2;
  filters.there = filters.first < args.columns;
  filters.relu = args.relu;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    filters.bias[h] =
        args.bias != nullptr && filters.there ? to_float(static_cast<const T*>(args.bias)[filters.first + h]) : 0;
  }
  uint32_t weights[kProducts][4];
  mbarrier_wait(&barriers.weights, 0);
  load_weights(taps + filter_tile * kWeightBytes, weights);

  Ring<kRingRows>& ring = barriers.rings[warpgroup];
  RingPlace<kRingRows> newest, oldest;  // rows that are still to come, and to be given back
  const auto await_row = [&] {
    mbarrier_wait(ring.full + newest.stage, newest.parity);
    newest.advance();
  };
  const auto give_back_row = [&] {
    if (lane == 0) {
      mbarrier_arrive(ring.empty + oldest.stage);
    }
    oldest.advance();
  };
  float sums[4 * Tile::kPairs];
  FirstPool<Tile, kCodes> pool;
  args.for_jobs(warpgroup, [&](const FirstPlace& at) {
#pragma unroll
    for (int r = 0; r < kTaps - 1; ++r) {
      await_row();
    }
#pragma unroll 1
    for (int32_t row = 0; row < at.rows; ++row) {
      await_row();
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < kTaps; ++r) {
        const uint32_t stage = oldest.stage + r, slot = stage < kRingRows ? stage : stage - kRingRows;
        const uint64_t first = plain_descriptor(rows + slot * Tile::kSlot, Tile::kPlane, 8 * kChunkBytes);
#pragma unroll
        for (int s = 0; s < kTaps; ++s) {
#pragma unroll
          for (int sixteen = 0; sixteen < kSixteens; ++sixteen) {
            const int product = (r * kTaps + s) * kSixteens + sixteen;
            wgmma<T, Tile::kPixels>(sums, weights[product], first + (sixteen * 2 * Tile::kPlane + s * kChunkBytes) / 16,
                                    product != 0);
          }
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_done(sums);
      give_back_row();
      if constexpr (kPools) {
        pool.take(args, at, row, sums, filters);
      } else {
        write_row<Tile>(args, at, row, sums, filters);
      }
    }
#pragma unroll
    for (int r = 0; r < kTaps - 1; ++r) {
      give_back_row();
    }
  });
}

// ---------------------------------------------------------------- kernel

template <class Tile, bool kPools, bool kCodes>
__global__ void __launch_bounds__(kThreads, 1) conv_first_fwd(const ALEXNET_FAST_GRID_CONSTANT FirstArguments args) {
  unsigned char* const taps = dynamic_shared_at<kAlignment>();
  unsigned char* const rows = taps + args.filter_tiles * kWeightBytes;
  ALEXNET_FAST_SHARED(FirstBarriers, barriers);
  if (threadIdx.x == 0) {
    prefetch_map(args.x);
    prefetch_map(args.weight);
    // Into L2 and no further, as conv_sm90_fwd.cuh's begin() says.
#pragma unroll 1
    for (int32_t tap = 0; blockIdx.x == 0 && tap < args.filter_tiles * kTaps * kTaps; ++tap) {
      bulk_prefetch(args.weight, {0, tap % (kTaps * kTaps), tap / (kTaps * kTaps) * kFilters, 0});
    }
    mbarrier_init(&barriers.weights, 1);
#pragma unroll
    for (Ring<kRingRows>& ring : barriers.rings) {
#pragma unroll
      for (int row = 0; row < kRingRows; ++row) {
        mbarrier_init(ring.full + row, 1);
        mbarrier_init(ring.empty + row, 4);
      }
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  dependency_wait();
  launch_dependents();
  if (threadIdx.x < 128) {
    fewer_registers<kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      mbarrier_expect(&barriers.weights, args.filter_tiles * kWeightBytes);
#pragma unroll 1
      for (int32_t tap = 0; tap < args.filter_tiles * kTaps * kTaps; ++tap) {
        bulk_load(taps + tap * kTapBytes, args.weight, &barriers.weights,
                  {0, tap % (kTaps * kTaps), tap / (kTaps * kTaps) * kFilters, 0});
      }
    }
    if (warp < kConsumers && threadIdx.x % 32 == 0) {
      produce_rows<Tile>(args, warp, rows + warp * Tile::kRingBytes, barriers.rings[warp]);
    }
  } else {
    more_registers<kConsumerRegisters>();
    const int warpgroup = threadIdx.x / 128 - 1;
    consume<Tile, kPools, kCodes>(args, warpgroup, taps, rows + warpgroup * Tile::kRingBytes, barriers);
  }
}

// ---------------------------------------------------------------- tiles and bands

struct FirstGrid {
  int64_t tiles, bands, tile_step, band_step, band_rows, height;

  FirstGrid(const Convolution& c, const FirstPooling& pooling, int pixels, int64_t rows) {
    const bool pools = pooling.height > 0;
    const int64_t width = pools ? pooling.width : c.gather.row.divisor;
    const int64_t tile = pools ? pixels / S - 1 : pixels;
    const int64_t out_height = pools ? pooling.height : c.gather.image.divisor / c.gather.row.divisor;
    tiles = ceil_div(width, tile);
    bands = ceil_div(out_height, rows);
    tile_step = pools ? S * tile : tile;
    band_step = pools ? S * rows : rows;
    band_rows = pools ? (rows - 1) * S + K : rows;
    height = pools ? (pooling.height - 1) * S + K : out_height;
  }
};

template <class Tile, bool kPools, bool kCodes>
int launch_tile(const Convolution& c, const FirstPooling& pooling, int64_t rows, int multiprocessors, void* stream) {
  const Gather& g = c.gather;
  const FirstGrid grid(c, pooling, Tile::kPixels, rows);
  const uint64_t images = g.pixels / g.image.divisor, channels = channels_of(g, c.dtype), k = c.columns;
  FirstArguments args{};
  if (const int error = encode_tiled<5, Swizzle::none>(
          args.x, Elements::bits16, c.x, {8, uint64_t(g.width), uint64_t(g.chunks), uint64_t(g.height), images},
          {uint64_t(g.pixel_stride), kChunkBytes, uint64_t(g.line_stride), uint64_t(g.image_stride)},
          {8, uint32_t(Tile::kRead), kChunks, 1, 1})) {
    return error;
  }
  constexpr uint64_t kAllTaps = kTaps * kTaps;
  if (const int error = encode_tiled<4>(args.weight, Elements::bits16, c.weight, {channels, kAllTaps, k, 1},
                                        {channels * 2, kAllTaps * channels * 2, k * kAllTaps * channels * 2},
                                        {kSlab<typename Tile::T>, 1, kFilters, 1})) {
    return error;
  }
  args.tiles = Divider(grid.tiles);
  args.bands = Divider(grid.bands);
  args.jobs = static_cast<uint32_t>(grid.tiles * grid.bands * images);  // no more than there are pixels
  args.filter_tiles = static_cast<int32_t>(ceil_div(c.columns, int64_t{kFilters}));
  args.tile_step = static_cast<int32_t>(grid.tile_step);
  args.band_step = static_cast<int32_t>(grid.band_step);
  args.band_rows = static_cast<int32_t>(grid.band_rows);
  args.pad_h = g.pad_h;
  args.pad_w = g.pad_w;
  args.height = static_cast<int32_t>(grid.height);
  args.width = static_cast<int32_t>(g.row.divisor);
  args.out_height = static_cast<int32_t>(pooling.height);
  args.out_width = static_cast<int32_t>(pooling.width);
  args.columns = static_cast<int32_t>(c.columns);
  args.relu = c.relu;
  args.bias = c.bias;
  args.y = kPools ? pooling.y : c.y;
  args.code = pooling.code;
  const int64_t blocks = std::min<int64_t>(args.jobs, multiprocessors);
  const size_t shared = args.filter_tiles * kWeightBytes + kConsumers * Tile::kRingBytes + kAlignment;
  return launch_early<90, conv_first_fwd<Tile, kPools, kCodes>>(dim3(blocks), dim3(kThreads), shared, stream, args);
}

struct FirstChoice {
  int pixels;
  int (*launch)(const Convolution&, const FirstPooling&, int64_t, int, void*);
};

template <class T, bool kPools, bool kCodes>
constexpr FirstChoice kChoices[] = {{56, launch_tile<FirstTile<T, 56>, kPools, kCodes>},
                                    {64, launch_tile<FirstTile<T, 64>, kPools, kCodes>}};

template <class T>
const FirstChoice* choices(const FirstPooling& pooling) {
  return pooling.height == 0       ? kChoices<T, false, false>
         : pooling.code == nullptr ? kChoices<T, true, false>
                                   : kChoices<T, true, true>;
}

// Estimated: as long as the products of a multiprocessor's warpgroups take, or one of them with what follows its
// products, or the rows' bytes out of L2, in sectors of 32 bytes of which a chunk is half; and at first the weights.
double first_cycles(const Convolution& c, const FirstPooling& pooling, int pixels, int64_t rows,
                    int64_t multiprocessors) {
  constexpr double kFollows = 300;  // of a row: a guess
  const FirstGrid grid(c, pooling, pixels, rows);
  const int64_t images = c.gather.pixels / c.gather.image.divisor;
  const int64_t filter_tiles = ceil_div(c.columns, int64_t{kFilters});
  const int64_t jobs = ceil_div(grid.tiles * grid.bands * images, multiprocessors);  // of a multiprocessor
  const double products = double(kProducts) * pixels / 2, all = double(jobs * filter_tiles);
  const double of_rows = all * grid.band_rows * products;
  const double of_one = ceil_div(jobs * filter_tiles, int64_t{kConsumers}) * grid.band_rows * (products + kFollows);
  const double of_bytes =
      all * (grid.band_rows + kTaps - 1) * (pixels + kTaps - 1) * kChunks * 2 * kChunkBytes / kL2Bytes;
  const double weights = double(c.columns) * kTaps * kTaps * channels_of(c.gather, c.dtype) * 2 / kL2Bytes;
  return std::max({of_rows, of_one, of_bytes}) + weights;
}

}  // namespace

// ---------------------------------------------------------------- what launchers call

FirstPlan plan_first(const Convolution& c, const FirstPooling& pooling, int multiprocessors, int32_t tile) {
  const Gather& g = c.gather;
  FirstPlan best;
  if (c.dtype == DType::f32 || c.groups != 1 || c.columns > 2 * kFilters || g.kernel_h != kTaps ||
      g.kernel_w != kTaps || (g.dilation_h | g.dilation_w) != 1 || g.chunks < kChunks - 1 || g.chunks > kChunks) {
    return best;
  }
  constexpr int64_t kFinest = 8;  // jobs of a multiprocessor, beyond which smaller bands bring nothing
  const FirstChoice* const tiles = choices<bf16>(pooling);
  const int64_t height = pooling.height > 0 ? pooling.height : g.image.divisor / g.row.divisor;
  for (int32_t number = 1; number <= kFirstTiles; ++number) {
    const int pixels = tiles[number - 1].pixels;
    for (int64_t bands = 1; bands <= height && (tile == 0 || tile == number); ++bands) {
      const int64_t rows = ceil_div(height, bands);
      const double cycles = first_cycles(c, pooling, pixels, rows, multiprocessors);
      if (cycles < best.cycles) {
        best = {number, rows, cycles};
      }
      if (bands * g.pixels > kFinest * multiprocessors * g.image.divisor) {
        break;
      }
    }
  }
  return best;
}

int launch_first(const Convolution& c, const FirstPooling& pooling, const FirstPlan& plan, int multiprocessors,
                 void* stream) {
  const FirstChoice* const tiles = c.dtype == DType::f16 ? choices<f16>(pooling) : choices<bf16>(pooling);
  return tiles[plan.tile - 1].launch(c, pooling, plan.band_rows, multiprocessors, stream);
}

}  // namespace alexnet_fast::cuda::sm90
