// LRN and max-pooling in one pass where nothing is kept for backward, AlexNet's windows, for epilogue_fwd.cu: in NHWC,
// and in square NCHW planes of AlexNet's two sizes. A thread goes down a column of pixels with V channels: of three
// rows of LRN's output it keeps the maxima, in registers, and a row of these goes through shared memory, where every
// output takes three. So no row of a band is done twice, and a thread finds its place once for all of them.
// common/lrn_pool_fwd.cuh has training and other windows, common/lrn_pool_fwd_planes.cuh both in other planes.
//
// Maxima alone are wanted, so a row or a column in the padding is the nearest one within, which the window holds
// anyway.
#pragma once

#include "cuda/common/lrn_planes.cuh"
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

// Threads of a block at most, 29 columns of 12 vectors of channels, and blocks that a multiprocessor has registers for:
// single elements of planes are on their way in one each.
constexpr int kColumnThreads = 352;
template <class T, int kSide>
constexpr int kColumnBlocks = sizeof(T) == 2 && kSide == 0 ? 3 : 2;

// How blocks lie over the images: some rows and columns of outputs, in planes all columns, and a slice of the channels.
struct LrnPoolColumns {
  int32_t rows, columns, vectors, channels;
  uint32_t line, out_line;            // bytes of a row of NHWC pixels
  Divider slices, of_band, of_image;  // blocks

  template <class Params>
  LrnPoolColumns(const Params& p, int32_t V, int64_t element, int64_t blocks)
      : line(static_cast<uint32_t>(p.width * p.channels * element)),
        out_line(static_cast<uint32_t>(p.out_width * p.channels * element)) {
    constexpr int64_t kWarp = 32, kNone = INT32_MAX;
    // More slices read more neighbours. In NHWC those are in sectors of their own, for which 5% fewer warps make up.
    const int64_t worth = p.channels_last ? 95 : 100;
    int64_t least = kNone;
    for (int64_t n = 1; n <= p.channels / V; ++n) {
      const int64_t its_vectors = ceil_div(p.channels / V, n), most = (kColumnThreads / its_vectors - 1) / 2;
      if (most >= (p.channels_last ? 1 : p.out_width)) {
        const int64_t its_columns = ceil_div(p.out_width, ceil_div(p.out_width, most));
        const int64_t warps =
            n * ceil_div(p.out_width, its_columns) * ceil_div(its_vectors * inputs(its_columns), kWarp);
        if (100 * warps < worth * least) {
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
    // 132 multiprocessors, of three outputs or more. A thread's place takes about that of two rows.
    const int64_t at_once = 132 * (blocks * kColumnThreads / kWarp / ceil_div(vectors * inputs(columns), kWarp));
    least = kNone;
    for (int64_t bands = 1; bands <= std::max<int64_t>(p.out_height / 3, 1); ++bands) {
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

  // Whether the kernel takes that stage: in NHWC rows of pixels whose bytes have 32 bits, in planes of kSide x kSide
  // images whose elements have.
  template <int kSide, class Params>
  static bool take(const Params& p, int64_t element) {
    if (!overlapping_3_by_2(p.window) || !LrnOfFive::is(p.lrn) || p.code != nullptr || p.r != nullptr) {
      return false;
    }
    if (kSide == 0) {
      return p.channels_last && std::max(p.width, p.out_width) * p.channels * element <= UINT32_MAX;
    }
    return !p.channels_last && p.height == kSide && p.width == kSide && p.out_height == kSide / 2 &&
           p.out_width == kSide / 2 && windows_inside(p) && p.channels / p.lrn.groups % 8 == 0 && aligned_16(p.bias) &&
           p.channels * kSide * kSide <= INT32_MAX;
  }
};

// V channels of a pixel and two on either side, those on the sides within the own ones' group, or zero: of an NHWC
// tensor vectors, of square NCHW planes of kSide x kSide pixels elements. Planes' sizes are known when compiled, so
// that elements are as far from one address as an instruction can say.
template <class T, int V, int kSide>
struct BesideTwo {
  static constexpr int kHalo = 2, kAll = V + 2 * kHalo, kPlane = kSide * kSide;
  static constexpr int kPart = kVector<T>, kParts = V / kPart;

  struct Vectors {
    Pack<T, kPart> own[kParts];
    Pack<T, 2> left, right;

    __device__ __forceinline__ Pack<T, 2> two(int i) const {
      if (i < kHalo || i >= kHalo + V) {
        return i < kHalo ? left : right;
      }
      constexpr int kWords = 2 / kInWord<T>;
      Pack<T, 2> result;
#pragma unroll
      for (int n = 0; n < kWords; ++n) {
        result.words[n] = own[(i - kHalo) / kPart].words[(i - kHalo) % kPart / kInWord<T> + n];
      }
      return result;
    }
  };
  struct Elements {
    T x[kAll];
    __device__ __forceinline__ Pack<T, 2> two(int i) const { return pack_two(x[i], x[i + 1]); }
  };

  using Values = std::conditional_t<kSide == 0, Vectors, Elements>;

  Pack<T, 2> bias[kAll / 2];
  bool has_left, has_right;

  __device__ __forceinline__ BesideTwo(const T* bias, int32_t channel, int32_t group_channels) {
    const int32_t before = channel < group_channels ? channel : channel % group_channels;
    has_left = before > 0;
    has_right = before + V < group_channels;
    Vectors vectors{};
    if (bias != nullptr) {
      load(bias + channel, vectors);
    }
#pragma unroll
    for (int i = 0; i < kAll; i += 2) {
      this->bias[i / 2] = vectors.two(i);
    }
  }

  // Those that are not there stay what they were: zeros, which no instruction has to write again.
  __device__ __forceinline__ void load(const T* at, Vectors& z) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      z.own[i] = cuda::load<kPart>(at + i * kPart);
    }
    if (has_left) {
      z.left = cuda::load<kHalo>(at - kHalo);
    }
    if (has_right) {
      z.right = cuda::load<kHalo>(at + V);
    }
  }

  __device__ __forceinline__ void load(const T* at, Elements& z) const {
#pragma unroll
    for (int i = 0; i < kAll; ++i) {
      if (i < kHalo ? has_left : i < kHalo + V || has_right) {
        z.x[i] = at[(i - kHalo) * kPlane];
      }
    }
  }

  // LRN of the ReLU's output.
  __device__ __forceinline__ void normalize(const Values& z, const LrnOfFive& lrn,
                                            Pack<T, kPart> (&result)[kParts]) const {
    float x[kAll], t[V], w[V];
#pragma unroll
    for (int i = 0; i < kAll; i += 2) {
      unpack(add_relu(z.two(i), bias[i / 2]), reinterpret_cast<float (&)[2]>(x[i]));
    }
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

template <class T, int V, int kSide>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks<T, kSide>)
    lrn_pool_fwd_columns(const T* __restrict__ z, const T* __restrict__ bias, T* __restrict__ y, PoolShape shape,
                         LrnPoolColumns lie, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int S = 2;
  constexpr bool kPlanes = kSide > 0;
  constexpr int32_t kPlane = kSide * kSide, kOutSide = kSide / S, kOutPlane = kOutSide * kOutSide;
  using Beside = BesideTwo<T, V, kSide>;
  constexpr int kPart = Beside::kPart, kParts = Beside::kParts, kWords = kPart / kInWord<T>;
  const int32_t vector = kPlanes ? threadIdx.y : threadIdx.x, column = kPlanes ? threadIdx.x : threadIdx.y;
  uint32_t rest, slice;
  const int64_t image = lie.of_image.divide_small(blockIdx.x, rest);
  const int32_t first_row = lie.of_band.divide_small(rest, rest) * lie.rows;
  const int32_t first_column = lie.slices.divide_small(rest, slice) * lie.columns;
  const int32_t rows = min(lie.rows, shape.out_height - first_row);
  const int32_t channel = slice * lie.channels + vector * V;  // beyond the last one that one's work is done again
  const int32_t its_channel = min(channel, channels - V);
  const int32_t first_w = first_column * S - shape.window.pad_w;
  const int32_t w = min(max(first_w + column, 0), shape.width - 1);
  int32_t h = first_row * S - shape.window.pad_h;
  const int32_t last = min(h + rows * S, shape.height - 1);

  const Beside beside(bias, its_channel, group_channels);
  const T* const its_z = z + image * shape.in.image;
  const char* at =
      reinterpret_cast<const char*>(kPlanes ? its_z + its_channel * kPlane + h * kSide + w
                                            : its_z + (int64_t{max(h, 0)} * shape.width + w) * channels + its_channel);
  const uint32_t line = kPlanes ? kSide * sizeof(T) : lie.line;
  typename Beside::Values upper{}, lower{};
  // From row h, at which it is, by some rows, or by none where the last one is nearer; h may be -1.
  const auto advance = [&](int32_t by) {
    at += static_cast<uint32_t>(h + by - 1) < static_cast<uint32_t>(last) ? by * line : 0;
    h += by;
  };
  const auto load_upper = [&] {
    beside.load(reinterpret_cast<const T*>(at), upper);
    if (!kPlanes) {
      advance(1);
    }
  };
  const auto load_lower = [&] {
    beside.load(reinterpret_cast<const T*>(kPlanes ? at + line : at), lower);
    advance(kPlanes ? 2 : 1);
  };

  // Two rows of maxima: while a block takes its outputs from one of them it writes the other. The columns of a vector
  // are neighbours, an odd number of them, so that neighbouring vectors lie in other banks.
  using Part = Pack<T, kPart>;
  ALEXNET_FAST_SHARED(Part[2][kParts][kColumnThreads], room);
  const int32_t inputs = kPlanes ? kSide : blockDim.y, place = vector * inputs + column;
  Part* const own = anew_shared(&room[0][0][place]);
  // In planes a block's first threads take the outputs, so that its last warps have none of the work.
  const int32_t out_vector = kPlanes ? place / kOutSide : vector;
  const int32_t out_channel = slice * lie.channels + out_vector * V;
  const int32_t its_column = kPlanes ? place - out_vector * kOutSide : column, out_column = first_column + its_column;
  const bool pools = out_channel < channels &&
                     (kPlanes ? out_vector < lie.vectors : its_column < lie.columns && out_column < shape.out_width);
  const Part* const three = anew_shared(&room[0][0][0] + out_vector * inputs + its_column * S);
  int32_t turn = 0;
  T* const out = y + image * shape.out.image;
  char* to = reinterpret_cast<char*>(kPlanes ? out + out_channel * kOutPlane + first_row * kOutSide + out_column
                                             : out + (int64_t{first_row} * shape.out_width + out_column) * channels +
                                                   out_channel);

  Part above[kParts];
  beside.load(reinterpret_cast<const T*>(at), upper);
  advance(1);
  beside.normalize(upper, lrn, above);
  load_upper();
  load_lower();
#pragma unroll 1
  for (int32_t row = 0; row < rows; ++row) {
    Part middle[kParts], below[kParts];
    beside.normalize(upper, lrn, middle);
    load_upper();
    beside.normalize(lower, lrn, below);
    load_lower();
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
      T* const its_y = reinterpret_cast<T*>(to);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const Part* const its = three + turn + i * kColumnThreads;
        const Part a = its[0], b = its[1], c = its[2];
        Part best;
#pragma unroll
        for (int n = 0; n < kWords; ++n) {
          best.words[n] = max_of_three<T, true>(a.words[n], b.words[n], c.words[n]);
        }
        if constexpr (kPlanes) {
#pragma unroll
          for (int v = 0; v < kPart; ++v) {
            store_of_word<false>(best.words[v / kInWord<T>], 0, v % kInWord<T>, its_y + (i * kPart + v) * kOutPlane,
                                 nullptr);
          }
        } else {
          store(its_y + i * kPart, best);
        }
      }
      to += kPlanes ? kOutSide * sizeof(T) : lie.out_line;
    }
    turn = kParts * kColumnThreads - turn;
  }
}

// ---------------------------------------------------------------- launch

template <class T, int V, int kSide, class Params>
int launch_lrn_pool_fwd_columns(const Params& p, void* stream) {
  const LrnPoolColumns lie(p, V, sizeof(T), kColumnBlocks<T, kSide>);
  const int32_t inputs = static_cast<int32_t>(LrnPoolColumns::inputs(lie.columns));
  const dim3 block = kSide > 0 ? dim3(inputs, lie.vectors) : dim3(lie.vectors, inputs);
  constexpr auto kernel = launch<lrn_pool_fwd_columns<T, V, kSide>, const T*, const T*, T*, PoolShape, LrnPoolColumns,
                                 int32_t, int32_t, LrnOfFive>;
  return kernel(dim3(p.batch * lie.of_image.divisor), block, 0, stream, static_cast<const T*>(p.z),
                static_cast<const T*>(p.bias), static_cast<T*>(p.y), PoolShape(p), lie,
                static_cast<int32_t>(p.channels), static_cast<int32_t>(p.channels / p.lrn.groups), LrnOfFive(p.lrn));
}

}  // namespace alexnet_fast::cuda
