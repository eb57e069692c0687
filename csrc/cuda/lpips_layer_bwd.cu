// Backward of lpips_layer_fwd.cu: the gradient of both images' features, and of the weight.
//
// Lengths are measured again, then h . a and h . b summed, then gradients written: x is read three times, the second
// and third time from L1 or L2, and dx written once. Only where the weight's gradient is wanted, so where LPIPS itself
// is trained, a second kernel reads x once more: there a thread stays with its channels, and sums over pixels in a
// fixed order.
//
// In bfloat16 NHWC sm_90's three loops issue 26 an element of the 38 that 3.0 TB/s leave for 4 bytes; in NCHW 123, so
// there instructions bind, threefold, and in float32 105 of 77. Neither was measured.
#include "cuda/common/lpips.cuh"
#include "cuda/common/sums.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

struct LpipsGradient {
  const float* dy;
  bool spatial;

  __device__ __forceinline__ float at(int64_t pair, int64_t pixel, int64_t pixels) const {
    return spatial ? dy[pair * pixels + pixel] : dy[pair] / static_cast<float>(pixels);
  }
};

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_bwd(LpipsTensors<T, V, Last> tensors, Divider units, LpipsGradient gradient, T* __restrict__ dx,
              float* __restrict__ kept) {
  ALEXNET_FAST_SHARED(float[2][kUnit], squares);
  ALEXNET_FAST_SHARED(float[2][kUnit], scales);
  ALEXNET_FAST_SHARED(float[2][kUnit], along);
  ALEXNET_FAST_SHARED(float[kUnit], dy);
  for (int64_t item = blockIdx.x; item < tensors.pairs * tensors.units; item += gridDim.x) {
    int64_t unit;
    const int64_t pair = units.divide(item, unit);
    const LpipsUnit<T, V, Last> here = tensors.at(pair, unit);
    here.measure(squares, scales);
    here.add_up(along, [&](float a, float b, float weight, int pixel, float (&terms)[2]) {
      const float h = weight * (a * scales[0][pixel] - b * scales[1][pixel]);
      terms[0] = h * a;
      terms[1] = h * b;
    });
    if (threadIdx.x < 2 * kUnit) {  // 2 g s^2 / |a| times the sum of h a
      const int k = threadIdx.x / kUnit, pixel = threadIdx.x % kUnit;
      const float g = pixel < here.count ? gradient.at(pair, unit * kUnit + pixel, tensors.pixels) : 0.0f;
      const float square = squares[k][pixel], scale = scales[k][pixel];
      // What is subtracted from h s below nearly cancels it, so its own roundings would show.
      const double radial = 2.0 * g * along[k][pixel] * scale * scale;
      along[k][pixel] = square == 0 ? 0.0f : static_cast<float>(radial / sqrt(static_cast<double>(square)));
      if (k == 0) {
        dy[pixel] = g;
      }
      if (kept != nullptr && pixel < here.count) {
        kept[(k * tensors.pairs + pair) * tensors.pixels + unit * kUnit + pixel] = scale;
      }
    }
    __syncthreads();
    T* const da = dx + (here.a - tensors.x);
    T* const db = dx + (here.b - tensors.x);
    here.for_each(
        [&](int pixel, int64_t offset, int32_t channel) {
          float a[V], b[V], w[V];
          unpack(load<V>(here.a + offset), a);
          unpack(load<V>(here.b + offset), b);
          here.read_weight(channel, w);
          const float s = scales[0][pixel], t = scales[1][pixel], g = 2 * dy[pixel];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const float h = g * w[v] * (a[v] * s - b[v] * t);
            a[v] = fmaf(h, s, -a[v] * along[0][pixel]);
            b[v] = fmaf(b[v], along[1][pixel], -h * t);
          }
          store(da + offset, pack<T>(a));
          store(db + offset, pack<T>(b));
        },
        [](int) {});
    __syncthreads();
  }
}

// A row of partial sums for each block: over its pixels, g (a s - b t)^2.
template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_weight(LpipsTensors<T, V, Last> tensors, Units units, Divider pixels, LpipsGradient gradient,
                 const float* __restrict__ kept, float* __restrict__ rows) {
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < tensors.channels;
  const int64_t half = tensors.pairs * tensors.pixels;
  float total[V] = {};
  for (int64_t unit = wanted ? units.first() : units.count; unit < units.count; unit += units.stride()) {
    int64_t pixel;
    const int64_t pair = pixels.divide(unit, pixel);
    const T* const a = tensors.x + (Last ? unit * tensors.channels + channel
                                         : (pair * tensors.channels + channel) * tensors.pixels + pixel);
    const float s = kept[unit], t = kept[half + unit], g = gradient.at(pair, pixel, tensors.pixels);
    float first[V], second[V];
    unpack(load<V>(a), first);
    unpack(load<V>(a + half * tensors.channels), second);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float difference = first[v] * s - second[v] * t;
      total[v] += g * difference * difference;
    }
  }
  store_block_sums(total, rows + int64_t{blockIdx.x} * tensors.channels, channel, wanted);
}

UnitGrid weight_grid(const LpipsParams& p, int V) {
  return UnitGrid(p.pairs * p.pixels, p.channels / V, p.channels_last, kSumItems);
}

}  // namespace

int64_t lpips_layer_bwd_partial_rows(const LpipsParams& p) {
  int64_t rows = 0;
  with_lpips_kernel(p, [&](auto, auto vector, auto) {
    rows = weight_grid(p, vector.value).grid.x;
    return cudaSuccess;
  });
  // After the sums, the 2 pairs P scales that the first kernel leaves to the second.
  return rows + ceil_div<int64_t>(2 * p.pairs * p.pixels, p.channels);
}

int lpips_layer_bwd(const LpipsParams& p, void* stream) {
  if (p.pairs * p.channels * p.pixels == 0) {
    return cudaSuccess;
  }
  const LpipsGradient gradient{static_cast<const float*>(p.dy), p.spatial};
  return with_lpips_kernel(p, [&](auto type, auto vector, auto last) {
    using T = decltype(type);
    constexpr int V = vector.value;
    const LpipsTensors<T, V, last.value> tensors(p);
    const UnitGrid weights = weight_grid(p, V);
    float* const rows = static_cast<float*>(p.partial);
    float* const kept = rows == nullptr ? nullptr : rows + int64_t{weights.grid.x} * p.channels;
    int error = launch<lpips_bwd<T, V, last.value>>(tensors.grid(), dim3(kThreads), 0, stream, tensors,
                                                    Divider(tensors.units), gradient, static_cast<T*>(p.dx), kept);
    if (error != cudaSuccess || rows == nullptr) {
      return error;
    }
    error = launch<lpips_weight<T, V, last.value>>(weights.grid, weights.block, 0, stream, tensors, weights.units,
                                                   Divider(p.pixels), gradient, static_cast<const float*>(kept), rows);
    if (error != cudaSuccess) {
      return error;
    }
    return launch_add_rows<float>(rows, weights.grid.x, p.channels, p.dweight, stream);
  });
}

}  // namespace alexnet_fast::cuda
