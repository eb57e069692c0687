// A unit of a pair of images: kLpipsUnit pixels, whose sums over channels a block makes.
//
// NHWC: as many lanes as a pixel has vectors of V channels, a power of two of at most 32, share it, and add up by
// shuffles. NCHW, where lpips_planes.cuh does not take the images: a thread has one pixel and every fourth channel, and
// adds up through shared memory. Either way one order of additions, which depends on shapes alone.
#pragma once

#include "cuda/common/divider.cuh"
#include "cuda/common/units.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

constexpr int kUnit = static_cast<int>(kLpipsUnit);
constexpr int kSlices = kThreads / kUnit;  // of channels, in NCHW
static_assert(kThreads % kUnit == 0);

// 1 / (|a| + eps) of |a|^2, or 0 where that is 0.
__device__ __forceinline__ float inverse_length(float square) {
  return square == 0 ? 0.0f : 1 / (sqrtf(square) + static_cast<float>(kLpipsEpsilon));
}

template <class T, int V, bool Last>
struct LpipsUnit {
  static_assert(Last || V == 1);

  const T *a, *b;  // the first pixel's
  const float* weight;
  int64_t pixels;  // of an image
  int32_t channels, count;
  int32_t lanes;  // of a pixel, in NHWC

  // Calls body(pixel, offset from a and b, channel) for each vector of channels that this thread has, pixel by pixel,
  // and then done(pixel), which all threads reach together: for pixels that are not there too.
  template <class Body, class Done>
  __device__ __forceinline__ void for_each(Body body, Done done) const {
    if constexpr (Last) {
      const int lane = threadIdx.x % lanes;
      for (int pixel = threadIdx.x / lanes; pixel < kUnit; pixel += kThreads / lanes) {
        for (int32_t channel = pixel < count ? lane * V : channels; channel < channels; channel += lanes * V) {
          body(pixel, static_cast<int64_t>(pixel) * channels + channel, channel);
        }
        done(pixel);
      }
    } else {
      const int pixel = threadIdx.x % kUnit;
      for (int32_t channel = pixel < count ? threadIdx.x / kUnit : channels; channel < channels; channel += kSlices) {
        body(pixel, channel * pixels + pixel, channel);
      }
      done(pixel);
    }
  }

  // sums[k][pixel] = the sum over channels of what term(a, b, weight, pixel, terms) leaves in terms[k]; 0 for pixels
  // that are not there. Begins and ends with all threads together.
  template <int N, class Term>
  __device__ __forceinline__ void add_up(float (&sums)[N][kUnit], Term term) const {
    ALEXNET_FAST_SHARED(float[N][kThreads], slices);
    float total[N] = {};
    for_each(
        [&](int pixel, int64_t offset, int32_t channel) {
          float x[V], y[V], w[V];
          unpack(load<V>(a + offset), x);
          unpack(load<V>(b + offset), y);
          read_weight(channel, w);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            float terms[N];
            term(x[v], y[v], w[v], pixel, terms);
#pragma unroll
            for (int k = 0; k < N; ++k) {
              total[k] += terms[k];
            }
          }
        },
        [&](int pixel) {
#pragma unroll
          for (int k = 0; k < N; ++k) {
            if constexpr (Last) {
              for (int distance = lanes / 2; distance > 0; distance /= 2) {
                total[k] += __shfl_xor_sync(0xffffffff, total[k], distance);
              }
              if (threadIdx.x % lanes == 0) {
                sums[k][pixel] = total[k];
              }
              total[k] = 0;
            } else {
              slices[k][threadIdx.x] = total[k];
            }
          }
        });
    __syncthreads();
    if constexpr (!Last) {
      if (threadIdx.x < kUnit) {
#pragma unroll
        for (int k = 0; k < N; ++k) {
          float sum = 0;
#pragma unroll
          for (int slice = 0; slice < kSlices; ++slice) {
            sum += slices[k][slice * kUnit + threadIdx.x];
          }
          sums[k][threadIdx.x] = sum;
        }
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void read_weight(int32_t channel, float (&w)[V]) const {
    constexpr int step = V < 4 ? V : 4;
#pragma unroll
    for (int v = 0; v < V; v += step) {
      const Pack<float, step> some = load<step>(weight + channel + v);
#pragma unroll
      for (int i = 0; i < step; ++i) {
        w[v + i] = element(some, i);
      }
    }
  }

  // squares[0 .. 1]: |a|^2 and |b|^2; scales[0 .. 1]: what inverse_length() makes of them.
  __device__ __forceinline__ void measure(float (&squares)[2][kUnit], float (&scales)[2][kUnit]) const {
    add_up(squares, [](float x, float y, float, int, float (&terms)[2]) {
      terms[0] = x * x;
      terms[1] = y * y;
    });
    if (threadIdx.x < 2 * kUnit) {
      const int k = threadIdx.x / kUnit, pixel = threadIdx.x % kUnit;
      scales[k][pixel] = inverse_length(squares[k][pixel]);
    }
    __syncthreads();
  }
};

template <class T, int V, bool Last>
struct LpipsTensors {
  const T* x;
  const float* weight;
  int64_t pairs, pixels, units;  // units of a pair
  int32_t channels, lanes;

  explicit LpipsTensors(const LpipsParams& p)
      : x(static_cast<const T*>(p.x)),
        weight(static_cast<const float*>(p.weight)),
        pairs(p.pairs),
        pixels(p.pixels),
        units(lpips_units(p)),
        channels(static_cast<int32_t>(p.channels)),
        lanes(1) {
    while (lanes < 32 && lanes * V < channels) {
      lanes *= 2;
    }
  }

  __device__ __forceinline__ LpipsUnit<T, V, Last> at(int64_t pair, int64_t unit) const {
    const int64_t image = pixels * channels, pixel = unit * kUnit;
    const T* const a = x + pair * image + pixel * (Last ? channels : 1);
    const int32_t count = static_cast<int32_t>(min(static_cast<int64_t>(kUnit), pixels - pixel));
    return {a, a + pairs * image, weight, pixels, channels, count, lanes};
  }

  dim3 grid() const { return dim3(static_cast<uint32_t>(std::min<int64_t>(pairs * units, INT32_MAX))); }
};

}  // namespace alexnet_fast::cuda
