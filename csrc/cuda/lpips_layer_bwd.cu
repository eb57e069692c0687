// Backward of lpips_layer_fwd.cu: the gradient of both images' features, and of the weight.
//
// Lengths are measured again, then h . a and h . b summed, then gradients written: x is read three times, the second
// and third time from L1 or L2, and dx written once. Only where the weight's gradient is wanted, so where LPIPS itself
// is trained, a second kernel reads x once more: there a thread stays with its channels, and sums over pixels in a
// fixed order.
//
// In bfloat16 NHWC sm_90's three loops issue 26 an element of the 38 that 3.0 TB/s leave for 4 bytes. Not measured.
//
// NCHW: lines in shared memory (common/lpips_planes.cuh), where all three passes read them; x comes from memory once,
// and the weight's gradient is summed on the third. Of dx whole lines are written by 16 bytes; what lines of a run's
// two ends are to be goes to shared memory first, and a row's threads share its single elements at the end. In 55 x 55
// planes of 64 channels a thread has 8 lines of each image, 121 elements of the run's. For 8 pixels of both images the
// copy issues 18, then 39, 65 and 109 (with the weight's gradient 135), and the ends 17; once a thread 731 (872) are
// issued, all branches counted, about 150 of them for each of the two block's sums: in all 22 an element, and 25 with
// the weight's gradient, of the 27 that 4.3 TB/s leave for 4 bytes; in float32 28 and 33 of 53. Bytes bind, on an H200
// too. 28 and 31 it was when every warp had all single stores of a line in its loop (165 instructions, and 192) and
// when sums of the places before a run, which are no pixels, made a warp of each block go through 400 more. The first
// version, of single elements, issued 123 and 105, and read x again for the weight's gradient. Predicted, not measured:
// a copy's speed.
#include "cuda/common/lpips_planes.cuh"
#include "cuda/common/math.cuh"
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

// 2 g s^2 / |a| times `along`, the sum of h a. What is subtracted from h s nearly cancels it, so roundings of its own
// would show.
__device__ __forceinline__ float radial(float g, float along, float scale, float square) {
  const double wide = 2.0 * g * along * scale * scale;
  return square == 0 ? 0.0f : static_cast<float>(wide * reciprocal_root(square));
}

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
    if (threadIdx.x < 2 * kUnit) {
      const int k = threadIdx.x / kUnit, pixel = threadIdx.x % kUnit;
      const float g = pixel < here.count ? gradient.at(pair, unit * kUnit + pixel, tensors.pixels) : 0.0f;
      const float scale = scales[k][pixel];
      along[k][pixel] = radial(g, along[k][pixel], scale, squares[k][pixel]);
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

// With kWeight a row of partial sums for each block, as lpips_weight's.
template <class T, bool kWeight>
__global__ void __launch_bounds__(kThreads, 1)
    lpips_bwd_planes(LpipsTiles<T> tiles, LpipsGradient gradient, T* __restrict__ dx, float* __restrict__ rows) {
  constexpr int V = kVector<T>, kRoom = LpipsTiles<T>::kRoom;
  ALEXNET_FAST_SHARED(float[2][kRoom], squares);
  ALEXNET_FAST_SHARED(float[2][kRoom], scales);
  ALEXNET_FAST_SHARED(float[2][kRoom], along);
  ALEXNET_FAST_SHARED(float[kRoom], dy);
  const LpipsTile<T> tile(tiles);
  tile.clear_before(scales[0], scales[1], along[0], along[1], dy);
  tile.fetch();
  tile.measure([&](int32_t place, const float (&square)[2]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      squares[k][place] = square[k];
      scales[k][place] = inverse_length(square[k]);
    }
  });
  float s[V], t[V];
  tile.read(scales[0], s);
  tile.read(scales[1], t);
  float total[2][V] = {};
  tile.for_each([&](const T* a, const T* b, int32_t channel) {
    float x[V], y[V];
    unpack(load<V>(a), x);
    unpack(load<V>(b), y);
    const float weight = tiles.weight[channel];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float h = weight * fmaf(x[v], s[v], -y[v] * t[v]);
      total[0][v] += h * x[v];
      total[1][v] += h * y[v];
    }
  });
  tile.add_up(total, [&](int32_t place, const float (&sum)[2]) {
    const int32_t pixel = place - V;
    const float g = pixel < tile.count ? gradient.at(tile.pair, tile.first + pixel, tiles.pixels) : 0.0f;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      along[k][place] = radial(g, sum[k], scales[k][place], squares[k][place]);
    }
    dy[place] = g;
  });
  float g[V], along_a[V], along_b[V];
  tile.read(dy, g);
  tile.read(along[0], along_a);
  tile.read(along[1], along_b);
  const bool whole = tile.whole();
  uint32_t there = 0;  // a bit for each element of a line that is the run's
#pragma unroll
  for (int v = 0; v < V; ++v) {
    there |= static_cast<uint32_t>(tile.has(v)) << v;
  }
  there = anew(there);  // a compiler that sees where it comes from compares anew in every turn, 16 instructions for 8
  T* da = dx + (tile.line - tiles.x);
  T* db = da + tiles.second;
  float* own_sum = tile.sums() + tile.thread;
  tile.for_each([&](T* a, T* b, int32_t channel) {
    float x[V], y[V], sum = 0;
    unpack(load<V>(a), x);
    unpack(load<V>(b), y);
    const float weight = tiles.weight[channel];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float difference = fmaf(x[v], s[v], -y[v] * t[v]);
      const float h = 2 * g[v] * weight * difference;
      if (kWeight && (there >> v & 1) != 0) {
        sum += g[v] * difference * difference;
      }
      x[v] = fmaf(h, s[v], -x[v] * along_a[v]);
      y[v] = fmaf(y[v], along_b[v], -h * t[v]);
    }
    const Pack<T, V> own_a = pack<T>(x), own_b = pack<T>(y);
    if (whole) {
      store(da, own_a);
      store(db, own_b);
    } else {  // where nobody reads this line again
      store_shared_16(a, own_a);
      store_shared_16(b, own_b);
    }
    da += int64_t{tiles.rows} * tiles.pixels;
    db += int64_t{tiles.rows} * tiles.pixels;
    if constexpr (kWeight) {
      *own_sum = sum;
      own_sum += tile.threads;
    }
  });
  tile.put_ends(dx);
  if constexpr (kWeight) {
    for (int32_t channel = tile.thread; channel < tiles.channels; channel += tile.threads) {
      const float* const sums = tile.sums() + channel * tiles.lines;  // a channel's lines, side by side
      float sum = 0;
      for (int32_t line = 0; line < tiles.lines; ++line) {
        sum += sums[line];
      }
      rows[int64_t{blockIdx.x} * tiles.channels + channel] = sum;
    }
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
  with_lpips_kernel(
      p, [&](const auto& tiles) { return rows = tiles.blocks(), cudaSuccess; },
      [&](auto, auto vector, auto) {
        // After the sums, the 2 pairs P scales that the first kernel leaves to the second.
        rows = weight_grid(p, vector.value).grid.x + ceil_div<int64_t>(2 * p.pairs * p.pixels, p.channels);
        return cudaSuccess;
      });
  return rows;
}

int lpips_layer_bwd(const LpipsParams& p, void* stream) {
  if (p.pairs * p.channels * p.pixels == 0) {
    return cudaSuccess;
  }
  const LpipsGradient gradient{static_cast<const float*>(p.dy), p.spatial};
  float* const rows = static_cast<float*>(p.partial);
  int64_t count = 0;
  const int error = with_lpips_kernel(
      p,
      [&](const auto& tiles) {
        using T = typename std::decay_t<decltype(tiles)>::Element;
        const auto go = [&](auto weight) {
          return launch<lpips_bwd_planes<T, weight.value>>(tiles.grid(), tiles.block(), tiles.bytes(), stream, tiles,
                                                           gradient, static_cast<T*>(p.dx), rows);
        };
        count = tiles.blocks();
        return rows == nullptr ? go(std::false_type{}) : go(std::true_type{});
      },
      [&](auto type, auto vector, auto last) {
        using T = decltype(type);
        constexpr int V = vector.value;
        const LpipsTensors<T, V, last.value> tensors(p);
        const UnitGrid weights = weight_grid(p, V);
        count = weights.grid.x;
        float* const kept = rows == nullptr ? nullptr : rows + count * p.channels;
        const int error =
            launch<lpips_bwd<T, V, last.value>>(tensors.grid(), dim3(kThreads), 0, stream, tensors,
                                                Divider(tensors.units), gradient, static_cast<T*>(p.dx), kept);
        return error != cudaSuccess || rows == nullptr
                   ? error
                   : launch<lpips_weight<T, V, last.value>>(weights.grid, weights.block, 0, stream, tensors,
                                                            weights.units, Divider(p.pixels), gradient,
                                                            static_cast<const float*>(kept), rows);
      });
  return error != cudaSuccess || rows == nullptr ? error
                                                 : launch_add_rows<float>(rows, count, p.channels, p.dweight, stream);
}

}  // namespace alexnet_fast::cuda
