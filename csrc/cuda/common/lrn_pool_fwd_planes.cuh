// LRN and max-pooling in one pass over NCHW planes, AlexNet's windows, for epilogue_fwd.cu; common/lrn_pool_fwd.cuh has
// other layouts and windows, common/lrn_pool_fwd_columns.cuh AlexNet's planes in inference. A tile is whole rows of
// planes, as common/lrn_planes.cuh has them, whose LRN takes their place in shared memory, in vectors of channels as
// NHWC has them.
#pragma once

#include "cuda/common/lrn_fwd.cuh"
#include "cuda/common/pool_fwd.cuh"

namespace alexnet_fast::cuda {

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

}  // namespace alexnet_fast::cuda
