// LRN and max-pooling in one pass, for epilogue_fwd.cu. A block makes a tile of the output: it computes the LRN of the
// tile's input, once for each pixel, into shared memory, and pools from there. Nothing of the LRN's output goes through
// device memory. Tiles overlap by the rows and columns that their windows share; those are read and computed twice.
//
// The ReLU's output, kept for backward, is written by the tile that owns the pixel: of an overlap, the later one; of
// pixels that no window holds, the last one.
//
// NCHW, AlexNet's windows: a tile is whole rows of planes, as common/lrn_planes.cuh has them, whose LRN takes their
// place in shared memory, in vectors of channels as NHWC has them.
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
// if one of them is a NaN, of which the last one counts.
template <bool kCodes, int V>
__device__ __forceinline__ bool store_rectified(const Pack<float, V> (&x)[3][3], const uint32_t (&row_place)[3],
                                                const uint32_t (&column_place)[3], int64_t offset, float* y,
                                                uint8_t* code) {
  Pack<float, V> best;
  int32_t places[V];
  uint32_t largest = 0;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const auto of = [&](int k) { return static_cast<int32_t>(x[k / 3][k % 3].words[v]); };
    const int32_t value =
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
  if (kCodes) {
    store(code + offset, pack_bytes(places));
  }
  return largest <= 0x7f800000;
}

// lrn_pool_fwd for windows of 3 with stride 2 and LrnOfFive; in training it keeps both codes and the ReLU's output. A
// thread keeps its V channels, and with them their bias and their place in the group. LRN's output is no less than 0,
// so maxima and places are those of pool_fwd_packed.
template <class T, int V, bool kTraining>
__global__ void __launch_bounds__(kThreads, 4)
    lrn_pool_fwd_packed(Rectified<T, true> source, T* __restrict__ y, uint8_t* __restrict__ code, PoolShape shape,
                        Tiling tiling, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int K = 3, S = 2, Halo = 2;
  uint32_t rest, channel_tile;
  const int64_t image = tiling.blocks_of_image.divide_small(blockIdx.x, rest);
  const uint32_t tile_row = tiling.blocks_of_row.divide_small(rest, rest);
  const uint32_t tile_column = tiling.blocks_of_column.divide_small(rest, channel_tile);
  const Span rows(tiling.rows, tile_row, shape.height, shape.out_height, S, shape.window.pad_h, kTraining);
  const Span columns(tiling.columns, tile_column, shape.width, shape.out_width, S, shape.window.pad_w, kTraining);
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
      if (kTraining) {
        const int32_t h = rows.begin + at.row, w = columns.begin + at.column;
        if (h < rows.own_end && w < columns.own_end) {  // own_begin is begin
          store(r + at.offset, own);
        }
        if (h - rows.origin >= tiling.rows.inputs || w - columns.origin >= tiling.columns.inputs) {
          continue;  // kept, and in no window
        }
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
      const PackedBest<V> best = best_of_nine<T, V, kTraining>(x, row_place, column_place);
      if (store_packed<true, kTraining, false>(best, 0, out + at.offset, y, code) == 0) {
        continue;
      }
    } else if (store_rectified<kTraining>(x, row_place, column_place, out + at.offset, y, code)) {
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

// ---------------------------------------------------------------- NCHW, in shared memory

// For windows of 3 with stride 2 within the image, and LrnOfFive. A tile is the rows of the image under some rows of
// outputs, and a chunk of channels.
template <class T>
struct LrnPoolPlanes {
  static constexpr int32_t kHalo = 2, kLongestChunk = 96 / sizeof(T);
  static constexpr int64_t kMostBytes = 55 * 1024;                 // two blocks on sm_80, four on sm_90
  static constexpr int32_t kLanes = 16 * sizeof(T), kVectors = 2;  // of a row of the tile, and what each has of it

  PlaneTiles x;
  int32_t rows;  // of outputs
  Divider columns;
  int32_t bytes;
  bool fit;

  template <class Params>
  explicit LrnPoolPlanes(const Params& p)
      : x({p.dtype, false, p.batch, p.channels, p.height * p.width}, p.lrn.groups, kLongestChunk),
        columns(p.out_width),
        fit(false) {
    const int64_t beyond = p.height - 2 * p.out_height;  // the last window's third row, and rows that are in no window
    for (int64_t bands = 1; bands <= p.out_height && !fit; ++bands) {
      rows = static_cast<int32_t>(ceil_div<int64_t>(p.out_height, bands));
      const int64_t pixels = (2 * rows + beyond) * p.width;
      if (pixels > PlaneTiles::longest_run(sizeof(T), kLanes * kVectors)) {
        continue;
      }
      x.cut(pixels, sizeof(T));
      x.in_plane = Divider(ceil_div<int64_t>(p.out_height, rows));
      bytes = x.bytes(x.chunk + 2 * kHalo, sizeof(T));
      fit = bytes <= kMostBytes && x.image <= INT32_MAX;
    }
  }

  // Whether the kernel takes that stage.
  template <class Params>
  static bool take(const Params& p) {
    const LrnShape shape{p.dtype, p.channels_last, p.batch, p.channels, p.height * p.width};
    return PlaneTiles::take<true>(shape, p.lrn) && overlapping_3_by_2(p.window) && windows_inside(p) &&
           (p.code == nullptr) == (p.r == nullptr) &&
           alike_in_16(static_cast<const T*>(p.z), static_cast<const T*>(p.r)) && LrnPoolPlanes(p).fit;
  }
};

// LRN of a tile, from rows of channels at `x` to vectors of V channels, [vector][pixel], which begin where the rows do:
// a vector takes the place of V rows, and all threads have read those when they meet at a barrier, once in kStep
// channels. With kRectify x is not the ReLU's output yet: `bias` has that of the rows from the first on.
template <bool kRectify, class T>
__device__ __forceinline__ void lrn_to_vectors(const PlaneTile& tile, unsigned char* room, const T* x, const T* bias,
                                               int32_t pixels, const LrnOfFive& lrn) {
  constexpr int V = kVector<T>, kStep = PlaneTiles::kStep, kBefore = 4, kPixels = 2;  // of a thread
  static_assert(LrnPoolPlanes<T>::kLanes * LrnPoolPlanes<T>::kVectors * V <= kPixels * kThreads);
  const int32_t stride = tile.lie.stride;
  // Channels `row` and row + 1 of a thread's pixel p.
  const auto two = [&](int p, int row, const Pack<T, 2>& its_bias, float (&values)[2]) {
    const T* const at = x + p * kThreads + row * stride;
    if constexpr (kRectify) {
      unpack(add_relu(pack_two(at[0], at[stride]), its_bias), values);
    } else {
      values[0] = to_float(at[0]);
      values[1] = to_float(at[stride]);
    }
  };
  x += threadIdx.x;
  WalkOfFives walk[kPixels];
  bool active[kPixels];
#pragma unroll
  for (int p = 0; p < kPixels; ++p) {
    active[p] = static_cast<int32_t>(threadIdx.x) + p * kThreads < pixels;
    if (active[p]) {
      float before[kBefore];
#pragma unroll
      for (int i = 0; i < kBefore; i += 2) {
        two(p, i, kRectify ? load<2>(bias + i) : Pack<T, 2>{}, reinterpret_cast<float (&)[2]>(before[i]));
      }
      walk[p].begin(before);
    }
  }
  x += kBefore * stride;
  bias += kBefore;
  Pack<T, V>* to = reinterpret_cast<Pack<T, V>*>(room) + threadIdx.x;
#pragma unroll 1
  for (int32_t c = tile.begin; c < tile.end; c += kStep, x += kStep * stride, bias += kStep) {
    alignas(16) Pack<T, 2> of_step[kStep / 2];
    Pack<T, V> result[kPixels][kStep / V];
    if constexpr (kRectify) {
#pragma unroll
      for (int i = 0; i < kStep; i += V) {
        reinterpret_cast<Pack<T, V>&>(of_step[i / 2]) = load<V>(bias + i);
      }
    }
#pragma unroll
    for (int p = 0; p < kPixels; ++p) {
      if (active[p]) {
        float next[kStep], middle[kStep], t[kStep], w[kStep];
#pragma unroll
        for (int i = 0; i < kStep; i += 2) {
          two(p, i, of_step[i / 2], reinterpret_cast<float (&)[2]>(next[i]));
        }
        walk[p].step(next, middle, t);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          t[i] = fmaf(lrn.scale, t[i], lrn.k);
        }
        inverse_power<T>(t, lrn, w);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          w[i] *= middle[i];
        }
#pragma unroll
        for (int i = 0; i < kStep; i += V) {
          result[p][i / V] = pack<T>(reinterpret_cast<const float (&)[V]>(w[i]));
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kStep / V; ++i, to += stride) {
#pragma unroll
      for (int p = 0; p < kPixels; ++p) {
        if (active[p]) {
          store_shared_16(reinterpret_cast<T*>(to + p * kThreads), result[p][i]);
        }
      }
    }
  }
}

// Reads a channel of vectors of V, pixel by pixel.
template <class T, int V>
struct OfVectors {
  const T* x;
  __device__ __forceinline__ Pack<T, 1> at(int64_t pixel) const { return load<1>(x + pixel * V); }
};

// `rows` outputs of a column, of V channels, from vectors [pixel] at `x`: no element is less than 0. Outputs of the
// channels are `out_plane` apart. Returns whether there may be a NaN among them: then codes are to be found anew.
template <class T, int V, bool kCodes>
__device__ __forceinline__ bool pool_column_of_vectors(const Pack<T, V>* x, int32_t width, T* y, uint8_t* code,
                                                       int32_t out_plane, int32_t out_width, int32_t rows) {
  constexpr int K = 3, S = 2, N = V / kInWord<T>;
  struct Best {
    uint32_t values[N], places[N];
  };
  const auto best_of_row = [&](uint32_t place) {
    const Pack<T, V> a = x[0], b = x[1], c = x[2];
    Best best;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      best.values[n] = max_of_three<T, true>(a.words[n], b.words[n], c.words[n]);
      best.places[n] =
          if_equal<T>(a.words[n], best.values[n], place * kEach<T>,
                      if_equal<T>(b.words[n], best.values[n], (place + 1) * kEach<T>, (place + 2) * kEach<T>));
    }
    return best;
  };
  uint32_t most = 0;
  Best first = best_of_row(0);
#pragma unroll 1
  for (int32_t row = 0; row < rows; ++row) {
    Best best = first;
#pragma unroll
    for (int i = 1; i < K; ++i) {
      x += width;
      first = best_of_row(K * i);  // at last the one of the window below
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const uint32_t before = best.values[n];
        best.values[n] = max_of_two<T>(before, first.values[n]);
        best.places[n] = if_equal<T>(before, best.values[n], best.places[n], first.places[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      first.places[n] -= K * S * kEach<T>;
    }
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      most = max_of_three<T, true>(most, best.values[n], best.values[n + 1]);
    }
    T* its_y = y;
    uint8_t* its_code = code;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      store_of_word<kCodes>(best.values[v / kInWord<T>], best.places[v / kInWord<T>], v % kInWord<T>, its_y, its_code);
      its_y += out_plane;
      its_code += kCodes ? out_plane : 0;
    }
    y += out_width;
    code += kCodes ? out_width : 0;
  }
  return unequal<T>(most) != 0;
}

template <class T, bool kTraining>
__global__ void __launch_bounds__(kThreads, 4)
    lrn_pool_fwd_planes(Rectified<T, false> source, T* __restrict__ y, uint8_t* __restrict__ code, PoolShape shape,
                        LrnPoolPlanes<T> tiles, LrnOfFive lrn) {
  using Tiles = LrnPoolPlanes<T>;
  constexpr int K = 3, S = 2, V = kVector<T>, Halo = Tiles::kHalo, kStep = PlaneTiles::kStep, kLanes = Tiles::kLanes;
  const PlaneTile place(tiles.x);
  const int32_t first_out = place.place * tiles.rows, rows = min(tiles.rows, shape.out_height - first_out);
  const bool last = first_out + rows == shape.out_height;
  const int32_t first = first_out * S * shape.width, kept = last ? tiles.x.pixels - first : rows * S * shape.width;
  const int32_t read = (rows * S + 1) * shape.width;
  const PlaneTile tile(place, tiles.x, first, kTraining ? max(read, kept) : read), own(place, tiles.x, first, kept);
  const int32_t begin = tile.begin - Halo, stride = tiles.x.stride;
  const int32_t channels = ceil_div(tile.channels(), kStep) * kStep + 2 * Halo;
  unsigned char* const room = dynamic_shared();
  T* const x = place_run(room, source.z + tile.offset(begin));
  tile.template fetch<kLanes, Tiles::kVectors>(x, source.z, begin, channels);
  if constexpr (kTraining) {
    tile.template rectify<kLanes, Tiles::kVectors>(x, source, begin, channels);
    __syncthreads();
    own.template put<kLanes, Tiles::kVectors>(x + Halo * stride, source.r);
    __syncthreads();
    lrn_to_vectors<false, T>(tile, room, x, nullptr, read, lrn);
  } else {
    // Of the rows that are read first 2 Halo, and then vectors of V: these are aligned.
    constexpr int kBefore = 2 * Halo;
    ALEXNET_FAST_SHARED(T[kBefore + Tiles::kLongestChunk + 2 * Halo], bias);
    if (static_cast<int32_t>(threadIdx.x) < channels) {
      const int32_t channel = begin + threadIdx.x;
      Pack<T, 1> its_bias{};  // a row of zeros stays one
      if (source.bias != nullptr && tile.has(channel)) {
        its_bias = load<1>(source.bias + tile.first_channel + channel);
      }
      store_shared(&bias[kBefore + threadIdx.x], its_bias);
    }
    await_runs();
    lrn_to_vectors<true, T>(tile, room, x, &bias[kBefore], read, lrn);
  }
  __syncthreads();

  // A thread goes down a column of outputs, of V channels at once. Where there are fewer left, or a NaN is among them,
  // it does so channel by channel.
  const int32_t out_plane = shape.out_height * shape.out_width;
  const int64_t out = (int64_t{tile.image} * shape.out.image) + int64_t{tile.first_channel + tile.begin} * out_plane +
                      first_out * shape.out_width;
  const uint32_t units = ceil_div(tile.channels(), V) * shape.out_width;
#pragma unroll 1
  for (uint32_t unit = threadIdx.x; unit < units; unit += kThreads) {
    uint32_t column;
    const int32_t vector = tiles.columns.divide_small(unit, column), channel = vector * V;
    const Pack<T, V>* from = reinterpret_cast<const Pack<T, V>*>(room) + vector * stride + column * S;
    const int64_t to = out + channel * out_plane + column;
    const int32_t left = min(tile.channels() - channel, V);
    if (left == V &&
        !pool_column_of_vectors<T, V, kTraining>(from, shape.width, y + to, kTraining ? code + to : nullptr, out_plane,
                                                 shape.out_width, rows)) {
      continue;
    }
#pragma unroll 1
    for (int32_t c = 0; c < left; ++c) {
      pool_column<K, S, kTraining, false>(OfVectors<T, V>{reinterpret_cast<const T*>(from) + c}, 0, shape.width, y + to,
                                          kTraining ? code + to : nullptr, c * out_plane, shape.out_width, rows);
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

template <class T, class Params>
int launch_lrn_pool_fwd_planes(const Params& p, const Rectified<T, false>& source, void* stream) {
  const LrnPoolPlanes<T> tiles(p);
  constexpr auto training =
      launch<lrn_pool_fwd_planes<T, true>, Rectified<T, false>, T*, uint8_t*, PoolShape, LrnPoolPlanes<T>, LrnOfFive>;
  constexpr auto inference =
      launch<lrn_pool_fwd_planes<T, false>, Rectified<T, false>, T*, uint8_t*, PoolShape, LrnPoolPlanes<T>, LrnOfFive>;
  return (p.r != nullptr ? training : inference)(tiles.x.grid(), dim3(kThreads), tiles.bytes, stream, source,
                                                 static_cast<T*>(p.y), p.code, PoolShape(p), tiles, LrnOfFive(p.lrn));
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
    const bool small = (tiling.rows.inputs + 2) * p.width * p.channels <= INT32_MAX;  // offsets within a tile
    if (overlapping_3_by_2(p.window) && LrnOfFive::is(p.lrn) && (p.code == nullptr) == (p.r == nullptr) && small) {
      constexpr auto training = launch<lrn_pool_fwd_packed<T, V, true>, Rectified<T, true>, T*, uint8_t*, PoolShape,
                                       Tiling, int32_t, int32_t, LrnOfFive>;
      constexpr auto inference = launch<lrn_pool_fwd_packed<T, V, false>, Rectified<T, true>, T*, uint8_t*, PoolShape,
                                        Tiling, int32_t, int32_t, LrnOfFive>;
      const int32_t vectors = tiling.channels / V;
      return launch_with(p.code != nullptr ? training : inference, dim3(vectors, kThreads / vectors), LrnOfFive(p.lrn));
    }
  }
  constexpr auto kernel = launch<lrn_pool_fwd<T, V, Halo, kChannelsLast>, Rectified<T, kChannelsLast>, T*, uint8_t*,
                                 PoolShape, Tiling, int32_t, int32_t, Lrn>;
  return launch_with(kernel, dim3(kThreads), Lrn(p.lrn));
}

}  // namespace alexnet_fast::cuda
