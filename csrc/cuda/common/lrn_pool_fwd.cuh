// LRN and max-pooling in one pass, for epilogue_fwd.cu. A block makes a tile of the output: it computes the LRN of the
// tile's input, once for each pixel, into shared memory, and pools from there. Nothing of the LRN's output goes through
// device memory. Tiles overlap by the rows and columns that their windows share; those are read and computed twice.
//
// The ReLU's output, kept for backward, is written by the tile that owns the pixel: of an overlap, the later one; of
// pixels that no window holds, the last one.
#pragma once

#include "cuda/common/lrn_fwd.cuh"
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
      const Pack<T, V> result = lrn_of_vector<T, V, Halo>(source, offset + channel, channel, group_channels, lrn, own);
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
  for (const int64_t channels : {whole, int64_t{128}, int64_t{64}, int64_t{32}, int64_t{V}}) {
    if (channels > whole || channels % V != 0) {
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
  return launch<lrn_pool_fwd<T, V, Halo, kChannelsLast>>(dim3(p.batch * tiling.blocks_of_image.divisor), dim3(kThreads),
                                                         bytes, stream, source, static_cast<T*>(p.y), p.code,
                                                         PoolShape(p), tiling, static_cast<int32_t>(p.channels),
                                                         static_cast<int32_t>(p.channels / p.lrn.groups), Lrn(p.lrn));
}

}  // namespace alexnet_fast::cuda
