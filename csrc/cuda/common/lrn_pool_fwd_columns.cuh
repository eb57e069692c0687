// LRN and max-pooling in one pass over NHWC where nothing is kept for backward, AlexNet's windows, for epilogue_fwd.cu;
// common/lrn_pool_fwd.cuh has training and other windows. A thread goes down a column of pixels with V channels: of
// three rows of LRN's output it keeps the maxima, in registers, and a row of these goes through shared memory, where
// every output takes three. So no row of a band is done twice, and a thread finds its place once for all of them.
//
// Maxima alone are wanted, so a row or a column in the padding is the nearest one within, which the window holds
// anyway.
#pragma once

#include "cuda/common/lrn.cuh"
#include "cuda/common/pool_fwd.cuh"
#include "cuda/common/source.cuh"

namespace alexnet_fast::cuda {

// The same place in shared memory, but the compiler does not know: its address stays in a register.
template <class P>
__device__ __forceinline__ P* anew_shared(P* at) {
#ifdef ALEXNET_FAST_HOST_SIMT
  return at;
#else
  return static_cast<P*>(__cvta_shared_to_generic(anew(static_cast<uint32_t>(__cvta_generic_to_shared(at)))));
#endif
}

// Threads of a block at most, 29 columns of 12 vectors of channels, and blocks that a multiprocessor has registers for.
constexpr int kColumnThreads = 352;
template <class T>
constexpr int kColumnBlocks = sizeof(T) == 2 ? 3 : 2;

// How blocks lie over the images: some rows and columns of outputs, and a slice of the channels.
struct LrnPoolColumns {
  int32_t rows, columns, vectors, channels;
  uint32_t line, out_line;            // bytes of a row of pixels
  Divider slices, of_band, of_image;  // blocks

  template <class Params>
  LrnPoolColumns(const Params& p, int32_t V, int64_t element, int64_t blocks)
      : line(static_cast<uint32_t>(p.width * p.channels * element)),
        out_line(static_cast<uint32_t>(p.out_width * p.channels * element)) {
    constexpr int64_t kWarp = 32, kNone = INT32_MAX;
    // More slices read more neighbours, in sectors of their own: they are to have 5% fewer warps.
    int64_t least = kNone;
    for (int64_t n = 1; n <= p.channels / V; ++n) {
      const int64_t its_vectors = ceil_div(p.channels / V, n), most = (kColumnThreads / its_vectors - 1) / 2;
      if (most > 0) {
        const int64_t its_columns = ceil_div(p.out_width, ceil_div(p.out_width, most));
        const int64_t warps =
            n * ceil_div(p.out_width, its_columns) * ceil_div(its_vectors * inputs(its_columns), kWarp);
        if (20 * warps < 19 * least) {
          least = warps;
          vectors = static_cast<int32_t>(its_vectors);
          columns = static_cast<int32_t>(its_columns);
        }
      }
    }
    channels = vectors * V;
    slices = Divider(ceil_div<int64_t>(p.channels, channels));
    of_band = Divider(slices.divisor * ceil_div<int64_t>(p.out_width, columns));
    // More bands are more blocks, and more rows that two of them do: as many as take the least time where the card has
    // 132 multiprocessors. A thread's place takes about that of two rows.
    const int64_t at_once = 132 * (blocks * kColumnThreads / kWarp / ceil_div(vectors * inputs(columns), kWarp));
    least = kNone;
    for (int64_t bands = 1; bands <= p.out_height; ++bands) {
      const int64_t its_rows = ceil_div<int64_t>(p.out_height, bands);
      const int64_t time = ceil_div(p.batch * of_band.divisor * bands, at_once) * (inputs(its_rows) + 2);
      if (time < least) {
        least = time;
        rows = static_cast<int32_t>(its_rows);
      }
    }
    of_image = Divider(of_band.divisor * ceil_div<int64_t>(p.out_height, rows));
  }

  static int64_t inputs(int64_t outputs) { return 2 * outputs + 1; }
  dim3 block() const { return dim3(vectors, inputs(columns)); }
  dim3 grid(int64_t batch) const { return dim3(batch * of_image.divisor); }

  // Whether the kernel has 32 bits for a row of pixels.
  template <class Params>
  static bool take(const Params& p, int64_t element) {
    return p.width * p.channels * element <= UINT32_MAX && p.out_width * p.channels * element <= UINT32_MAX;
  }
};

// V channels of a pixel and two on either side, in NHWC, of which bias and ReLU are to be done. The sides are within
// the own ones' group, or zero.
template <class T, int V>
struct BesideTwo {
  static constexpr int kPart = kVector<T>, kParts = V / kPart, kHalo = 2;

  struct Values {
    Pack<T, kPart> own[kParts];
    Pack<T, kHalo> left, right;
  };
  Values bias{};
  bool has_left, has_right;

  __device__ __forceinline__ BesideTwo(const T* bias, int32_t channel, int32_t group_channels) {
    const int32_t before = channel < group_channels ? channel : channel % group_channels;
    has_left = before > 0;
    has_right = before + V < group_channels;
    if (bias != nullptr) {
      this->bias = load(bias + channel);
    }
  }

  __device__ __forceinline__ Values load(const T* at) const {
    Values values{};
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      values.own[i] = cuda::load<kPart>(at + i * kPart);
    }
    if (has_left) {
      values.left = cuda::load<kHalo>(at - kHalo);
    }
    if (has_right) {
      values.right = cuda::load<kHalo>(at + V);
    }
    return values;
  }

  // LRN of the ReLU's output.
  __device__ __forceinline__ void normalize(const Values& z, const LrnOfFive& lrn,
                                            Pack<T, kPart> (&result)[kParts]) const {
    float x[kHalo + V + kHalo], t[V], w[V];
    unpack(add_relu(z.left, bias.left), reinterpret_cast<float (&)[kHalo]>(x[0]));
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      unpack(add_relu(z.own[i], bias.own[i]), reinterpret_cast<float (&)[kPart]>(x[kHalo + i * kPart]));
    }
    unpack(add_relu(z.right, bias.right), reinterpret_cast<float (&)[kHalo]>(x[kHalo + V]));
    scales<kHalo>(x, lrn, t);
    inverse_power<T>(t, lrn, w);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      w[i] *= x[kHalo + i];
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      result[i] = pack<T>(reinterpret_cast<const float (&)[kPart]>(w[i * kPart]));
    }
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks<T>)
    lrn_pool_fwd_columns(Rectified<T, true> source, T* __restrict__ y, PoolShape shape, LrnPoolColumns lie,
                         int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int S = 2;
  using Beside = BesideTwo<T, V>;
  constexpr int kPart = Beside::kPart, kParts = Beside::kParts, kWords = kPart / kInWord<T>;
  uint32_t rest, slice;
  const int64_t image = lie.of_image.divide_small(blockIdx.x, rest);
  const int32_t first_row = lie.of_band.divide_small(rest, rest) * lie.rows;
  const int32_t first_column = lie.slices.divide_small(rest, slice) * lie.columns;
  const int32_t rows = min(lie.rows, shape.out_height - first_row);
  const int32_t channel = slice * lie.channels + threadIdx.x * V;  // beyond the last one that one's work is done again
  const int32_t its_channel = min(channel, channels - V), out_column = first_column + threadIdx.y;
  const bool pools =
      channel < channels && static_cast<int32_t>(threadIdx.y) < lie.columns && out_column < shape.out_width;
  const int32_t first_w = first_column * S - shape.window.pad_w;
  const int32_t w = min(max(first_w + static_cast<int32_t>(threadIdx.y), 0), shape.width - 1);
  int32_t h = first_row * S - shape.window.pad_h;
  const int32_t last = min(h + rows * S, shape.height - 1);

  const Beside beside(source.bias, its_channel, group_channels);
  const char* at = reinterpret_cast<const char*>(source.z + image * shape.in.image +
                                                 (int64_t{max(h, 0)} * shape.width + w) * channels + its_channel);
  const auto next_row = [&] {
    const auto values = beside.load(reinterpret_cast<const T*>(at));
    at += static_cast<uint32_t>(h) < static_cast<uint32_t>(last) ? lie.line : 0;  // h may be -1
    ++h;
    return values;
  };

  // Two rows of maxima: while a block takes its outputs from one of them it writes the other. The columns of a vector
  // are neighbours, an odd number of them, so that neighbouring vectors lie in other banks.
  using Part = Pack<T, kPart>;
  ALEXNET_FAST_SHARED(Part[2][kParts][kColumnThreads], room);
  const int32_t place = threadIdx.x * blockDim.y + threadIdx.y;
  Part* const own = anew_shared(&room[0][0][place]);
  const Part* const three = anew_shared(&room[0][0][place + threadIdx.y]);
  int32_t turn = 0;
  char* to = reinterpret_cast<char*>(y + image * shape.out.image +
                                     (int64_t{first_row} * shape.out_width + out_column) * channels + channel);

  Part above[kParts];
  beside.normalize(next_row(), lrn, above);
  auto upper = next_row(), lower = next_row();
#pragma unroll 1
  for (int32_t row = 0; row < rows; ++row) {
    Part middle[kParts], below[kParts];
    beside.normalize(upper, lrn, middle);
    upper = next_row();
    beside.normalize(lower, lrn, below);
    lower = next_row();
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        above[i].words[n] = max_of_three<T, true>(above[i].words[n], middle[i].words[n], below[i].words[n]);
      }
      store_shared_16(reinterpret_cast<T*>(own + turn + i * kColumnThreads), above[i]);
      above[i] = below[i];
    }
    __syncthreads();
    if (pools) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const Part* const its = three + turn + i * kColumnThreads;
        const Part a = its[0], b = its[1], c = its[2];
        Part best;
#pragma unroll
        for (int n = 0; n < kWords; ++n) {
          best.words[n] = max_of_three<T, true>(a.words[n], b.words[n], c.words[n]);
        }
        store(reinterpret_cast<T*>(to) + i * kPart, best);
      }
      to += lie.out_line;
    }
    turn = kParts * kColumnThreads - turn;
  }
}

// ---------------------------------------------------------------- launch

template <class T, int V, class Params>
int launch_lrn_pool_fwd_columns(const Params& p, const Rectified<T, true>& source, void* stream) {
  const LrnPoolColumns lie(p, V, sizeof(T), kColumnBlocks<T>);
  constexpr auto kernel = launch<lrn_pool_fwd_columns<T, V>, Rectified<T, true>, T*, PoolShape, LrnPoolColumns, int32_t,
                                 int32_t, LrnOfFive>;
  return kernel(lie.grid(p.batch), lie.block(), 0, stream, source, static_cast<T*>(p.y), PoolShape(p), lie,
                static_cast<int32_t>(p.channels), static_cast<int32_t>(p.channels / p.lrn.groups), LrnOfFive(p.lrn));
}

}  // namespace alexnet_fast::cuda
