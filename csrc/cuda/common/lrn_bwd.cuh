// Local response normalization backward: the kernels of lrn_bwd.cu, and of epilogue_bwd.cu where the stage has an LRN.
//
//   dx_i = dy_i t_i^-beta - 2 alpha beta / size * x_i * (sum of q_j over the channels j whose windows hold i)
//   q_j  = dy_j x_j t_j^(-beta - 1),  t recomputed from x
//
// Channel i lies in the windows of i - after ... i + before: the mirrored window. So dx_i needs q of Halo channels on
// either side, and their t needs x of Halo channels more.
//
// NHWC: as forward, a thread owns V channels of a pixel and reads the halo of x through L1. It computes q of its own
// channels alone; the threads of a pixel show each other theirs in shared memory, one barrier a pixel. (Computing q of
// the halo as well needs no barrier, but half as much arithmetic again at V = 8 and size 5, and where dy comes through
// a pool three gathers for one.) NCHW: as forward, a walk through channels, with x, t^-beta dy and q of the last ones
// in registers. Planes of any size are walked through in shared memory (lrn_bwd_planes.cuh), also behind AlexNet's pool
// (lrn_pool_bwd_planes.cuh).
//
// Gradient: where dy comes from (a tensor, or gathered through a pool). kRectified: x is a ReLU's output, whose
// gradient is masked, and summed for the bias.
#pragma once

#include "cuda/common/lrn_bwd_planes.cuh"
#include "cuda/common/source.cuh"
#include "cuda/common/sums.cuh"

namespace alexnet_fast::cuda {

template <class T>
struct PlainGradient {
  const T* dy;

  struct Place {};
  __device__ __forceinline__ Place place(int64_t /*pixel*/) const { return {}; }

  template <int N>
  __device__ __forceinline__ void at(const Place&, int64_t offset, int32_t /*channel*/, float (&values)[N]) const {
    unpack(load<N>(dy + offset), values);
  }
};

template <class T>
struct LrnBackward {
  const T* x;
  T* dx;
  float* partial;  // (blocks along units, channels): sums of dx for the bias, or null
};

// ---------------------------------------------------------------- NHWC

// How the threads of a pixel lie over its channels, which may be more than a block has threads. Then the first and the
// last `edge` threads compute q for their neighbours only: the next block has the same channels.
struct Tile {
  int32_t edge, threads;

  Tile(int64_t vectors, int V, int halo)
      : edge(vectors <= kThreads ? 0 : ceil_div(halo, V)), threads(vectors <= kThreads ? vectors : kThreads) {}
  int64_t owned() const { return threads - 2 * edge; }
};

template <class T, int V, int Halo, class L, bool kRectified, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_bwd_nhwc(LrnBackward<T> p, Gradient gradient, int64_t pixels, int32_t channels, int32_t group_channels,
                 Tile tile, L lrn) {
  ALEXNET_FAST_SHARED(float[2][kThreads * V], shown);  // in turns: a barrier later everybody has read the other one
  const int32_t lane = threadIdx.x;
  const int32_t vector = static_cast<int32_t>(blockIdx.y) * (tile.threads - 2 * tile.edge) - tile.edge + lane;
  const int32_t channel = vector * V;
  const bool there = channel >= 0 && channel < channels;
  const bool owned = there && lane >= tile.edge && lane < tile.threads - tile.edge;
  const int32_t place = (threadIdx.y * blockDim.x + lane) * V;
  const Neighbourhood<Plain<T>, T, V, Halo> near(Plain<T>{p.x}, there ? channel : 0, group_channels);
  float total[V] = {};
  int turn = 0;
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < pixels; first += int64_t{gridDim.x} * blockDim.y) {
    const int64_t pixel = first + threadIdx.y;
    const bool active = there && pixel < pixels;
    const int64_t offset = pixel * channels + channel;
    float x[Halo + V + Halo] = {}, a[V] = {}, q[Halo + V + Halo] = {};
    if (active) {
      const auto values = near.load(offset);
      float dy[V], t[V], w[V], reciprocal[V];
      gradient.at(gradient.place(pixel), offset, channel, dy);
      values.unpack(x);
      scales<Halo>(x, lrn, t);
      inverse_power<T>(t, lrn, w, reciprocal);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = dy[i] * w[i];
        q[Halo + i] = a[i] * x[Halo + i] * reciprocal[i];
      }
    }
    constexpr int kPart = V < 4 ? V : 4;
    float* const own = &shown[turn][place];
#pragma unroll
    for (int i = 0; i < V; i += kPart) {
      float part[kPart];
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        part[j] = q[Halo + i + j];
      }
      store_shared(own + i, pack<float>(part));
    }
    __syncthreads();
    if (active && owned) {
      constexpr int kPiece = Halo < kPart ? Halo : kPart;  // never across a group's end
#pragma unroll
      for (int i = 0; i < Halo; i += kPiece) {
        float left[kPiece] = {}, right[kPiece] = {};
        if (Halo - i <= near.before) {
          unpack(load<kPiece>(own - Halo + i), left);
        }
        if (i < near.after) {
          unpack(load<kPiece>(own + V + i), right);
        }
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          q[i + j] = left[j];
          q[Halo + V + i + j] = right[j];
        }
      }
      float sum[V], dx[V];
      window_sums<Halo>(q, lrn.after, lrn.before, sum);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        dx[i] = fmaf(-lrn.slope * x[Halo + i], sum[i], a[i]);
        if (kRectified && x[Halo + i] <= 0) {
          dx[i] = 0;
        }
        total[i] += dx[i];
      }
      store(p.dx + offset, pack<T>(dx));
    }
    turn ^= 1;
  }
  if (kRectified && p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, owned);
  }
}

// ---------------------------------------------------------------- NCHW

constexpr int kLongestChunk = 64;  // of channels: the halo on either side costs more than forward

template <class T, int V, int Halo, bool kRectified, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_bwd_nchw(LrnBackward<T> p, Gradient gradient, Columns columns, int64_t items, Lrn lrn) {
  constexpr int kStep = 4;
  constexpr int kWarps = kThreads / 32;
  ALEXNET_FAST_SHARED(float[kWarps][kLongestChunk], sums);
  const int lane = threadIdx.x % 32;
  float (&own_sums)[kLongestChunk] = sums[threadIdx.x / 32];
  const Walk walk(columns);
  const int32_t channels = columns.group_channels;
  const int64_t plane = columns.pixels;
  const bool summing = kRectified && p.partial != nullptr;
  if (summing) {
    for (int i = lane; i < kLongestChunk; i += 32) {
      own_sums[i] = 0;
    }
    __syncwarp();
  }
  for (int64_t first = walk.item * kThreads; first < columns.count; first += items * kThreads) {
    const bool active = first + threadIdx.x < columns.count;
    // Threads beyond the end go along, over the last column: the warp's sums need them.
    const int64_t column = active ? first + threadIdx.x : columns.count - 1;
    const int64_t origin = walk.origin(columns, column, V);
    const typename Gradient::Place place = gradient.place(column * V);

    // At step c: x of channels c - 2 Halo and on, q of channels c - Halo and on, a = dy t^-beta of channels c and on.
    // The walk begins so early that q is complete when the first dx is due.
    Pack<T, V> x[4 * Halo + kStep];
    float q[2 * Halo + kStep][V] = {}, a[Halo + kStep][V] = {};
    int32_t c = walk.begin - ceil_div(2 * Halo, kStep) * kStep;
    int64_t here = origin + c * plane, ahead = here + 2 * Halo * plane, between = here + Halo * plane;
#pragma unroll
    for (int i = 0; i < 4 * Halo; ++i) {
      const int32_t channel = c - 2 * Halo + i;
      x[i] = Pack<T, V>{};
      if (channel >= max(walk.begin - 2 * Halo, 0) && channel < channels) {
        x[i] = load<V>(p.x + origin + channel * plane);
      }
    }
    // A whole step writes all its channels, and all it reads lies in the group: nothing needs to be asked per channel.
    const auto step = [&](auto is_whole) {
      constexpr bool whole = decltype(is_whole)::value;
      float dy[kStep][V] = {};
#pragma unroll
      for (int i = 0; i < kStep; ++i, ahead += plane, between += plane) {
        const int32_t x_channel = c + 2 * Halo + i, q_channel = c + Halo + i;
        x[4 * Halo + i] = Pack<T, V>{};
        if (whole || (x_channel >= 0 && x_channel < min(walk.end + 2 * Halo, channels))) {
          x[4 * Halo + i] = load<V>(p.x + ahead);
        }
        if (whole || (q_channel >= max(walk.begin - Halo, 0) && q_channel < min(walk.end + Halo, channels))) {
          gradient.at(place, between, walk.first_channel + q_channel, dy[i]);
        }
      }
      float dx[kStep][V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float values[Halo + kStep + Halo], t[kStep], w[kStep], reciprocal[kStep], products[Halo + kStep + Halo],
            sum[kStep];
#pragma unroll
        for (int i = 0; i < 2 * Halo + kStep; ++i) {
          values[i] = element(x[2 * Halo + i], v);
        }
        scales<Halo>(values, lrn, t);
        inverse_power<T>(t, lrn, w, reciprocal);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          // Beyond the group's ends there is no q, whatever its t: a NaN within must not come back from there.
          const bool beyond = !whole && (c + Halo + i < 0 || c + Halo + i >= channels);
          a[Halo + i][v] = dy[i][v] * w[i];
          q[2 * Halo + i][v] = beyond ? 0.0f : a[Halo + i][v] * values[Halo + i] * reciprocal[i];
        }
#pragma unroll
        for (int i = 0; i < 2 * Halo + kStep; ++i) {
          products[i] = q[i][v];
        }
        window_sums<Halo>(products, lrn.after, lrn.before, sum);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float own = element(x[2 * Halo + i], v);
          dx[i][v] = fmaf(-lrn.slope * own, sum[i], a[i][v]);
          if (kRectified && own <= 0) {
            dx[i][v] = 0;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kStep; ++i, here += plane) {
        if (active && (whole || (c + i >= walk.begin && c + i < walk.end))) {
          store(p.dx + here, pack<T>(dx[i]));
        }
      }
      if (summing && c >= walk.begin) {
        float totals[kStep] = {};
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            totals[i] += active ? dx[i][v] : 0.0f;
          }
        }
        const float total = sum_lanes(totals);
        const int32_t channel = c - walk.begin + lane / (32 / kStep);
        if (lane % (32 / kStep) == 0 && channel < walk.end - walk.begin) {
          own_sums[channel] += total;
        }
      }
#pragma unroll
      for (int i = 0; i < 4 * Halo; ++i) {
        x[i] = x[i + kStep];
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int i = 0; i < 2 * Halo; ++i) {
          q[i][v] = q[i + kStep][v];
        }
#pragma unroll
        for (int i = 0; i < Halo; ++i) {
          a[i][v] = a[i + kStep][v];
        }
      }
      c += kStep;
    };
    while (c < walk.begin) {
      step(std::false_type{});
    }
    while (c + kStep <= walk.end && c + 2 * Halo + kStep <= channels) {
      step(std::true_type{});
    }
    while (c < walk.end) {
      step(std::false_type{});
    }
  }
  if (summing) {
    __syncthreads();
    for (int32_t i = threadIdx.x; i < walk.end - walk.begin; i += kThreads) {
      float total = 0;
      for (int warp = 0; warp < kWarps; ++warp) {
        total += sums[warp][i];
      }
      p.partial[walk.item * columns.channels + walk.first_channel + walk.begin + i] = total;
    }
  }
}

// ---------------------------------------------------------------- launch

template <bool kRectified, class T>
int launch_lrn_bwd_planes(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p, const T* dy,
                          void* stream) {
  using Tiles = SliceTiles<T>;
  const Tiles tiles(shape, window.groups);
  const auto with = [&](const auto& apart) {
    return launch<lrn_bwd_planes<T, kRectified, std::decay_t<decltype(apart)>>>(
        tiles.x.grid(), dim3(Tiles::kThreads), tiles.bytes, stream, p.x, dy, p.dx, p.partial, tiles, apart,
        LrnOfFive(window));
  };
  return tiles.x.stride == OddApart<T>::x ? with(OddApart<T>{}) : with(AnyApart{tiles.x.stride});
}

// How many neighbours in memory a thread owns: 16 bytes of channels in NHWC, 8 of pixels in NCHW (x of 12 channels and
// 14 float32 sums a pixel are 112 registers at 4 pixels, and would be 168 at 8), or one.
template <class T, class Gradient>
int lrn_bwd_vector(const LrnShape& shape, const LrnWindow& window, bool aligned) {
  const int V = shape.channels_last ? kVector<T> : kVector<T> / 2;
  const bool possible = shape.channels_last || (window.size <= 5 && std::is_same_v<Gradient, PlainGradient<T>>);
  return possible && aligned && lrn_in_vectors(shape, window, V) ? V : 1;
}

// Blocks of a chunk or tile of channels, and so rows of `partial`.
inline int64_t lrn_bwd_items(const LrnShape& shape, const LrnWindow& window, int V, bool summing) {
  const int64_t most = summing ? kSumItems : INT32_MAX;
  if (!shape.channels_last) {
    return std::min(Columns(shape, window.groups, V, kLongestChunk).items(), most);
  }
  const Tile tile(shape.channels / V, V, kWidestHalo);
  const int64_t rectangles = ceil_div<int64_t>(shape.batch * shape.pixels, kThreads / tile.threads);
  return std::min(ceil_div(rectangles, std::clamp<int64_t>(rectangles / 2048, 1, 4)), most);
}

template <class T, int V, int Halo, bool kRectified, class Gradient>
int launch_lrn_bwd_nhwc(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p,
                        const Gradient& gradient, void* stream) {
  const Tile tile(shape.channels / V, V, Halo);
  const dim3 grid(lrn_bwd_items(shape, window, V, p.partial != nullptr), ceil_div(shape.channels / V, tile.owned()));
  const dim3 block(tile.threads, kThreads / tile.threads);
  // AlexNet's window behind AlexNet's pool is lrn_pool_bwd.cuh's, and lrn_pool_bwd_planes.cuh's.
  constexpr bool kFive = V != 1 && Halo == 2 && std::is_same_v<Gradient, PlainGradient<T>>;
  return with_lrn<kFive>(window, [&](auto lrn) {
    return launch<lrn_bwd_nhwc<T, V, Halo, decltype(lrn), kRectified, Gradient>>(
        grid, block, 0, stream, p, gradient, shape.batch * shape.pixels, static_cast<int32_t>(shape.channels),
        static_cast<int32_t>(shape.channels / window.groups), tile, lrn);
  });
}

template <class T, int V, int Halo, bool kRectified, class Gradient>
int launch_lrn_bwd_nchw(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p,
                        const Gradient& gradient, void* stream) {
  const Columns columns(shape, window.groups, V, kLongestChunk);
  const int64_t items = lrn_bwd_items(shape, window, V, p.partial != nullptr);
  return launch<lrn_bwd_nchw<T, V, Halo, kRectified, Gradient>>(columns.grid(items), dim3(kThreads), 0, stream, p,
                                                                gradient, columns, items, Lrn(window));
}

// `aligned`: all tensors begin at multiples of 16 bytes.
template <bool kRectified, class T, class Gradient>
int launch_lrn_bwd(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p, const Gradient& gradient,
                   bool aligned, void* stream) {
  const bool vector = lrn_bwd_vector<T, Gradient>(shape, window, aligned) > 1;
  return with_halo(window, [&](auto halo) {
    constexpr int Halo = decltype(halo)::value;
    if (shape.channels_last) {
      return vector ? launch_lrn_bwd_nhwc<T, kVector<T>, Halo, kRectified>(shape, window, p, gradient, stream)
                    : launch_lrn_bwd_nhwc<T, 1, kWidestHalo, kRectified>(shape, window, p, gradient, stream);
    }
    if constexpr (std::is_same_v<Gradient, PlainGradient<T>>) {
      if (SliceTiles<T>::template take<kRectified>(shape, window, p.x, p.dx)) {
        return launch_lrn_bwd_planes<kRectified>(shape, window, p, gradient.dy, stream);
      }
      if constexpr (!kRectified) {
        if (BackwardTiles<T>::take(shape, window, gradient.dy, p.dx)) {
          const BackwardTiles<T> tiles(shape, window.groups);
          return launch<lrn_bwd_planes_any<T>>(tiles.grid(),
                                               dim3(std::min(ceil_div(tiles.width, 32) * 32, kPlaneThreads)),
                                               tiles.bytes_of_both, stream, p.x, gradient.dy, p.dx, tiles, Lrn(window));
        }
      }
    }
    if constexpr (kRectified && Halo == 2 && std::is_same_v<Gradient, PlainGradient<T>>) {
      if (vector) {
        return launch_lrn_bwd_nchw<T, kVector<T> / 2, Halo, kRectified>(shape, window, p, gradient, stream);
      }
    }
    return launch_lrn_bwd_nchw<T, 1, Halo, kRectified>(shape, window, p, gradient, stream);
  });
}

}  // namespace alexnet_fast::cuda
