// Local response normalization backward: the kernels of lrn_bwd.cu, and of epilogue_bwd.cu where the stage has an LRN.
//
//   dx_i = dy_i t_i^-beta - 2 alpha beta / size * x_i * (sum of q_j over the channels j whose windows hold i)
//   q_j  = dy_j x_j t_j^(-beta - 1),  t recomputed from x
//
// Channel i lies in the windows of i - after ... i + before: the mirrored window. So dx_i needs dy of Halo channels and
// x of 2 Halo channels on either side.
//
// NHWC: as forward, a thread owns V channels and reads the halo through L1. It computes t and q for V + 2 Halo
// channels, 1.5 times what it owns at V = 8 and size 5; an exchange through shared memory would save that third of the
// arithmetic for two barriers. NCHW: as forward, a walk through channels, with x, t^-beta dy and q of the last ones in
// registers.
//
// Gradient: where dy comes from (a tensor, or gathered through a pool). kRectified: x is a ReLU's output, whose
// gradient is masked, and summed for the bias.
#pragma once

#include "cuda/common/lrn_walk.cuh"
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
  Lrn lrn;
};

// ---------------------------------------------------------------- NHWC

template <class T, int V, int Halo, bool kRectified, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_bwd_nhwc(LrnBackward<T> p, Gradient gradient, Units units, int32_t channels, int32_t group_channels) {
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < channels;
  const int32_t before = channel % group_channels, after = group_channels - before - V;
  const Plain<T> source{p.x};
  float total[V] = {};
  for (int64_t pixel = wanted ? units.first() : units.count; pixel < units.count; pixel += units.stride()) {
    const int64_t offset = pixel * channels + channel;
    Neighbourhood<T, V, 2 * Halo> near;
    near.load(source, offset, channel, before, after);

    const typename Gradient::Place place = gradient.place(pixel);
    float dy[Halo + V + Halo] = {};
    constexpr int kPiece = Halo < V ? Halo : V;
    float own[V], piece[kPiece];
    gradient.at(place, offset, channel, own);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dy[Halo + i] = own[i];
    }
#pragma unroll
    for (int i = 0; i < Halo; i += kPiece) {
      if (Halo - i <= before) {
        gradient.at(place, offset - (Halo - i), channel - (Halo - i), piece);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          dy[i + j] = piece[j];
        }
      }
      if (i < after) {
        gradient.at(place, offset + V + i, channel + V + i, piece);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) {
          dy[Halo + V + i + j] = piece[j];
        }
      }
    }

    float x[2 * Halo + V + 2 * Halo];
    near.unpack(x);
    constexpr int kQ = Halo + V + Halo;
    float t[kQ], w[kQ], q[kQ], sum[V];
    scales<Halo>(x, p.lrn, t);
    inverse_power<T>(t, p.lrn, w);
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      // Beyond the group's ends there is no q, whatever its t: a NaN within must not come back from there.
      const bool beyond = (i < Halo && Halo - i > before) || (i >= Halo + V && i - Halo - V >= after);
      q[i] = beyond ? 0.0f : dy[i] * x[Halo + i] * w[i] * reciprocal<T>(t[i]);
    }
    window_sums<Halo>(q, p.lrn.after, p.lrn.before, sum);
    float dx[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const float own_x = x[2 * Halo + i];
      dx[i] = fmaf(-p.lrn.slope * own_x, sum[i], dy[Halo + i] * w[Halo + i]);
      if (kRectified && own_x <= 0) {
        dx[i] = 0;
      }
      total[i] += dx[i];
    }
    store(p.dx + offset, pack<T>(dx));
  }
  if (kRectified && p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

// ---------------------------------------------------------------- NCHW

constexpr int kLongestChunk = 64;  // of channels: the halo on either side costs more than forward

template <class T, int V, int Halo, bool kRectified, class Gradient>
__global__ void __launch_bounds__(kThreads, 1)
    lrn_bwd_nchw(LrnBackward<T> p, Gradient gradient, Columns columns, int64_t items) {
  constexpr int kStep = 4;
  constexpr int kWarps = kThreads / 32;
  ALEXNET_FAST_SHARED(float[kWarps][kLongestChunk], sums);
  const int lane = threadIdx.x % 32;
  float (&own_sums)[kLongestChunk] = sums[threadIdx.x / 32];
  const Walk walk(columns);
  const bool summing = kRectified && p.partial != nullptr;
  if (summing) {
    for (int i = lane; i < kLongestChunk; i += 32) {
      own_sums[i] = 0;
    }
    __syncwarp();
  }
  for (int64_t base = walk.item * kThreads; base < columns.count; base += items * kThreads) {
    const int64_t column = base + threadIdx.x;
    const bool active = column < columns.count;
    const int64_t origin = active ? walk.origin(columns, column, V) : 0;
    typename Gradient::Place place{};
    if (active) {
      place = gradient.place(column * V);
    }
    const auto load_x = [&](int32_t channel) {
      const bool wanted = active && channel >= max(walk.begin - 2 * Halo, 0) &&
                          channel < min(walk.end + 2 * Halo, columns.group_channels);
      return wanted ? load<V>(p.x + origin + channel * columns.pixels) : Pack<T, V>{};
    };

    // At step c: x of channels c - 2 Halo and on, q of channels c - Halo and on, a = dy t^-beta of channels c and on.
    // The walk begins so early that q is complete when the first dx is due.
    Pack<T, V> x[4 * Halo + kStep];
    float q[2 * Halo + kStep][V] = {}, a[Halo + kStep][V] = {};
    int32_t c = walk.begin - ceil_div(2 * Halo, kStep) * kStep;
#pragma unroll
    for (int i = 0; i < 4 * Halo; ++i) {
      x[i] = load_x(c - 2 * Halo + i);
    }
    for (; c < walk.end; c += kStep) {
      float dy[kStep][V] = {};
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        x[4 * Halo + i] = load_x(c + 2 * Halo + i);
        const int32_t channel = c + Halo + i;
        if (active && channel >= max(walk.begin - Halo, 0) && channel < min(walk.end + Halo, columns.group_channels)) {
          gradient.at(place, origin + channel * columns.pixels, walk.first_channel + channel, dy[i]);
        }
      }
      float dx[kStep][V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        float values[Halo + kStep + Halo], t[kStep], w[kStep], products[Halo + kStep + Halo], sum[kStep];
#pragma unroll
        for (int i = 0; i < 2 * Halo + kStep; ++i) {
          values[i] = element(x[2 * Halo + i], v);
        }
        scales<Halo>(values, p.lrn, t);
        inverse_power<T>(t, p.lrn, w);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const int32_t channel = c + Halo + i;
          const bool beyond = channel < 0 || channel >= columns.group_channels;
          a[Halo + i][v] = dy[i][v] * w[i];
          q[2 * Halo + i][v] = beyond ? 0.0f : a[Halo + i][v] * values[Halo + i] * reciprocal<T>(t[i]);
        }
#pragma unroll
        for (int i = 0; i < 2 * Halo + kStep; ++i) {
          products[i] = q[i][v];
        }
        window_sums<Halo>(products, p.lrn.after, p.lrn.before, sum);
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          const float own = element(x[2 * Halo + i], v);
          dx[i][v] = fmaf(-p.lrn.slope * own, sum[i], a[i][v]);
          if (kRectified && own <= 0) {
            dx[i][v] = 0;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (active && c + i >= walk.begin && c + i < walk.end) {
          store(p.dx + origin + (c + i) * columns.pixels, pack<T>(dx[i]));
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

// How many neighbours in memory a thread owns: 16 bytes of channels in NHWC, 8 of pixels in NCHW (x of 12 channels and
// 14 float32 sums a pixel are 112 registers at 4 pixels, and would be 168 at 8), or one.
template <class T, class Gradient>
int lrn_bwd_vector(const LrnShape& shape, const LrnWindow& window, bool aligned) {
  const int V = shape.channels_last ? kVector<T> : kVector<T> / 2;
  const bool possible = shape.channels_last || (window.size <= 5 && std::is_same_v<Gradient, PlainGradient<T>>);
  return possible && aligned && lrn_in_vectors(shape, window, V) ? V : 1;
}

// Blocks along units, and so rows of `partial`.
inline int64_t lrn_bwd_rows(const LrnShape& shape, const LrnWindow& window, int V) {
  return shape.channels_last ? UnitGrid(shape.batch * shape.pixels, shape.channels / V, true, kSumItems).grid.x
                             : std::min(Columns(shape, window.groups, V, kLongestChunk).items(), kSumItems);
}

template <class T, int V, int Halo, bool kRectified, class Gradient>
int launch_lrn_bwd_nhwc(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p,
                        const Gradient& gradient, void* stream) {
  const UnitGrid grid(shape.batch * shape.pixels, shape.channels / V, true,
                      p.partial == nullptr ? INT32_MAX : kSumItems);
  return launch<lrn_bwd_nhwc<T, V, Halo, kRectified, Gradient>>(grid.grid, grid.block, 0, stream, p, gradient,
                                                                grid.units, static_cast<int32_t>(shape.channels),
                                                                static_cast<int32_t>(shape.channels / window.groups));
}

template <class T, int V, int Halo, bool kRectified, class Gradient>
int launch_lrn_bwd_nchw(const LrnShape& shape, const LrnWindow& window, const LrnBackward<T>& p,
                        const Gradient& gradient, void* stream) {
  const Columns columns(shape, window.groups, V, kLongestChunk);
  const int64_t items = std::min<int64_t>(columns.items(), p.partial == nullptr ? INT32_MAX : kSumItems);
  return launch<lrn_bwd_nchw<T, V, Halo, kRectified, Gradient>>(columns.grid(items), dim3(kThreads), 0, stream, p,
                                                                gradient, columns, items);
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
    if constexpr (Halo == 2 && std::is_same_v<Gradient, PlainGradient<T>>) {
      if (vector) {
        return launch_lrn_bwd_nchw<T, kVector<T> / 2, Halo, kRectified>(shape, window, p, gradient, stream);
      }
    }
    return launch_lrn_bwd_nchw<T, 1, Halo, kRectified>(shape, window, p, gradient, stream);
  });
}

}  // namespace alexnet_fast::cuda
