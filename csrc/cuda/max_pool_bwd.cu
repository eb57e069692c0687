// Max-pooling, backward. Every input gathers dy of the windows that hold it and whose code names it: no atomics, and
// each element is written once. epilogue_bwd.cu uses these kernels too, where a stage pools and has no LRN: kClosed
// names nobody, so the gather is masked as the ReLU was; and dx can be summed for the bias on the way.
//
// Windows of 3 with stride 2 in NHWC: a thread owns 16 bytes of channels of a patch of 2 x 2 input pixels. Four windows
// reach into it, and name one of their own nine places: 9 comparisons for 4 inputs. NCHW, where windows lie within the
// image: planes in shared memory (common/planes.cuh), and there windows scatter, to floats, which are rounded as they
// are copied out. Elsewhere a thread owns a strip of one column of input pixels, 4 of them, and goes through the 3 x 2
// windows that reach into it: neighbours in memory are stored by neighbouring threads. Other windows take the gather of
// common/pool.cuh, pixel by pixel.
//
// Bytes, an input of 16 bits: dx (2), and a quarter of dy (2) and of a code (1): 2.75, for which 132 multiprocessors at
// 1.7 GHz have 26 instructions a lane at 3.0 TB/s, and 18 at 4.3.
//
// The first version had strips in NHWC as well, which compare 20 times for 4 inputs, half of them in vain: 658
// instructions in sm_90's loop for 32 inputs, 21 each, 80 registers. Measured were 2,311 GB/s of 55 x 55 pixels, 2,032
// of 27 x 27 and 1,766 of 13 x 13, through the ReLU's mask with sums for the bias 1,912, 1,716 and 1,120, where a copy
// of the largest has 2,844 (bfloat16, batch 128, one H100 80GB HBM3, 2026-11-27): DRAM 50%, issue 59%, 33% of the
// warps.
//
// Patches: 344 in the loop for 32 inputs, 11 each, with sums 379, 12: of these 1.1 are comparisons, of two channels'
// codes at once (add_where_equal), 2.3 selections and additions, 1.5 conversions and extractions, the rest addresses
// and stores. Channel by compared channel it was 14 and 15. 64 registers and half of the warps; with sums 72 and 38%.
// float32: 226 for 16 inputs, 14, with sums 244. Bytes bind. Predicted, not measured: 2.6 TB/s of 55 x 55 pixels, 2.4
// with sums.
//
// NCHW: the first version had strips there too, 3 loads and a store an input, each an instruction of its own: 81 an
// input of bfloat16. Measured were 1,339 GB/s of 55 x 55 pixels in float32, and 132 us in bfloat16, where 67 MB take 22
// (batch 128, cold, same card and day). The second gathered patches in shared memory: 58 in the loop for 4 inputs, 27
// an input of 16 bits in all, 32 with sums for the bias, and 32 and 37 in float32. (Two patches side by side, which
// share a window, had 103 for 8 inputs in the loop: no gain worth its registers.) Now a window of 16 bits takes 20
// instructions for 4 inputs, 25 with sums: it reads its dy and code, and adds to one of its nine places, and nothing is
// compared. In blocks of two planes of 55 x 55 one warp of the four does that, 27 windows after each other; the sums
// are cleared in 59, copied out and rounded in 89, and a thread has some 330 for its copies and places: 16 an input, 17
// with sums, in float32 17 and 18. 3.0 TB/s leave 26 for 2.75 bytes and 50 for 5.25, 4.3 TB/s leave 18.4 and 35: bytes
// bind. Windows of a warp are 4 words apart, so banks conflict threefold, fourfold at most: 4 accesses of shared memory
// an input, at most 5, of the 6.6 and 4.6 that the cycles leave. 40 registers, and up to 32 KB of shared memory: six or
// seven blocks of 128 threads, 44% of the warps. Predicted, not measured: 2.5 TB/s in float32, 2.4 in 16 bits.
#include "cuda/common/planes.cuh"
#include "cuda/common/pool_bwd.cuh"
#include "cuda/common/sums.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

template <class T>
struct PoolBackward {
  PooledGradient<T> gradient;
  T* dx;
  float* partial;           // (blocks along units, channels): sums of dx for a bias, or null
  Divider columns, strips;  // units in a row, and in a column, of input pixels
};

// 3 x 3 windows with stride 2 in NHWC; a unit is a patch of 2 x 2 input pixels.
template <class T, int V, bool kSumming>
__global__ void __launch_bounds__(kThreads, kSumming ? 3 : 4)
    pool_bwd_patches(PoolBackward<T> p, Units units, int32_t channels) {
  constexpr int S = 2;
  const PoolShape& shape = p.gradient.shape;
  const int32_t channel = units.vector() * V;
  const bool wanted = channel < channels;
  float total[V] = {};
#pragma unroll 1
  for (int64_t unit = wanted ? units.first() : units.count; unit < units.count; unit += units.stride()) {
    uint32_t column, row;
    const int64_t image = p.strips.divide_small(p.columns.divide_small(static_cast<uint32_t>(unit), column), row);
    const int64_t out = image * shape.out.image;
    float sums[S][S][V];
    gather_patch(p.gradient.dy + out, p.gradient.code + out, 0, shape, row, column, channel, channels, sums);
    const int64_t in = image * shape.in.image + channel;
#pragma unroll
    for (int i = 0; i < S; ++i) {
#pragma unroll
      for (int j = 0; j < S; ++j) {
        const int32_t h = static_cast<int32_t>(row) * S + i - shape.window.pad_h;
        const int32_t w = static_cast<int32_t>(column) * S + j - shape.window.pad_w;
        if (h >= 0 && h < shape.height && w >= 0 && w < shape.width) {
          store(p.dx + in + (int64_t{h} * shape.width + w) * channels, pack<T>(sums[i][j]));
          if constexpr (kSumming) {
#pragma unroll
            for (int v = 0; v < V; ++v) {
              total[v] += sums[i][j][v];
            }
          }
        }
      }
    }
  }
  if constexpr (kSumming) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, wanted);
  }
}

// K x K windows with stride S in NCHW, or where no vector fits.
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
    const int64_t image = p.strips.divide(p.columns.divide(unit, w), strip);
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

// NCHW, with the block's planes in shared memory, where windows are 3 x 3 with stride 2 and within the image.
struct WindowPlanes {
  static constexpr int64_t kTileBytes = 32 * 1024;  // two planes of 55 x 55, whose sums are float32

  PlaneBands lie;   // over pairs of rows, in each of which a row of windows begins
  Divider columns;  // every other one of windows
  Divider channels;
  int32_t code_at, dx_at, sums_at, bytes;  // in the block's shared memory

  WindowPlanes(const PoolParams& p, int64_t element, bool summing)
      : lie(
            p.batch * p.channels, ceil_div<int64_t>(p.height, 2),
            [&](int64_t planes, int64_t rows) {
              return dy_bytes(p, element, planes, rows) + dy_bytes(p, 1, planes, rows) + dx_bytes(p, planes, rows) +
                     (summing ? sums_bytes(p, planes) : 0);
            },
            kTileBytes),
        columns(ceil_div<int64_t>(p.out_width, 2)),
        channels(p.channels) {
    code_at = static_cast<int32_t>(dy_bytes(p, element, lie.whole, lie.rows));
    dx_at = code_at + static_cast<int32_t>(dy_bytes(p, 1, lie.whole, lie.rows));
    sums_at = dx_at + static_cast<int32_t>(dx_bytes(p, lie.whole, lie.rows));
    bytes = sums_at + (summing ? static_cast<int32_t>(sums_bytes(p, lie.whole)) : 0);
  }

  static int64_t dy_bytes(const PoolParams& p, int64_t element, int64_t planes, int64_t rows) {
    return run_bytes(((planes - 1) * p.out_height + std::min(rows + 1, p.out_height)) * p.out_width, element);
  }
  // A band's windows, and those of the row above it, reach over two rows before it and one behind. Up to 3 elements
  // more make the former a multiple of 16 bytes, and up to 7 are before the run.
  static int64_t dx_bytes(const PoolParams& p, int64_t planes, int64_t rows) {
    return ceil_div<int64_t>(((planes - 1) * p.height + std::min(2 * rows + 3, p.height)) * p.width + 3 + 7, 4) * 16;
  }
  static int64_t sums_bytes(const PoolParams& p, int64_t planes) { return planes * p.out_width * sizeof(float); }

  // Whether the kernel takes what `p` asks for, and rows of `partial` then: one for each band of an image.
  bool take(const PoolParams& p) const {
    return !p.channels_last && overlapping_3_by_2(p.window) && windows_inside(p) && p.height * p.width <= INT32_MAX &&
           lie.fit();
  }
  int64_t partial_rows(const PoolParams& p) const { return p.batch * lie.bands.divisor; }
};

// Windows scatter: each adds its dy to the pixel that its code names. Of every other column no two windows hold the
// same pixel, and a thread goes down a column; the columns in between follow behind a barrier. So sums have one order.
template <class T, bool kSumming>
__global__ void __launch_bounds__(kPlaneThreads, 6) pool_bwd_planes(PoolBackward<T> p, WindowPlanes planes) {
  constexpr int K = 3, S = 2, V = kVector<T>;
  unsigned char* const room = dynamic_shared();
  const PoolShape& shape = p.gradient.shape;
  const PlaneBand band(planes.lie);
  const int32_t width = shape.width, out_width = shape.out_width;
  const int32_t plane = shape.height * width, out_plane = shape.out_height * out_width;
  // Rows of windows: those that begin in the band, and one above.
  const int32_t out_begin = max(band.begin - 1, 0), out_rows = min(band.end, shape.out_height) - out_begin;
  const int32_t in_rows = min(band.end * S, shape.height) - band.begin * S;
  const int64_t out = band.first * out_plane + out_begin * out_width;
  const int32_t outputs = (band.number - 1) * out_plane + out_rows * out_width;
  const T* const dy = fetch_run<kPlaneThreads>(room, p.gradient.dy + out, outputs);
  const uint8_t* const code = fetch_run<kPlaneThreads>(room + planes.code_at, p.gradient.code + out, outputs);
  T* const to = p.dx + band.first * plane + band.begin * S * width;
  // Sums, which lie within vectors of V as dx does.
  const int32_t before = (band.begin - out_begin) * S * width;
  float* const dx = reinterpret_cast<float*>(room + planes.dx_at) + (before + 3) / 4 * 4 + lead(to);
  float* const sums = reinterpret_cast<float*>(room + planes.sums_at);  // of each column of windows
#pragma unroll 1
  for (int32_t at = planes.dx_at + 16 * threadIdx.x; at < planes.sums_at; at += 16 * kPlaneThreads) {
    store_shared_16(reinterpret_cast<float*>(room + at), Pack<float, 4>{});
  }
  await_runs();

  const uint32_t skip = anew(width - K);  // from a row of a window to the next one
#pragma unroll 1
  for (int32_t odd = 0; odd < 2; ++odd) {
#pragma unroll 1
    for (uint32_t unit = threadIdx.x; unit < static_cast<uint32_t>(band.number * planes.columns.divisor);
         unit += kPlaneThreads) {
      uint32_t pair;
      const int32_t number = planes.columns.divide_small(unit, pair), column = 2 * pair + odd;
      if (column >= out_width) {
        continue;
      }
      const uint8_t* next_code = code + number * out_plane + column;
      const T* next_dy = dy + number * out_plane + column;
      float* window = dx - before + number * plane + column * S;
      uint32_t its_place = *next_code;  // asked for while the window before is at work
      T its_dy = *next_dy;
      float total = 0;
#pragma unroll 2
      for (int32_t row = 0; row < out_rows; ++row) {
        const bool open = its_place < K * K;
        const uint32_t place = anew(min(its_place, K * K - 1u));
        const float value = open ? to_float(its_dy) : 0.0f;
        next_code += out_width;
        next_dy += out_width;
        if (row + 1 < out_rows) {
          its_place = *next_code;
          its_dy = *next_dy;
        }
        const uint32_t in_window = static_cast<uint32_t>(uint64_t{place} * 0x55555556 >> 32);  // place / K
        window[place + in_window * skip] += value;
        if (kSumming && out_begin + row >= band.begin) {
          total += value;
        }
        window += S * width;
      }
      if (kSumming) {
        sums[number * out_width + column] = total;
      }
    }
    __syncthreads();
  }
  along_run<kPlaneThreads>(
      to, (band.number - 1) * plane + in_rows * width,
      [&](int32_t i) {
        float values[V];
#pragma unroll
        for (int32_t v = 0; v < V; v += 4) {
          float (&part)[4] = reinterpret_cast<float (&)[4]>(values[v]);
          unpack(load<4>(dx + i + v), part);
        }
        store(to + i, pack<T>(values));
      },
      [&](int32_t i) { from_float(dx[i], to[i]); });
  if constexpr (kSumming) {  // a warp adds up a plane's columns
#pragma unroll 1
    for (int32_t number = threadIdx.x / 32; number < band.number; number += kPlaneThreads / 32) {
      float total = 0;
#pragma unroll 1
      for (int32_t i = threadIdx.x % 32; i < out_width; i += 32) {
        total += sums[number * out_width + i];
      }
#pragma unroll
      for (int distance = 16; distance >= 1; distance /= 2) {
        total += __shfl_xor_sync(0xffffffff, total, distance);
      }
      if (threadIdx.x % 32 == 0) {
        int64_t channel;
        const int64_t image = planes.channels.divide(band.first + number, channel);
        p.partial[(image * planes.lie.bands.divisor + band.index) * planes.channels.divisor + channel] = total;
      }
    }
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

// Whether the kernels of AlexNet's window take it: of patches numbers have 31 bits, and places in an image 32.
bool is_unrolled(const PoolParams& p, int V) {
  return overlapping_3_by_2(p.window) && (V == 1 || (p.batch * p.height * p.width <= INT32_MAX &&
                                                     p.out_height * p.out_width * p.channels <= UINT32_MAX));
}

// Units in a column and in a row of input pixels: patches, strips or, for windows that are not unrolled, pixels.
struct PoolUnits {
  int64_t in_column, in_row;

  PoolUnits(const PoolParams& p, int V) : in_column(p.height), in_row(p.width) {
    if (is_unrolled(p, V)) {
      const int64_t steps = V > 1 ? 1 : kPoolSteps;
      in_column = ceil_div<int64_t>(p.height + p.window.pad_h, steps * p.window.stride_h);
      in_row = V > 1 ? ceil_div<int64_t>(p.width + p.window.pad_w, p.window.stride_w) : p.width;
    }
  }
};

UnitGrid pool_bwd_grid(const PoolParams& p, int V, int64_t items) {
  const PoolUnits units(p, V);
  return UnitGrid(p.batch * units.in_column * units.in_row, p.channels / V, p.channels_last, items);
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
  if constexpr (V == 1) {
    if (const WindowPlanes planes(p, sizeof(T), partial != nullptr); planes.take(p)) {
      constexpr auto summing = launch<pool_bwd_planes<T, true>, PoolBackward<T>, WindowPlanes>;
      constexpr auto plain = launch<pool_bwd_planes<T, false>, PoolBackward<T>, WindowPlanes>;
      return (partial != nullptr ? summing : plain)(planes.lie.grid(), dim3(kPlaneThreads), planes.bytes, stream,
                                                    PoolBackward<T>{gradient, dx, partial, {}, {}}, planes);
    }
  }
  if (is_unrolled(p, V)) {
    const PoolUnits units(p, V);
    const PoolBackward<T> backward{gradient, dx, partial, Divider(units.in_row), Divider(units.in_column)};
    if constexpr (V > 1) {
      constexpr auto summing = launch<pool_bwd_patches<T, V, true>, PoolBackward<T>, Units, int32_t>;
      constexpr auto plain = launch<pool_bwd_patches<T, V, false>, PoolBackward<T>, Units, int32_t>;
      return (partial != nullptr ? summing : plain)(grid.grid, grid.block, 0, stream, backward, grid.units, channels);
    } else {
      return launch<pool_bwd_strips<T, V, 3, 2, kPoolSteps>>(grid.grid, grid.block, 0, stream, backward, grid.units,
                                                             channels);
    }
  }
  const PoolBackward<T> backward{gradient, dx, partial, Divider(p.width), Divider(p.height * p.width)};
  return launch<pool_bwd_any<T, V>>(grid.grid, grid.block, 0, stream, backward, grid.units, channels);
}

}  // namespace

// ---------------------------------------------------------------- launchers

int64_t pool_bwd_rows(const PoolParams& p) {
  if (const WindowPlanes planes(p, p.dtype == DType::f32 ? 4 : 2, true); planes.take(p)) {
    return planes.partial_rows(p);
  }
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
