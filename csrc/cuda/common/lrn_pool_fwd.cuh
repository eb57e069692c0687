// LRN and max-pooling in one pass, for epilogue_fwd.cu. A block makes a tile of the output: it computes the LRN of the
// tile's input, once for each pixel, into shared memory, and pools from there. Nothing of the LRN's output goes through
// device memory. Tiles overlap by the rows and columns that their windows share; those are read and computed twice.
//
// The ReLU's output, kept for backward, is written by the tile that owns the pixel: of an overlap, the later one; of
// pixels that no window holds, the last one.
// AlexNet's windows: common/lrn_pool_fwd_columns.cuh in inference, common/lrn_pool_fwd_planes.cuh in NCHW.
#pragma once

#include "cuda/common/lrn_fwd.cuh"
#include "cuda/common/lrn_pool_fwd_columns.cuh"
#include "cuda/common/pool_fwd.cuh"

namespace alexnet_fast::cuda {

// One axis of the image, cut into tiles.
struct TiledAxis {
  int32_t outputs;  // in a tile
  int32_t inputs;   // that the windows of a full tile reach over
  int32_t tiles;

  TiledAxis(int32_t outputs, int32_t out_size, int32_t kernel, int32_t stride)
      : outputs(outputs), inputs((outputs - 1) * stride + kernel), tiles(ceil_div(out_size, outputs)) {}
};

struct Tiling {
  TiledAxis rows, columns;
  int32_t channels;                                          // in a tile; NCHW: within one group
  int32_t channel_tiles;                                     // NCHW: in a group
  Divider blocks_of_column, blocks_of_row, blocks_of_image;  // how blockIdx.x is made up
};

// The part of an axis that one tile works on, in input coordinates.
struct Span {
  int32_t out_begin, out_end;
  int32_t origin;              // where shared memory begins; negative in the padding
  int32_t own_begin, own_end;  // whose ReLU output this tile keeps
  int32_t begin, end;          // read

  __device__ __forceinline__ Span(const TiledAxis& axis, int32_t tile, int32_t size, int32_t out_size, int32_t stride,
                                  int32_t pad, bool keeps) {
    out_begin = tile * axis.outputs;
    out_end = min(out_begin + axis.outputs, out_size);
    origin = out_begin * stride - pad;
    const bool last = tile + 1 == axis.tiles;
    own_begin = max(origin, 0);
    own_end = last ? size : max(origin + axis.outputs * stride, 0);
    begin = own_begin;
    end = min(origin + axis.inputs, size);
    if (keeps) {
      end = max(end, own_end);
    }
  }
};

template <class T, int V, int Halo, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_pool_fwd(Rectified<T, kChannelsLast> source, T* __restrict__ y, uint8_t* __restrict__ code, PoolShape shape,
                 Tiling tiling, int32_t channels, int32_t group_channels, Lrn lrn) {
  const Window& k = shape.window;
  int64_t rest, tile_row, tile_column, channel_tile;
  const int64_t image = tiling.blocks_of_image.divide(blockIdx.x, rest);
  tile_row = tiling.blocks_of_row.divide(rest, rest);
  tile_column = tiling.blocks_of_column.divide(rest, channel_tile);
  const bool keeps = source.r != nullptr;
  const Span rows(tiling.rows, tile_row, shape.height, shape.out_height, k.stride_h, k.pad_h, keeps);
  const Span columns(tiling.columns, tile_column, shape.width, shape.out_width, k.stride_w, k.pad_w, keeps);
  // Channels of this tile: NHWC counts them in the tensor, NCHW in their group.
  const int32_t group = kChannelsLast ? 0 : static_cast<int32_t>(channel_tile) / tiling.channel_tiles;
  const int32_t first = (static_cast<int32_t>(channel_tile) - group * tiling.channel_tiles) * tiling.channels;
  const int32_t last = min(first + tiling.channels, kChannelsLast ? channels : group_channels);
  const int32_t first_channel = group * group_channels;  // of the group

  // NHWC: tile[pixel][channel]. NCHW: tile[channel][pixel].
  T* tile = reinterpret_cast<T*>(dynamic_shared());
  const int32_t tile_pixels = tiling.rows.inputs * tiling.columns.inputs;
  const auto place = [&](int32_t pixel, int32_t channel) {
    return kChannelsLast ? pixel * tiling.channels + channel - first : (channel - first) * tile_pixels + pixel;
  };

  // ---- LRN of the tile's input. Work is counted with the memory's inner axis first.
  const int32_t width = columns.end - columns.begin;
  const int32_t pixels = max(width, 0) * max(rows.end - rows.begin, 0);
  const int32_t vectors = kChannelsLast ? (last - first) / V : 1;
  for (int32_t i = threadIdx.x; i < pixels * vectors; i += kThreads) {
    const int32_t pixel = i / vectors, vector = i % vectors;
    const int32_t h = rows.begin + pixel / width, w = columns.begin + pixel % width;
    const bool owned = h >= rows.own_begin && h < rows.own_end && w >= columns.own_begin && w < columns.own_end;
    const int32_t row = h - rows.origin, column = w - columns.origin;
    const bool pooled = row < tiling.rows.inputs && column < tiling.columns.inputs;
    const int32_t to = row * tiling.columns.inputs + column;
    const int64_t offset = image * shape.in.image + (int64_t{h} * shape.width + w) * shape.in.pixel;
    if constexpr (kChannelsLast) {
      const int32_t channel = first + vector * V;
      Pack<T, V> own;
      const Neighbourhood<Rectified<T, kChannelsLast>, T, V, Halo> near(source, channel, group_channels);
      const Pack<T, V> result = lrn_of_vector(near, offset + channel, lrn, own);
      if (owned) {
        source.keep(offset + channel, own);
      }
      if (pooled) {
        store_shared(tile + place(to, channel), result);
      }
    } else {
      const int64_t origin = offset + first_channel * shape.in.channel;
      const auto visit = [&](int32_t channel, int64_t at, const Pack<T, V>& own, const Pack<T, V>& result) {
        if (owned) {
          source.keep(at, own);
        }
        if (pooled) {
          store_shared(tile + place(to, channel), result);
        }
      };
      lrn_of_column<T, V, Halo>(source, origin, shape.in.channel, first_channel, first, last, group_channels, lrn,
                                visit);
    }
  }
  __syncthreads();

  // ---- Pool.
  const int32_t out_width = columns.out_end - columns.out_begin;
  const int32_t out_pixels = out_width * (rows.out_end - rows.out_begin);
  const int32_t out_vectors = (last - first) / V;
  for (int32_t i = threadIdx.x; i < out_pixels * out_vectors; i += kThreads) {
    const int32_t pixel = kChannelsLast ? i / out_vectors : i % out_pixels;
    const int32_t channel = first + (kChannelsLast ? i % out_vectors : i / out_pixels) * V;
    const int32_t out_row = pixel / out_width, out_column = pixel % out_width;  // in the tile
    const int32_t top = out_row * k.stride_h, left = out_column * k.stride_w;   // in shared memory
    const int32_t i_begin = max(-(rows.origin + top), 0), j_begin = max(-(columns.origin + left), 0);
    const int32_t i_end = min(k.kernel_h, shape.height - (rows.origin + top));
    const int32_t j_end = min(k.kernel_w, shape.width - (columns.origin + left));
    Best best[V];
    begin(best, k.kernel_w * i_begin + j_begin);
    for (int32_t di = i_begin; di < i_end; ++di) {
#pragma unroll 3
      for (int32_t dj = j_begin; dj < j_end; ++dj) {
        const int32_t from = (top + di) * tiling.columns.inputs + left + dj;
        const Pack<T, V> x = load<V>(tile + place(from, channel));
#pragma unroll
        for (int v = 0; v < V; ++v) {
          best[v].take(element(x, v), k.kernel_w * di + dj);
        }
      }
    }
    const int64_t out_pixel = int64_t{rows.out_begin + out_row} * shape.out_width + columns.out_begin + out_column;
    const int64_t out =
        image * shape.out.image + (first_channel + channel) * shape.out.channel + out_pixel * shape.out.pixel;
    store_best<false>(best, out, y, code);
  }
}

// ---------------------------------------------------------------- AlexNet's stages

// Goes through the pixels of a rectangle, row by row, from number `first` on every `step`th of them. Divides once, and
// then adds to the pixel's offset in global memory, and to its place in shared memory, both from the rectangle's first.
struct Stroll {
  int32_t row, column, width, step_rows, step_columns;
  int32_t offset, step_offset, wrap_offset, place, step_place, wrap_place;

  // What a row and a pixel further is for either.
  __device__ __forceinline__ Stroll(uint32_t first, uint32_t step, uint32_t width, int32_t line, int32_t pixel,
                                    int32_t place_line, int32_t place_pixel)
      : row(first / width),
        column(first - row * width),
        width(width),
        step_rows(step / width),
        step_columns(step - step_rows * width),
        offset(row * line + column * pixel),
        step_offset(step_rows * line + step_columns * pixel),
        wrap_offset(line - this->width * pixel),
        place(row * place_line + column * place_pixel),
        step_place(step_rows * place_line + step_columns * place_pixel),
        wrap_place(place_line - this->width * place_pixel) {}

  __device__ __forceinline__ void next() {
    row += step_rows;
    column += step_columns;
    offset += step_offset;
    place += step_place;
    if (column >= width) {
      ++row;
      column -= width;
      offset += wrap_offset;
      place += wrap_place;
    }
  }
};

// Writes the best of nine floats that are no less than 0, and so are integers in order, as best_of_nine finds it; false
// if one of them is a NaN, of either sign, of which the last one counts.
template <int V>
__device__ __forceinline__ bool store_rectified(const Pack<float, V> (&x)[3][3], const uint32_t (&row_place)[3],
                                                const uint32_t (&column_place)[3], int64_t offset, float* y,
                                                uint8_t* code) {
  Pack<float, V> best;
  int32_t places[V];
  uint32_t largest = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const auto of = [&](int k) { return x[k / 3][k % 3].words[v]; };
    const uint32_t value =
        max(max(max(of(0), of(1)), max(of(2), of(3))), max(max(max(of(4), of(5)), max(of(6), of(7))), of(8)));
    places[v] = row_place[2] + column_place[2];
#pragma unroll
    for (int k = 7; k >= 0; --k) {
      places[v] = of(k) == value ? row_place[k / 3] + column_place[k % 3] : places[v];
    }
    best.words[v] = value;
    largest = max(largest, best.words[v]);
  }
  store(y + offset, best);
  store(code + offset, pack_bytes(places));
  return largest <= 0x7f800000;
}

// lrn_pool_fwd for windows of 3 with stride 2 and LrnOfFive in training: both codes and the ReLU's output are kept. A
// thread keeps its V channels, and with them their bias and their place in the group. LRN's output is no less than 0,
// so maxima and places are those of pool_fwd_packed. In inference: common/lrn_pool_fwd_columns.cuh.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    lrn_pool_fwd_packed(Rectified<T, true> source, T* __restrict__ y, uint8_t* __restrict__ code, PoolShape shape,
                        Tiling tiling, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int K = 3, S = 2, Halo = 2;
  uint32_t rest, channel_tile;
  const int64_t image = tiling.blocks_of_image.divide_small(blockIdx.x, rest);
  const uint32_t tile_row = tiling.blocks_of_row.divide_small(rest, rest);
  const uint32_t tile_column = tiling.blocks_of_column.divide_small(rest, channel_tile);
  const Span rows(tiling.rows, tile_row, shape.height, shape.out_height, S, shape.window.pad_h, true);
  const Span columns(tiling.columns, tile_column, shape.width, shape.out_width, S, shape.window.pad_w, true);
  const int32_t channel = channel_tile * tiling.channels + threadIdx.x * V;
  const bool there = channel < channels;

  T* tile = reinterpret_cast<T*>(dynamic_shared()) + threadIdx.x * V;  // [row][column][channel]
  const int32_t tile_line = tiling.columns.inputs * tiling.channels;

  if (there && columns.end > columns.begin) {
    const int64_t in =
        image * shape.in.image + (int64_t{rows.begin} * shape.width + columns.begin) * channels + channel;
    const Neighbourhood<Rectified<T, true>, T, V, Halo> near(source, channel, group_channels);
    // An offset of 32 bits is one instruction away from an address then.
    const T* const z = anew(source.z + in);
    T* const r = anew(source.r + in);
    T* to = tile + (rows.begin - rows.origin) * tile_line + (columns.begin - columns.origin) * tiling.channels;
#pragma unroll 1
    for (Stroll at(threadIdx.y, blockDim.y, columns.end - columns.begin, shape.width * channels, channels, tile_line,
                   tiling.channels);
         at.row < rows.end - rows.begin; at.next()) {
      Pack<T, V> own;
      const Pack<T, V> result = lrn_of_vector(near, anew(z + at.offset), lrn, own);
      const int32_t h = rows.begin + at.row, w = columns.begin + at.column;
      if (h < rows.own_end && w < columns.own_end) {  // own_begin is begin
        store(r + at.offset, own);
      }
      if (h - rows.origin >= tiling.rows.inputs || w - columns.origin >= tiling.columns.inputs) {
        continue;  // kept, and in no window
      }
      store_shared_16(to + at.place, result);
    }
  }
  __syncthreads();
  if (!there) {
    return;
  }

  const int64_t out =
      image * shape.out.image + (int64_t{rows.out_begin} * shape.out_width + columns.out_begin) * channels + channel;
#pragma unroll 1
  for (Stroll at(threadIdx.y, blockDim.y, columns.out_end - columns.out_begin, shape.out_width * channels, channels, 0,
                 0);
       at.row < rows.out_end - rows.out_begin; at.next()) {
    const int32_t top = at.row * S, left = at.column * S;  // in shared memory
    const T* line[K];
    int32_t from[K];
    constexpr uint32_t kChannels = sizeof(T) == 2 ? 0x01010101 : 1;  // of 16 bits four channels' places in a word
    uint32_t row_place[K], column_place[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int32_t row = min(max(top + k, -rows.origin), shape.height - 1 - rows.origin);
      const int32_t column = min(max(left + k, -columns.origin), shape.width - 1 - columns.origin);
      line[k] = tile + row * tile_line;
      from[k] = column * tiling.channels;
      row_place[k] = (row - top) * K * kChannels;
      column_place[k] = (column - left) * kChannels;
    }
    Pack<T, V> x[K][K];
#pragma unroll
    for (int i = 0; i < K; ++i) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        x[i][j] = load<V>(line[i] + from[j]);
      }
    }
    if constexpr (sizeof(T) == 2) {
      const PackedBest<V> best = best_of_nine<T, V, true>(x, row_place, column_place);
      if (store_packed<true, true, false>(best, 0, out + at.offset, y, code) == 0) {
        continue;
      }
    } else if (store_rectified(x, row_place, column_place, out + at.offset, y, code)) {
      continue;
    }
    // Rare: the place of a NaN, or in bfloat16 of 2^121 or more. Channel by channel.
#pragma unroll 1
    for (int32_t c = 0; c < V; ++c) {
      Best of_channel[1] = {{-INFINITY, 0}};
#pragma unroll 1
      for (int32_t k = 0; k < K * K; ++k) {
        const int32_t row = top + k / K, column = left + k % K;
        const int32_t h = rows.origin + row, w = columns.origin + column;
        if (h >= 0 && h < shape.height && w >= 0 && w < shape.width) {
          of_channel[0].take(element(load<1>(tile + row * tile_line + column * tiling.channels + c), 0), k);
        }
      }
      store_best<false>(of_channel, out + at.offset + c, y, code);
    }
  }
}

// ---------------------------------------------------------------- launch

// The tile that reads least for what it makes, among those that fit. Reading: the overlap of windows, and LRN's halo of
// channels.
template <class Params>
Tiling choose_tiling(const Params& p, int V, int element_bytes, int halo) {
  constexpr int32_t kTileBytes = 40 * 1024;  // 5 blocks a multiprocessor on sm_90, 4 on sm_80
  const Window& k = p.window;
  const int64_t whole = p.channels_last ? p.channels : p.channels / p.lrn.groups;
  Tiling best{TiledAxis(1, p.out_height, k.kernel_h, k.stride_h),
              TiledAxis(1, p.out_width, k.kernel_w, k.stride_w),
              V,
              0,
              {},
              {},
              {}};
  double least = INFINITY;
  for (const int64_t channels : {whole, int64_t{128}, int64_t{64}, int64_t{48}, int64_t{32}, int64_t{V}}) {
    if (channels > whole || channels % V != 0 || channels / V > kThreads) {
      continue;
    }
    for (int32_t h = 1; h <= std::min<int64_t>(p.out_height, 16); ++h) {
      for (int32_t w = 1; w <= std::min<int64_t>(p.out_width, 64); ++w) {
        const TiledAxis rows(h, p.out_height, k.kernel_h, k.stride_h), columns(w, p.out_width, k.kernel_w, k.stride_w);
        if (rows.inputs * columns.inputs * channels * element_bytes > kTileBytes) {
          break;
        }
        const double tiles = double(rows.tiles) * columns.tiles * ceil_div(whole, channels);
        const double read = tiles * rows.inputs * columns.inputs * (channels == whole ? whole : channels + 2 * halo);
        if (read < least) {
          least = read;
          best = Tiling{rows, columns, static_cast<int32_t>(channels), 0, {}, {}, {}};
        }
      }
    }
  }
  best.channel_tiles = static_cast<int32_t>(ceil_div<int64_t>(whole, best.channels));
  const int64_t channel_tiles = p.channels / whole * best.channel_tiles;
  best.blocks_of_column = Divider(channel_tiles);
  best.blocks_of_row = Divider(channel_tiles * best.columns.tiles);
  best.blocks_of_image = Divider(channel_tiles * best.columns.tiles * best.rows.tiles);
  return best;
}

template <class T, int V, int Halo, bool kChannelsLast, class Params>
int launch_lrn_pool_fwd(const Params& p, const Rectified<T, kChannelsLast>& source, void* stream) {
  const Tiling tiling = choose_tiling(p, V, sizeof(T), Halo);
  const size_t bytes = sizeof(T) * tiling.rows.inputs * tiling.columns.inputs * tiling.channels;
  const dim3 grid(p.batch * tiling.blocks_of_image.divisor);
  const auto launch_with = [&](auto kernel, dim3 block, const auto& lrn) {
    return kernel(grid, block, bytes, stream, source, static_cast<T*>(p.y), p.code, PoolShape(p), tiling,
                  static_cast<int32_t>(p.channels), static_cast<int32_t>(p.channels / p.lrn.groups), lrn);
  };
  if constexpr (kChannelsLast && V > 1 && Halo == 2) {
    if (LrnPoolColumns::take<0>(p, sizeof(T))) {
      return p.channels / p.lrn.groups % 8 == 0 ? launch_lrn_pool_fwd_columns<T, 8, 0>(p, stream)
                                                : launch_lrn_pool_fwd_columns<T, V, 0>(p, stream);
    }
    const bool small = (tiling.rows.inputs + 2) * p.width * p.channels <= INT32_MAX;  // offsets within a tile
    if (overlapping_3_by_2(p.window) && LrnOfFive::is(p.lrn) && p.code != nullptr && p.r != nullptr && small) {
      constexpr auto training = launch<lrn_pool_fwd_packed<T, V>, Rectified<T, true>, T*, uint8_t*, PoolShape, Tiling,
                                       int32_t, int32_t, LrnOfFive>;
      const int32_t vectors = tiling.channels / V;
      return launch_with(training, dim3(vectors, kThreads / vectors), LrnOfFive(p.lrn));
    }
  }
  constexpr auto kernel = launch<lrn_pool_fwd<T, V, Halo, kChannelsLast>, Rectified<T, kChannelsLast>, T*, uint8_t*,
                                 PoolShape, Tiling, int32_t, int32_t, Lrn>;
  return launch_with(kernel, dim3(kThreads), Lrn(p.lrn));
}

}  // namespace alexnet_fast::cuda
