// Max-pooling, backward. Every input gathers dy of the windows that hold it and whose code names it: no atomics, and
// each element is written once. epilogue_bwd.cu uses these kernels too, where a stage pools and has no LRN: kClosed
// names nobody, so the gather is masked as the ReLU was; and dx can be summed for the bias on the way.
//
// A thread owns V channels of a strip: one column of input pixels, kSteps strides long. It goes through the windows
// that reach into the strip, two columns of them where K = 3 and S = 2, and gives each dy to the up to three rows of
// its pixels that the window covers: dy and codes are read once for all of them, and addresses computed once. Windows
// that are not unrolled take the gather of common/pool.cuh, pixel by pixel.
//
// Bytes, windows of 3 with stride 2, an input in bfloat16: dx (2), and a quarter of dy (2) and of a code (1): 2.75, for
// which 132 multiprocessors at 1.7 GHz have 18 instructions a lane at 4.3 TB/s. A strip of 4 inputs reads 3 x 2
// windows: 12 conversions and extractions, 20 comparisons and additions of 2 instructions each. sm_90's loop has 658
// for the 32 inputs of 8 channels, 21 each with addresses and stores: bound by instructions. NCHW: 3 loads and a store
// an input, each an instruction of its own, and addresses for one channel: more. Predictions, not measurements: 75% of
// copy bandwidth in NHWC, 60% in NCHW for 16-bit elements and 90% for float32.
//
// Considered: a thread for S x S inputs, which shares each dy among all of them (9 comparisons for 4 inputs, not 20
// with half of them idle), but stores every other pixel of a row: in NCHW half a sector at a time, which L2 has to
// merge.
#include "cuda/common/pool_bwd.cuh"
#include "cuda/common/sums.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

template <class T>
struct PoolBackward {
  PooledGradient<T> gradient;
  T* dx;
  float* partial;  // (blocks along units, channels): sums of dx for a bias, or null
  Divider strips;  // in a column of input pixels
};

// K x K windows with stride S.
template <class T, int V, int K, int S, int kSteps>
__global__ void __launch_bounds__(kThreads, 1) pool_bwd_strips(PoolBackward<T> p, Units units, int32_t channels) {
  constexpr int kReach = (K + S - 1) / S;  // windows over a pixel, in either direction
  const PoolShape& shape = p.gradient.shape;
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < channels;
  const int64_t line = shape.out_width * shape.out.pixel;
  float total[V] = {};
  for (int64_t unit = wanted ? units.first() : units.count; unit < units.count; unit += units.stride()) {
    int64_t w, strip;
    const int64_t image = p.strips.divide(p.gradient.in_width.divide(unit, w), strip);
    const int64_t out = image * shape.out.image + channel * shape.out.channel;
    // The strip's first window row, and the last column of windows over w, counted with the padding.
    const int32_t first = static_cast<int32_t>(strip) * kSteps;
    const int32_t place = static_cast<int32_t>(w) + shape.window.pad_w;
    const int32_t last = place / S, in_window = place % S;

    // Windows that are not there are read as the nearest one that is, and compared with codes that nobody has: no load
    // waits behind a branch.
    constexpr int32_t kNobody = 1 << 10;
    int64_t from[kReach];
    int32_t from_left[kReach];  // where in the window the pixel's column is
#pragma unroll
    for (int j = 0; j < kReach; ++j) {
      const int32_t column = min(max(last - j, 0), shape.out_width - 1);
      from[j] = out + column * shape.out.pixel;
      from_left[j] = column == last - j && in_window + j * S < K ? in_window + j * S : kNobody;
    }
    float sums[kSteps * S][V] = {};
#pragma unroll
    for (int i = 1 - kReach; i < kSteps; ++i) {
      const int32_t row = min(max(first + i, 0), shape.out_height - 1);
      const int32_t nobody = row == first + i ? 0 : kNobody;
#pragma unroll
      for (int j = 0; j < kReach; ++j) {
        const Pack<uint8_t, V> codes = load<V>(p.gradient.code + from[j] + row * line);
        const Pack<T, V> dy = load<V>(p.gradient.dy + from[j] + row * line);
        int32_t own[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
          own[k] = K * k + from_left[j] + nobody;
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int32_t code = byte_of(codes, v);
          const float value = element(dy, v);
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const int pixel = i * S + k;  // of the strip
            if (pixel >= 0 && pixel < kSteps * S && code == own[k]) {
              sums[pixel][v] += value;
            }
          }
        }
      }
    }
    const int64_t in = image * shape.in.image + channel * shape.in.channel;
#pragma unroll
    for (int i = 0; i < kSteps * S; ++i) {
      const int32_t h = first * S + i - shape.window.pad_h;
      if (h >= 0 && h < shape.height) {
        store(p.dx + in + (int64_t{h} * shape.width + w) * shape.in.pixel, pack<T>(sums[i]));
        if (p.partial != nullptr) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            total[v] += sums[i][v];
          }
        }
      }
    }
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

// Any window; a unit is an input pixel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 1) pool_bwd_any(PoolBackward<T> p, Units units, int32_t channels) {
  const PoolShape& shape = p.gradient.shape;
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < channels;
  float total[V] = {};
  for (int64_t unit = wanted ? units.first() : units.count; unit < units.count; unit += units.stride()) {
    int64_t pixel;
    const int64_t image = p.strips.divide(unit, pixel);
    float sum[V];
    p.gradient.at(p.gradient.place(unit), 0, channel, sum);
    store(p.dx + image * shape.in.image + channel * shape.in.channel + pixel * shape.in.pixel, pack<T>(sum));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      total[v] += sum[v];
    }
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

// ---------------------------------------------------------------- launch

constexpr int kPoolSteps = 2;

// Units in a column of input pixels: strips or, for windows that are not unrolled, pixels.
int64_t units_in_column(const PoolParams& p) {
  return overlapping_3_by_2(p.window) ? ceil_div<int64_t>(p.height + p.window.pad_h, kPoolSteps * p.window.stride_h)
                                      : p.height;
}

UnitGrid pool_bwd_grid(const PoolParams& p, int V, int64_t items) {
  return UnitGrid(p.batch * units_in_column(p) * p.width, p.channels / V, p.channels_last, items);
}

template <class T>
int pool_bwd_vector(const PoolParams& p) {
  const bool vectors =
      p.channels_last && p.channels % kVector<T> == 0 && aligned_16(p.dy) && aligned_16(p.dx) && aligned_16(p.code);
  return vectors ? kVector<T> : 1;
}

template <class T, int V>
int launch_pool_bwd(const PoolParams& p, float* partial, void* stream) {
  const PooledGradient<T> gradient(p.dy, p.code, PoolShape(p));
  const UnitGrid grid = pool_bwd_grid(p, V, partial == nullptr ? INT32_MAX : kSumItems);
  const int32_t channels = static_cast<int32_t>(p.channels);
  T* dx = static_cast<T*>(p.dx);
  if (overlapping_3_by_2(p.window)) {
    const PoolBackward<T> backward{gradient, dx, partial, Divider(units_in_column(p))};
    return launch<pool_bwd_strips<T, V, 3, 2, kPoolSteps>>(grid.grid, grid.block, 0, stream, backward, grid.units,
                                                           channels);
  }
  const PoolBackward<T> backward{gradient, dx, partial, Divider(p.height * p.width)};
  return launch<pool_bwd_any<T, V>>(grid.grid, grid.block, 0, stream, backward, grid.units, channels);
}

}  // namespace

// ---------------------------------------------------------------- launchers

int64_t pool_bwd_rows(const PoolParams& p) {
  const int V = p.dtype == DType::f32 ? pool_bwd_vector<float>(p) : pool_bwd_vector<bf16>(p);
  return pool_bwd_grid(p, V, kSumItems).grid.x;
}

int pool_bwd(const PoolParams& p, float* partial, void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return pool_bwd_vector<T>(p) > 1 ? launch_pool_bwd<T, kVector<T>>(p, partial, stream)
                                     : launch_pool_bwd<T, 1>(p, partial, stream);
  });
}

int max_pool_bwd(const PoolParams& p, void* stream) {
  return p.batch * p.channels * p.height * p.width == 0 ? cudaSuccess : pool_bwd(p, nullptr, stream);
}

}  // namespace alexnet_fast::cuda
