// The distance of two images' features in a layer of LPIPS. The formulas: alexnet_fast/ops/lpips_layer.py.
//
// A block measures the lengths of 64 pixels' features in both images, and reads the features a second time for the
// differences of their directions: from L1, where 64 pixels of 64 channels are 32 KB of float32 and of 512, 256 KB, out
// of L2. Bytes from device memory: x once. Writing down u - v, which plain operators do several times, would cost more.
// Not in one pass, as w (x^2 s^2 - 2 x y s t + y^2 t^2) would lose the digits of two images that are nearly alike.
//
// In bfloat16 NHWC sm_90 issues 110 and 95 for 8 channels of both images, 13 an element of the 19 that 3.0 TB/s leave
// for its 2 bytes: bytes bind. Not measured.
//
// NCHW: lines in shared memory (common/lpips_planes.cuh), where both passes read them. For 8 pixels of both images the
// copy issues 18, lengths 39 and differences 57; with a block's sums, and lines that runs have in part, 12 an element
// in 55 x 55 planes of 64 channels, in float32 14 of 38: bytes bind, on an H200 too (13 and 27). The first version, of
// which a thread had one pixel, read single elements, twice, and issued 57 and 47; now it is for images that are no
// whole lines and for more than 512 channels. Predicted, not measured: a copy's speed, where a tile of 32 KB is 1.4 us
// of a multiprocessor's share of 3.0 TB/s, and five blocks of 128 threads are resident.
#include "cuda/common/lpips_planes.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

template <class A>
__device__ __forceinline__ void store_warp_sum(A sum, int lane, A* to) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, step);
  }
  if (lane == 0) {
    *to = sum;
  }
}

template <class T, int V, bool Last>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_fwd(LpipsTensors<T, V, Last> tensors, Divider units, float* __restrict__ map, float* __restrict__ partial) {
  ALEXNET_FAST_SHARED(float[2][kUnit], squares);
  ALEXNET_FAST_SHARED(float[2][kUnit], scales);
  ALEXNET_FAST_SHARED(float[1][kUnit], distance);
  for (int64_t item = blockIdx.x; item < tensors.pairs * tensors.units; item += gridDim.x) {
    int64_t unit;
    const int64_t pair = units.divide(item, unit);
    const LpipsUnit<T, V, Last> here = tensors.at(pair, unit);
    here.measure(squares, scales);
    here.add_up(distance, [&](float a, float b, float weight, int pixel, float (&terms)[1]) {
      const float difference = a * scales[0][pixel] - b * scales[1][pixel];
      terms[0] = weight * difference * difference;
    });
    if (map != nullptr) {
      if (static_cast<int>(threadIdx.x) < here.count) {
        map[pair * tensors.pixels + unit * kUnit + threadIdx.x] = distance[0][threadIdx.x];
      }
    } else if (threadIdx.x < 32) {
      store_warp_sum(distance[0][threadIdx.x] + distance[0][threadIdx.x + 32], threadIdx.x, partial + item);
    }
    __syncthreads();
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_fwd_planes(LpipsTiles<T> tiles, float* __restrict__ map, float* __restrict__ partial) {
  constexpr int V = kVector<T>;
  ALEXNET_FAST_SHARED(float[2][LpipsTiles<T>::kRoom], scales);
  ALEXNET_FAST_SHARED(float[LpipsTiles<T>::kRoom], distance);
  const LpipsTile<T> tile(tiles);
  tile.clear_before(scales[0], scales[1]);
  tile.fetch();
  tile.measure([&](int32_t place, const float (&square)[2]) {
    scales[0][place] = inverse_length(square[0]);
    scales[1][place] = inverse_length(square[1]);
  });
  float s[V], t[V], total[1][V] = {};
  tile.read(scales[0], s);
  tile.read(scales[1], t);
  tile.for_each([&](const T* a, const T* b, int32_t channel) {
    float x[V], y[V];
    unpack(load<V>(a), x);
    unpack(load<V>(b), y);
    const float weight = tiles.weight[channel];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float difference = fmaf(x[v], s[v], -y[v] * t[v]);
      total[0][v] += weight * difference * difference;
    }
  });
  tile.add_up(total, [&](int32_t place, const float (&sum)[1]) { distance[place] = sum[0]; });
  if (map != nullptr) {
    for (int32_t pixel = tile.thread; pixel < tile.count; pixel += tile.threads) {
      map[tile.pair * tiles.pixels + tile.first + pixel] = distance[V + pixel];
    }
  } else if (tile.thread < 32) {
    float sum = 0;
    for (int32_t pixel = tile.thread; pixel < tile.count; pixel += 32) {
      sum += distance[V + pixel];
    }
    store_warp_sum(sum, tile.thread, partial + blockIdx.x);
  }
}

// A warp adds up the units of a pair.
template <class A>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_average(const A* __restrict__ partial, int64_t pairs, int64_t units, A pixels, A* __restrict__ y) {
  for (int64_t pair = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; pair < pairs;
       pair += int64_t{gridDim.x} * blockDim.y) {
    A sum = 0;
    for (int64_t unit = threadIdx.x; unit < units; unit += 32) {
      sum += partial[pair * units + unit];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, step);
    }
    if (threadIdx.x == 0) {
      y[pair] = sum / pixels;
    }
  }
}

}  // namespace

int64_t lpips_layer_fwd_partial_units(const LpipsParams& p) {
  int64_t units = 0;
  with_lpips_kernel(
      p, [&](const auto& tiles) { return units = tiles.units.divisor, cudaSuccess; },
      [&](auto, auto, auto) { return units = lpips_units(p), cudaSuccess; });
  return units;
}

int lpips_layer_fwd(const LpipsParams& p, void* stream) {
  if (p.pairs * p.channels * p.pixels == 0) {
    return cudaSuccess;
  }
  const int64_t units = lpips_layer_fwd_partial_units(p);
  float* const y = static_cast<float*>(p.y);
  float* const map = p.spatial ? y : nullptr;
  float* const partial = static_cast<float*>(p.partial);
  const int error = with_lpips_kernel(
      p,
      [&](const auto& tiles) {
        using T = typename std::decay_t<decltype(tiles)>::Element;
        return launch<lpips_fwd_planes<T>>(tiles.grid(), tiles.block(), tiles.bytes(), stream, tiles, map, partial);
      },
      [&](auto type, auto vector, auto last) {
        using T = decltype(type);
        const LpipsTensors<T, vector.value, last.value> tensors(p);
        return launch<lpips_fwd<T, vector.value, last.value>>(tensors.grid(), dim3(kThreads), 0, stream, tensors,
                                                              Divider(units), map, partial);
      });
  if (error != cudaSuccess || p.spatial) {
    return error;
  }
  constexpr int kWarps = kThreads / 32;
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(ceil_div<int64_t>(p.pairs, kWarps), INT32_MAX)));
  return launch<lpips_average<float>>(grid, dim3(32, kWarps), 0, stream, static_cast<const float*>(partial), p.pairs,
                                      units, static_cast<float>(p.pixels), y);
}

}  // namespace alexnet_fast::cuda
