// Max-pooling, backward. Every input gathers dy of the windows that hold it and whose code names it: no atomics, and
// each element is written once. epilogue_bwd.cu uses these kernels too, where a stage pools and has no LRN: kClosed
// names nobody, so the gather is masked as the ReLU was; and dx can be summed for the bias on the way.
//
// Windows of 3 with stride 2 in NHWC: a thread owns 16 bytes of channels of a patch of 2 x 2 input pixels. Four windows
// reach into it, and name one of their own nine places: 9 comparisons for 4 inputs. NCHW, where windows lie within the
// image: the same patches of planes in shared memory (common/planes.cuh), where stores of every other pixel cost
// nothing; a thread goes down 7 of a column. Elsewhere a thread owns a strip of one column of input pixels, 4 of them,
// and goes through the 3 x 2 windows that reach into it: neighbours in memory are stored by neighbouring threads. Other
// windows take the gather of common/pool.cuh, pixel by pixel.
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
// Patches: 455 in the loop for 32 inputs, 14 each, with sums 489: 12 conversions and extractions and 18 comparisons and
// additions a channel are 7.5 of them, the rest addresses and stores. 62 registers and half of the warps; with sums 77
// and 38%. Bytes bind. Predicted, not measured: 2.6 TB/s of 55 x 55 pixels, 2.4 with sums.
//
// NCHW: the first version had strips there too, 3 loads and a store an input, each an instruction of its own: 81 an
// input of bfloat16. Measured were 1,339 GB/s of 55 x 55 pixels in float32, and 132 us in bfloat16, where 67 MB take 22
// (batch 128, cold, same card and day). Now the loop has 58 for 4 inputs, a strip of 28 inputs 71 more, and a thread
// 340 for its copies and places, all branches counted: 27 an input of 16 bits at 55 x 55, in blocks of two planes, of
// the 26 that 3.0 TB/s leave, and 32 of 52 in float32. So in float32 bytes bind, and in 16 bits instructions do, by
// little; with sums for the bias more: 32. 44 registers, and 8 blocks or more with up to 17 KB each of shared memory.
// Predicted, not measured: 2.5 TB/s in float32, 2.0 in 16 bits, 1.7 with sums.
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
    int64_t column, row;
    const int64_t image = p.strips.divide(p.columns.divide(unit, column), row);
    float sums[S][S][V] = {};
    gather_patch(p.gradient, image * shape.out.image + channel, static_cast<int32_t>(row), static_cast<int32_t>(column),
                 channels, sums);
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

// Patches in NCHW, with the block's planes in shared memory, where windows are 3 x 3 with stride 2 and within the
// image.
struct PatchPlanes {
  PlaneBands lie;         // over rows of patches
  StripsInPlanes strips;  // of patches
  Divider channels;
  int32_t code_at, dx_at, sums_at, bytes;  // in the block's shared memory

  PatchPlanes(const PoolParams& p, int64_t element, bool summing)
      : lie(p.batch * p.channels, ceil_div<int64_t>(p.height, 2),
            [&](int64_t planes, int64_t rows) {
              return dy_bytes(p, element, planes, rows) + dy_bytes(p, 1, planes, rows) +
                     dx_bytes(p, element, planes, rows) + (summing ? sums_bytes(p, planes, rows) : 0);
            }),
        strips(lie, ceil_div<int64_t>(p.width, 2)),
        channels(p.channels) {
    code_at = static_cast<int32_t>(dy_bytes(p, element, lie.whole, lie.rows));
    dx_at = code_at + static_cast<int32_t>(dy_bytes(p, 1, lie.whole, lie.rows));
    sums_at = dx_at + static_cast<int32_t>(dx_bytes(p, element, lie.whole, lie.rows));
    bytes = sums_at + (summing ? static_cast<int32_t>(sums_bytes(p, lie.whole, lie.rows)) : 0);
  }

  static int64_t dy_bytes(const PoolParams& p, int64_t element, int64_t planes, int64_t rows) {
    return run_bytes(((planes - 1) * p.out_height + std::min(rows + 1, p.out_height)) * p.out_width, element);
  }
  static int64_t dx_bytes(const PoolParams& p, int64_t element, int64_t planes, int64_t rows) {
    return run_bytes(((planes - 1) * p.height + std::min(2 * rows, p.height)) * p.width, element);
  }
  static int64_t sums_bytes(const PoolParams& p, int64_t planes, int64_t rows) {
    return planes * ceil_div<int64_t>(rows, StripsInPlanes::kRows) * ceil_div<int64_t>(p.width, 2) * sizeof(float);
  }

  // Whether the kernel takes what `p` asks for, and rows of `partial` then: one for each band of an image.
  bool take(const PoolParams& p) const {
    return !p.channels_last && overlapping_3_by_2(p.window) && windows_inside(p) && p.height * p.width <= INT32_MAX &&
           lie.fit();
  }
  int64_t partial_rows(const PoolParams& p) const { return p.batch * lie.bands.divisor; }
};

// A thread goes down a column of patches. gather_patch has the arithmetic; here the windows above are kept from the
// patch above.
template <class T, bool kSumming>
__global__ void __launch_bounds__(kPlaneThreads, 8) pool_bwd_planes(PoolBackward<T> p, PatchPlanes planes) {
  constexpr int K = 3, S = 2;
  unsigned char* const room = dynamic_shared();
  const PoolShape& shape = p.gradient.shape;
  const PlaneBand band(planes.lie);
  const int32_t width = shape.width, out_width = shape.out_width;
  const int32_t plane = shape.height * width, out_plane = shape.out_height * out_width;
  // Rows of windows: those that begin in the band's patches, and one above.
  const int32_t out_begin = max(band.begin - 1, 0), out_end = min(band.end, shape.out_height);
  const int32_t in_rows = min(band.end * S, shape.height) - band.begin * S;
  const int64_t out = band.first * out_plane + out_begin * out_width;
  const int32_t outputs = (band.number - 1) * out_plane + (out_end - out_begin) * out_width;
  const T* const dy = fetch_run(room, p.gradient.dy + out, outputs);
  const uint8_t* const code = fetch_run(room + planes.code_at, p.gradient.code + out, outputs);
  T* const to = p.dx + band.first * plane + band.begin * S * width;
  T* const dx = place_run(room + planes.dx_at, to);
  float* const sums = reinterpret_cast<float*>(room + planes.sums_at);  // of each strip
  await_runs();

#pragma unroll 1
  for (StripInPlanes strip(planes.strips, band, band.number); strip.there(); strip.next()) {
    const bool left = strip.column > 0, right = strip.column < out_width;  // whether there are such windows
    const bool wide = strip.column * S + 1 < width;                        // or the patch ends with the row
    struct Windows {
      float own, left;  // dy of the one that begins in the patch, and of the one on its left
      int32_t own_code, left_code;
    };
    const auto windows = [&](int32_t from, bool there) {
      Windows w{0, 0, kClosed, kClosed};  // which names no pixel
      if (there && right) {
        w.own = to_float(dy[from]);
        w.own_code = code[from];
      }
      if (there && left) {
        w.left = to_float(dy[from - 1]);
        w.left_code = code[from - 1];
      }
      return w;
    };
    const int32_t first = band.begin + strip.row;
    int32_t from = strip.plane * out_plane + (first - out_begin) * out_width + strip.column;
    int32_t in = strip.plane * plane + strip.row * S * width + strip.column * S;
    float total = 0;
    Windows above = windows(from - out_width, first > 0);
#pragma unroll 1
    for (int32_t row = first; row < first + strip.rows; ++row) {
      const Windows here = windows(from, row < shape.out_height);
      float sums_of[S][S] = {};
#pragma unroll
      for (int h = 0; h < S; ++h) {
#pragma unroll
        for (int w = 0; w < S; ++w) {
          float& sum = sums_of[h][w];
          const auto take = [&](float value, int32_t code, int32_t place) {
            if (code == place) {
              sum += value;
            }
          };
          take(here.own, here.own_code, K * h + w);
          if (w == 0) {
            take(here.left, here.left_code, K * h + S);
          }
          if (h == 0) {
            take(above.own, above.own_code, K * S + w);
          }
          if (h == 0 && w == 0) {
            take(above.left, above.left_code, K * S + S);
          }
        }
      }
      const bool tall = row * S + 1 < shape.height;
#pragma unroll
      for (int h = 0; h < S; ++h) {
#pragma unroll
        for (int w = 0; w < S; ++w) {
          total += sums_of[h][w];  // 0 where there is no such pixel: no window has it
          if ((h == 0 || tall) && (w == 0 || wide)) {
            from_float(sums_of[h][w], dx[in + h * width + w]);
          }
        }
      }
      above = here;
      from += out_width;
      in += S * width;
    }
    if (kSumming) {
      sums[strip.unit] = total;
    }
  }
  __syncthreads();
  put_run(dx, to, (band.number - 1) * plane + in_rows * width);
  if constexpr (kSumming) {  // a warp adds up a plane's strips
    const int32_t strips = static_cast<int32_t>(planes.strips.in_column.divisor * planes.strips.columns.divisor);
#pragma unroll 1
    for (int32_t number = threadIdx.x / 32; number < band.number; number += kPlaneThreads / 32) {
      float total = 0;
#pragma unroll 1
      for (int32_t i = threadIdx.x % 32; i < strips; i += 32) {
        total += sums[number * strips + i];
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

// Units in a column and in a row of input pixels: patches, strips or, for windows that are not unrolled, pixels.
struct PoolUnits {
  int64_t in_column, in_row;

  PoolUnits(const PoolParams& p, int V) : in_column(p.height), in_row(p.width) {
    if (overlapping_3_by_2(p.window)) {
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
    if (const PatchPlanes planes(p, sizeof(T), partial != nullptr); planes.take(p)) {
      constexpr auto summing = launch<pool_bwd_planes<T, true>, PoolBackward<T>, PatchPlanes>;
      constexpr auto plain = launch<pool_bwd_planes<T, false>, PoolBackward<T>, PatchPlanes>;
      return (partial != nullptr ? summing : plain)(planes.lie.grid(), dim3(kPlaneThreads), planes.bytes, stream,
                                                    PoolBackward<T>{gradient, dx, partial, {}, {}}, planes);
    }
  }
  if (overlapping_3_by_2(p.window)) {
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
  if (const PatchPlanes planes(p, p.dtype == DType::f32 ? 4 : 2, true); planes.take(p)) {
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
