// Backward of AlexNet's stages over NCHW planes, for epilogue_bwd.cu; common/lrn_pool_bwd.cuh has NHWC. A block takes a
// tile (common/lrn_planes.cuh): the rows of x, dy and codes of a chunk of channels in shared memory. Within its slice
// of them a thread has a patch of 2 x 2 pixels, gathers the pool's gradient of all four from the windows over them, as
// gather_patch does, and takes LRN's backward of each (common/lrn_bwd_walk.cuh).
#pragma once

#include "cuda/common/lrn_bwd_walk.cuh"
#include "cuda/common/pool.cuh"

namespace alexnet_fast::cuda {

// How many threads a block has at most: all lanes of four slices of 56 patches have work. Two blocks of them leave a
// thread 128 registers.
constexpr int kLrnPoolThreads = 224;

// Elements from one row in shared memory to the next.
struct RowsApart {
  int32_t x, dy, code;
};

// Of tiles of AlexNet's stages, 4 rows of 55 pixels and 8 of 27 under 3 and 5 rows of windows: known when compiled, so
// that a walk's addresses are one for each pixel and window, whatever the channel.
template <class T>
struct AlexNetApart {
  static constexpr int32_t x = sizeof(T) == 4 ? 225 : 233, dy = sizeof(T) == 4 ? 85 : 89, code = 105;

  static bool is(const RowsApart& rows) { return rows.x == x && rows.dy == dy && rows.code == code; }

  // Rows that lie no further apart, and as these within 16 bytes, may lie as far.
  static RowsApart widened(const RowsApart& rows) {
    const auto may = [](int32_t own, int32_t wanted, int32_t V) { return own <= wanted && (wanted - own) % V == 0; };
    return may(rows.x, x, kVector<T>) && may(rows.dy, dy, kVector<T>) && may(rows.code, code, kVector<uint8_t>)
               ? RowsApart{x, dy, code}
               : rows;
  }
};

template <class T>
struct LrnPoolTiles {
  static constexpr int32_t kHalo = 2, kStep = PlaneTiles::kStep;
  static constexpr int32_t kLongestSlice = 24;
  static constexpr int64_t kMostBytes = 76 * 1024;  // two blocks on sm_80
  // Of a row of x, dy or codes, and what each lane has.
  static constexpr int kVectors = sizeof(T), kLanes = 16, kDyLanes = 8, kCodeVectors = 2, kCodeLanes = 4;

  PlaneTiles x, dy, code;
  RowsApart apart;
  int32_t channels, height, width, out_height, out_width;
  int32_t rows, slice, slices;  // of a tile, an even number; channels of a slice
  Divider lanes, columns;       // of a slice, and of a row of patches
  int32_t dy_at, code_at, bytes;
  bool fit;

  explicit LrnPoolTiles(const EpilogueParams& p)
      : x(shape(p, p.height * p.width), p.lrn.groups, kStep),
        dy(shape(p, p.out_height * p.out_width), p.lrn.groups, kStep),
        code(dy),
        channels(static_cast<int32_t>(p.channels)),
        height(static_cast<int32_t>(p.height)),
        width(static_cast<int32_t>(p.width)),
        out_height(static_cast<int32_t>(p.out_height)),
        out_width(static_cast<int32_t>(p.out_width)),
        columns(ceil_div<int64_t>(p.width, 2)),
        fit(false) {
    const int64_t pairs = ceil_div<int64_t>(p.height, 2);
    for (int64_t bands = 1; bands <= pairs && !fit; ++bands) {
      const int64_t in_band = ceil_div(pairs, bands), outputs = (in_band + 1) * p.out_width;
      const int64_t pixels = std::min(2 * in_band, p.height) * p.width;
      if (in_band * columns.divisor <= kLrnPoolThreads &&
          pixels <= PlaneTiles::longest_run(sizeof(T), kVectors * kLanes) &&
          outputs <= PlaneTiles::longest_run(sizeof(T), kVectors * kDyLanes) &&
          outputs <= PlaneTiles::longest_run(1, kCodeVectors * kCodeLanes)) {
        rows = static_cast<int32_t>(2 * in_band);
        x.cut(pixels, sizeof(T));
        dy.cut(outputs, sizeof(T));
        code.cut(outputs, 1);
        apart = AlexNetApart<T>::widened({x.stride, dy.stride, code.stride});
        x.stride = apart.x;
        dy.stride = apart.dy;
        code.stride = apart.code;
        lanes = Divider(ceil_div<int64_t>(in_band * columns.divisor, kSumLanes) * kSumLanes);
        share_channels(p);
      }
    }
  }

  // Whether the kernel takes that stage.
  static bool take(const EpilogueParams& p, const LrnShape& shape) {
    return PlaneTiles::take<true>(shape, p.lrn) && overlapping_3_by_2(p.window) && windows_inside(p) &&
           alike_in_16(static_cast<const T*>(p.r), static_cast<const T*>(p.dz)) && LrnPoolTiles(p).fit;
  }

  dim3 block() const {
    constexpr int32_t kCopyWarps = 3;  // one at least for each tensor
    return dim3(32 * std::max(ceil_div<int32_t>(slices * lanes.divisor, 32), kCopyWarps));
  }

 private:
  static LrnShape shape(const EpilogueParams& p, int64_t pixels) {
    return {p.dtype, false, p.batch, p.channels, pixels};
  }

  // The slices that cost least, among those that fit: a thread's place takes as long as some four channels, and the
  // channels before a slice as some three.
  void share_channels(const EpilogueParams& p) {
    constexpr int64_t kBefore = 7;
    int64_t least = INT64_MAX;
    for (int32_t length = kLongestSlice; length > 0; length -= kStep) {
      const int64_t most = kLrnPoolThreads / lanes.divisor * length;
      const PlaneTiles tiles(shape(p, p.height * p.width), p.lrn.groups, most);
      const int32_t number = ceil_div(tiles.chunk, length), count = tiles.chunk + 2 * kHalo;
      const int32_t dy_begin = x.bytes(count + 2 * kHalo, sizeof(T)),
                    code_begin = dy_begin + dy.bytes(count, sizeof(T));
      const int32_t end = code_begin + code.bytes(count, 1);
      const int64_t cost = tiles.chunks.divisor * ceil_div<int64_t>(number * lanes.divisor, 32) * (length + kBefore);
      if (end > kMostBytes || cost >= least) {
        continue;
      }
      least = cost;
      fit = true;
      slice = length;
      slices = number;
      dy_at = dy_begin;
      code_at = code_begin;
      bytes = end;
      for (PlaneTiles* some : {&x, &dy, &code}) {
        some->chunk = tiles.chunk;
        some->in_group = tiles.in_group;
        some->chunks = tiles.chunks;
      }
    }
  }
};

// The gradient of a patch of 2 x 2 pixels, gathered from the windows over them as gather_patch does.
template <class T, class Apart>
struct PatchGradient {
  static constexpr int K = 3, S = 2, kPixels = kSlicePixels;

  const Apart apart;
  const T* dy[kPixels];  // of the window that begins with the patch, of those on the left, above, and between
  const uint8_t* code[kPixels];
  uint32_t places[K * K];  // codes of the patch's pixels; of windows that are not there nobody's

  // Of the patch in that row and column of the image. Windows that are not there are read as the nearest ones that are.
  __device__ __forceinline__ PatchGradient(const LrnPoolTiles<T>& tiles, const Apart& apart, int32_t row,
                                           int32_t column, int32_t out_begin, const T* dy_row, const uint8_t* code_row)
      : apart(apart) {
    constexpr uint32_t kNobody = 1 << 10;
#pragma unroll
    for (int i = 0; i < S; ++i) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const int32_t h = row - i, w = column - j;
        const int32_t near_h = min(max(h, 0), tiles.out_height - 1), near_w = min(max(w, 0), tiles.out_width - 1);
        const int32_t window = (near_h - out_begin) * tiles.out_width + near_w;
        dy[i * S + j] = dy_row + window;
        code[i * S + j] = code_row + window;
#pragma unroll
        for (int k = i * S; k < i * S + S && k < K; ++k) {
#pragma unroll
          for (int l = j * S; l < j * S + S && l < K; ++l) {
            places[k * K + l] = h == near_h && w == near_w ? k * K + l : kNobody;
          }
        }
      }
    }
  }

  __device__ __forceinline__ void at(int n, float (&sums)[kPixels]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const uint32_t place = code[i * S + j][n * apart.code];
        const float value = to_float(dy[i * S + j][n * apart.dy]);
#pragma unroll
        for (int h = 0; h + i * S < K && h < S; ++h) {
#pragma unroll
          for (int w = 0; w + j * S < K && w < S; ++w) {
            const bool own = place == places[(h + i * S) * K + w + j * S];
            float& sum = sums[h * S + w];
            sum = i + j == 0 ? (own ? value : 0.0f) : own ? sum + value : sum;
          }
        }
      }
    }
  }

  // Through no window a pixel that is not there has no gradient.
  __device__ __forceinline__ float none_up_to(int /*p*/) const { return 0; }

  __device__ __forceinline__ void go_on(int n) {
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      dy[p] += n * apart.dy;
      code[p] += n * apart.code;
    }
  }
};

template <class T, class Apart>
__global__ void __launch_bounds__(kLrnPoolThreads, 2)
    lrn_pool_bwd_planes(const T* __restrict__ x, const T* __restrict__ dy, const uint8_t* __restrict__ code,
                        T* __restrict__ dx, float* __restrict__ partial, LrnPoolTiles<T> tiles, Apart apart,
                        LrnOfFive lrn) {
  using Tiles = LrnPoolTiles<T>;
  constexpr int Halo = Tiles::kHalo, kStep = Tiles::kStep;
  constexpr int kSummed = std::is_same_v<Apart, RowsApart> ? 4 : 8;  // channels at once; addresses take registers too
  using Sums = float[kLrnPoolThreads / kSumLanes * Tiles::kLongestSlice];
  ALEXNET_FAST_SHARED(Sums, sums);  // a row of channels for each group of lanes of a slice
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
  // Of seven warps four copy x, two dy and one the codes, which have so many vectors, and each finds its place once.
  const int32_t warps = blockDim.x / 32, of_dy = (warps + 1) / 4, of_x = warps - 1 - of_dy;
  if (const Crew crew(0, of_x); crew.has_this()) {
    tile.template fetch<Tiles::kLanes, Tiles::kVectors>(x_rows, x, first - Halo, count + 2 * Halo, crew);
  } else if (const Crew crew(of_x, of_dy); crew.has_this()) {
    dy_tile.template fetch<Tiles::kDyLanes, Tiles::kVectors>(dy_rows, dy, first, count, crew);
  } else {
    code_tile.template fetch<Tiles::kCodeLanes, Tiles::kCodeVectors>(code_rows, code, first, count, Crew(warps - 1, 1));
  }

  uint32_t lane;
  const int32_t slice = tiles.lanes.divide_small(threadIdx.x, lane);
  const int32_t patches = ceil_div(tile_rows, 2) * static_cast<int32_t>(tiles.columns.divisor);
  const int32_t before = slice * tiles.slice, begin = tile.begin + before, end = min(begin + tiles.slice, tile.end);
  const bool active = static_cast<int32_t>(lane) < patches && begin < end && slice < tiles.slices;
  const int32_t patch = min(static_cast<int32_t>(lane), patches - 1);
  uint32_t column;
  const int32_t row = tiles.columns.divide_small(patch, column);
  const PatchGradient<T, Apart> gradient(tiles, apart, first_row / 2 + row, column, out_begin,
                                         dy_rows + before * apart.dy, code_rows + before * apart.code);
  SliceWalk<T, Apart, PatchGradient<T, Apart>, true> walk(lrn, apart, gradient);
#pragma unroll
  for (int p = 0; p < kSlicePixels; ++p) {
    const int32_t h = 2 * row + p / 2, w = 2 * static_cast<int32_t>(column) + p % 2;
    walk.x[p] = x_rows + before * apart.x + min(h, tile_rows - 1) * tiles.width + min(w, tiles.width - 1);
  }
  await_runs();
  if (active) {
    walk.begin();
  }
  __syncthreads();
  const int32_t in_row = tiles.slices * tiles.slice;
  SliceSums<kSummed> own_sums(sums, in_row, lane, before, slice < tiles.slices);
  float totals[kSummed] = {};  // which stay 0 where there is no patch
#pragma unroll 1
  for (int32_t c = 0; c < tiles.slice; c += kSummed) {
    if (active && begin + c < end) {
      walk.next(totals);
    }
    if (partial != nullptr) {
      own_sums.add(totals);
    }
  }
  __syncthreads();
  // dx of a channel lies where x of the fourth one after it was: of 16 bits four elements off a multiple of eight.
  tile.template put<Tiles::kLanes, Tiles::kVectors, sizeof(T) == 2>(x_rows + 4 * Halo * apart.x, dx);
  if (partial != nullptr) {
    store_slice_sums(tile, sums, in_row, static_cast<int32_t>(tiles.lanes.divisor) / kSumLanes, tiles.channels,
                     partial);
  }
}

// ---------------------------------------------------------------- launch

template <class T>
int launch_lrn_pool_bwd_planes(const EpilogueParams& p, void* stream) {
  const LrnPoolTiles<T> tiles(p);
  const auto with = [&](const auto& apart) {
    using Apart = std::decay_t<decltype(apart)>;
    return launch<lrn_pool_bwd_planes<T, Apart>>(tiles.x.grid(), tiles.block(), tiles.bytes, stream,
                                                 static_cast<const T*>(p.r), static_cast<const T*>(p.dy),
                                                 static_cast<const uint8_t*>(p.code), static_cast<T*>(p.dz),
                                                 static_cast<float*>(p.db_partial), tiles, apart, LrnOfFive(p.lrn));
  };
  return AlexNetApart<T>::is(tiles.apart) ? with(AlexNetApart<T>{}) : with(tiles.apart);
}

}  // namespace alexnet_fast::cuda
