// Local response normalization forward over a Source: the kernels of lrn_fwd.cu, and of epilogue_fwd.cu without
// pooling.
//
// NHWC: channels are neighbours in memory. A thread owns V channels of a pixel and reads Halo channels on either side
// as well; those lie in lines that the same warp fetches anyway, so they cost L1 accesses and no traffic. Taken instead
// of warp shuffles, which need a second path at the ends of each warp.
//
// NCHW: a thread owns V pixels and walks through a chunk of channels, kStep at a time, all kStep loads in flight
// together; the last 2 Halo channels stay in registers from step to step. A chunk reads Halo channels of the chunk on
// either side, out of L2, since the blocks of one image's pixels are neighbours in the grid. Planes that are no
// multiple of 16 bytes are walked through in shared memory.
#pragma once

#include "cuda/common/lrn_planes.cuh"
#include "cuda/common/source.cuh"

namespace alexnet_fast::cuda {

// ---------------------------------------------------------------- NHWC

// y of V channels of one pixel, as near.load() finds it; their x is left in `own`.
template <class T, int V, int Halo, class Source, class At, class L>
__device__ __forceinline__ Pack<T, V> lrn_of_vector(const Neighbourhood<Source, T, V, Halo>& near, At at, const L& lrn,
                                                    Pack<T, V>& own) {
  float x[Halo + V + Halo], t[V], w[V];
  const auto values = near.load(at);
  own = values.own;
  values.unpack(x);
  scales<Halo>(x, lrn, t);
  inverse_power<T>(t, lrn, w);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    w[i] *= x[Halo + i];
  }
  return pack<T>(w);
}

template <class T, int V, int Halo, class L, class Source>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_fwd_nhwc(Source source, T* __restrict__ y, Units units, int32_t channels, int32_t group_channels, L lrn) {
  const int32_t channel = units.vector() * V;
  if (channel >= channels) {
    return;
  }
  const Neighbourhood<Source, T, V, Halo> near(source, channel, group_channels);
  for (int64_t pixel = units.first(); pixel < units.count; pixel += units.stride()) {
    const int64_t offset = pixel * channels + channel;
    Pack<T, V> own;
    const Pack<T, V> result = lrn_of_vector(near, offset, lrn, own);
    source.keep(offset, own);
    store(y + offset, result);
  }
}

// ---------------------------------------------------------------- NCHW

// Walks through channels begin ... end of a group, whose first channel is first_channel and lies at offset `origin`,
// and calls visit(channel, offset, x, y) for each.
template <class T, int V, int Halo, class Source, class Visit>
__device__ __forceinline__ void lrn_of_column(const Source& source, int64_t origin, int64_t plane,
                                              int32_t first_channel, int32_t begin, int32_t end, int32_t group_channels,
                                              const Lrn& lrn, const Visit& visit) {
  constexpr int kStep = V == 1 ? 8 : 4;
  Pack<T, V> window[2 * Halo + kStep];  // channels c - Halo ... c + kStep + Halo - 1
#pragma unroll
  for (int i = 0; i < 2 * Halo; ++i) {
    const int32_t channel = begin - Halo + i;
    window[i] = Pack<T, V>{};
    if (channel >= 0 && channel < group_channels) {
      window[i] = source.template local<V>(first_channel + channel).at(origin + channel * plane);
    }
  }
  int32_t c = begin;
  int64_t here = origin + begin * plane, ahead = here + Halo * plane;
  // A whole step lies within the chunk, and what it reads within the group: nothing needs to be asked per channel.
  const auto step = [&](auto is_whole) {
    constexpr bool whole = decltype(is_whole)::value;
#pragma unroll
    for (int i = 0; i < kStep; ++i, ahead += plane) {
      window[2 * Halo + i] = Pack<T, V>{};
      if (whole || (c + i < end && c + Halo + i < group_channels)) {
        window[2 * Halo + i] = source.template local<V>(first_channel + c + Halo + i).at(ahead);
      }
    }
    float results[kStep][V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      float x[Halo + kStep + Halo], t[kStep], w[kStep];
#pragma unroll
      for (int i = 0; i < 2 * Halo + kStep; ++i) {
        x[i] = element(window[i], v);
      }
      scales<Halo>(x, lrn, t);
      inverse_power<T>(t, lrn, w);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        results[i][v] = w[i] * x[Halo + i];
      }
    }
#pragma unroll
    for (int i = 0; i < kStep; ++i, here += plane) {
      if (whole || c + i < end) {
        visit(c + i, here, window[Halo + i], pack<T>(results[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * Halo; ++i) {
      window[i] = window[i + kStep];
    }
    c += kStep;
  };
  while (c + kStep <= end && c + kStep + Halo <= group_channels) {
    step(std::true_type{});
  }
  while (c < end) {
    step(std::false_type{});
  }
}

template <class T, int V, int Halo, class Source>
__global__ void __launch_bounds__(kThreads, 2)
    lrn_fwd_nchw(Source source, T* __restrict__ y, Columns columns, Lrn lrn) {
  const Walk walk(columns);
  const int64_t column = walk.item * kThreads + threadIdx.x;
  if (column >= columns.count) {
    return;
  }
  const int64_t origin = walk.origin(columns, column, V);
  const auto visit = [&](int32_t /*channel*/, int64_t offset, const Pack<T, V>& own, const Pack<T, V>& result) {
    source.keep(offset, own);
    store(y + offset, result);
  };
  lrn_of_column<T, V, Halo>(source, origin, columns.pixels, walk.first_channel, walk.begin, walk.end,
                            columns.group_channels, lrn, visit);
}

// ---------------------------------------------------------------- NCHW, in shared memory

// From x to y in its place, along one pixel of a tile; `column` begins Halo channels before the tile's.
template <class T, class L>
__device__ __forceinline__ void lrn_of_tile(const PlaneTile& tile, T* column, const L& lrn) {
  constexpr int Halo = kTiledHalo<L>, kStep = PlaneTiles::kStep;
  const int32_t stride = tile.lie.stride;
  T* ahead = column;
  T* here = column + Halo * stride;
  float window[2 * Halo + kStep];  // channels c - Halo ... c + kStep + Halo - 1
#pragma unroll
  for (int i = 0; i < 2 * Halo; ++i, ahead += stride) {
    window[i] = to_float(*ahead);
  }
#pragma unroll 1
  for (int32_t c = tile.begin; c < tile.end; c += kStep) {
#pragma unroll
    for (int i = 0; i < kStep; ++i, ahead += stride) {
      window[2 * Halo + i] = to_float(*ahead);
    }
    float t[kStep], w[kStep];
    scales<Halo>(window, lrn, t);
    inverse_power<T>(t, lrn, w);
#pragma unroll
    for (int i = 0; i < kStep; ++i, here += stride) {
      from_float(w[i] * window[Halo + i], *here);
    }
#pragma unroll
    for (int i = 0; i < 2 * Halo; ++i) {
      window[i] = window[i + kStep];
    }
  }
}

template <class T, class L, class Source>
__global__ void __launch_bounds__(kPlaneThreads, 8)
    lrn_fwd_planes(Source source, T* __restrict__ y, PlaneTiles tiles, L lrn) {
  constexpr int Halo = kTiledHalo<L>, kStep = PlaneTiles::kStep;
  const PlaneTile tile(tiles);
  const int32_t first = tile.begin - Halo, stride = tiles.stride;
  T* const x = place_run(dynamic_shared(), source.tensor() + tile.offset(first));
  T* const own = x + Halo * stride;
  const int32_t rows = ceil_div(tile.channels(), kStep) * kStep + 2 * Halo;
  tile.template fetch<kFetchLanes<T>, 2>(x, source.tensor(), first, rows);
  if constexpr (Source::kRectified) {
    tile.template rectify<kFetchLanes<T>, 2>(x, source, first, rows);
    __syncthreads();
    if (source.kept() != nullptr) {
      tile.template put<kRowLanes<T>>(own, source.kept());
      __syncthreads();
    }
  } else {
    await_runs();
  }
  if (static_cast<int32_t>(threadIdx.x) < tile.width) {
    lrn_of_tile(tile, x + threadIdx.x, lrn);
  }
  __syncthreads();
  tile.template put<kRowLanes<T>>(own, y);
}

// ---------------------------------------------------------------- launch

template <class T, class Source>
int launch_lrn_fwd_planes(const LrnShape& shape, const LrnWindow& window, const Source& source, T* y, void* stream) {
  return with_lrn<true, !Source::kRectified>(window, [&](auto lrn) {
    using L = decltype(lrn);
    const auto rows = [](int64_t chunk) { return chunk + 2 * kTiledHalo<L>; };
    constexpr int kLongestChunk = 192 / sizeof(T);
    const PlaneTiles tiles(shape, window.groups, sizeof(T), kLongestChunk, rows);
    return launch<lrn_fwd_planes<T, L, Source>>(tiles.grid(), tiles.block(), tiles.bytes(rows(tiles.chunk), sizeof(T)),
                                                stream, source, y, tiles, lrn);
  });
}

template <class T, int V, int Halo, class Source>
int launch_lrn_fwd_nhwc(const LrnShape& shape, const LrnWindow& window, const Source& source, T* y, void* stream) {
  const UnitGrid grid(shape.batch * shape.pixels, shape.channels / V, true);
  constexpr bool kFive = V != 1 && Halo == 2;
  return with_lrn<kFive>(window, [&](auto lrn) {
    return launch<lrn_fwd_nhwc<T, V, Halo, decltype(lrn), Source>>(
        grid.grid, grid.block, 0, stream, source, y, grid.units, static_cast<int32_t>(shape.channels),
        static_cast<int32_t>(shape.channels / window.groups), lrn);
  });
}

template <class T, int V, int Halo, class Source>
int launch_lrn_fwd_nchw(const LrnShape& shape, const LrnWindow& window, const Source& source, T* y, void* stream) {
  constexpr int kLongestChunk = 32;
  const Columns columns(shape, window.groups, V, kLongestChunk);
  return launch<lrn_fwd_nchw<T, V, Halo, Source>>(columns.grid(), dim3(kThreads), 0, stream, source, y, columns,
                                                  Lrn(window));
}

// A Source may depend on the layout. `aligned`: all tensors begin at multiples of 16 bytes.
template <class T, class NhwcSource, class NchwSource>
int launch_lrn_fwd(const LrnShape& shape, const LrnWindow& window, const NhwcSource& nhwc, const NchwSource& nchw, T* y,
                   bool aligned, void* stream) {
  constexpr int V = kVector<T>;
  const bool vector = aligned && lrn_in_vectors(shape, window, V);
  return with_halo(window, [&](auto halo) {
    constexpr int Halo = decltype(halo)::value;
    if (shape.channels_last) {
      return vector ? launch_lrn_fwd_nhwc<T, V, Halo>(shape, window, nhwc, y, stream)
                    : launch_lrn_fwd_nhwc<T, 1, kWidestHalo>(shape, window, nhwc, y, stream);
    }
    if constexpr (Halo == 2) {  // 20 channels of 8 pixels would take 150 registers
      if (vector) {
        return launch_lrn_fwd_nchw<T, V, Halo>(shape, window, nchw, y, stream);
      }
    }
    if constexpr (Halo == 2 || !NchwSource::kRectified) {
      if (PlaneTiles::take<NchwSource::kRectified>(shape, window) && alike_in_16(nchw.tensor(), y, nchw.kept())) {
        return launch_lrn_fwd_planes<T>(shape, window, nchw, y, stream);
      }
    }
    return launch_lrn_fwd_nchw<T, 1, Halo>(shape, window, nchw, y, stream);
  });
}

}  // namespace alexnet_fast::cuda
