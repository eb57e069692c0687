// Backward of AlexNet's stages, for epilogue_bwd.cu: from the gradient of the pool's output, through windows of 3 with
// stride 2, LrnOfFive and the ReLU, to dz and sums for the bias. common/lrn_bwd.cuh has the formula.
//
// NHWC: a thread owns V channels of a patch of 2 x 2 pixels. It gathers the pool's gradient of all four at
// once (gather_patch) and takes LRN's backward pixel by pixel: t and its powers once for each channel, and the products
// q of the two channels on either side from the threads beside it, through shared memory, one barrier a pixel. The
// ReLU's output x is LRN's input and the mask. NCHW: common/lrn_pool_bwd_planes.cuh.
#pragma once

#include "cuda/common/lrn_bwd.cuh"
#include "cuda/common/pool.cuh"

namespace alexnet_fast::cuda {

// Half of a block elsewhere: a barrier holds up fewer warps, and registers divide into smaller pieces.
constexpr int kPatchThreads = 128;

template <class T>
struct LrnPoolBackward {
  const T* x;
  T* dx;
  float* partial;  // (blocks, channels): sums of dx for the bias, or null
  PooledGradient<T> gradient;
  Divider columns, rows;  // patches in a row and in a column of the image
  int32_t patches;        // of the batch
};

template <class T, int V>
__global__ void __launch_bounds__(kPatchThreads, 5)
    lrn_pool_bwd_packed(LrnPoolBackward<T> p, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int S = 2, Halo = 2;
  static_assert(V >= 2 * Halo);
  ALEXNET_FAST_SHARED(float[2][kPatchThreads][2 * Halo], shown);  // q of a thread's first and last channels, in turns
  const PoolShape& shape = p.gradient.shape;
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int32_t channel = threadIdx.x * V;
  const Neighbourhood<Plain<T>, T, V, Halo> near(Plain<T>{p.x}, channel, group_channels);
  float total[V] = {};
#pragma unroll 1
  for (int64_t first = int64_t{blockIdx.x} * blockDim.y; first < p.patches; first += int64_t{gridDim.x} * blockDim.y) {
    const uint32_t patch = first + threadIdx.y;
    const bool there = patch < static_cast<uint32_t>(p.patches);
    uint32_t column, row;
    const int64_t image = p.rows.divide_small(p.columns.divide_small(patch, column), row);
    const int32_t top = row * S - shape.window.pad_h, left = column * S - shape.window.pad_w;
    const auto is_active = [&](int pixel) {
      const int32_t h = top + pixel / S, w = left + pixel % S;
      return there && h >= 0 && h < shape.height && w >= 0 && w < shape.width;
    };
    const int64_t in = image * shape.in.image + (int64_t{top} * shape.width + left) * channels + channel;
    const auto offset = [&](int pixel) { return in + (int64_t{pixel / S} * shape.width + pixel % S) * channels; };
    // Pixels that are not there are zeros, whose gradient is zero too.
    using Values = typename Neighbourhood<Plain<T>, T, V, Halo>::Values;
    Values values = is_active(0) ? near.load(offset(0)) : Values{};
    float dy[S][S][V] = {};
    if (there) {
      gather_patch(p.gradient, image * shape.out.image + channel, row, column, channels, dy);
    }
#pragma unroll
    for (int pixel = 0; pixel < S * S; ++pixel) {
      float (&a)[V] = dy[pixel / S][pixel % S];
      float x[Halo + V + Halo], q[Halo + V + Halo], t[V], power[V], reciprocal[V];
      values.unpack(x);
      if (pixel + 1 < S * S) {  // on its way while this one is worked on
        values = is_active(pixel + 1) ? near.load(offset(pixel + 1)) : Values{};
      }
      scales<Halo>(x, lrn, t);
      inverse_power<T>(t, lrn, power, reciprocal);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] *= power[i];
        q[Halo + i] = a[i] * x[Halo + i] * reciprocal[i];
      }
      float (&turn)[kPatchThreads][2 * Halo] = shown[pixel % 2];
      const float ends[2 * Halo] = {q[Halo], q[Halo + 1], q[V], q[V + 1]};
      store_shared(&turn[thread][0], pack<float>(ends));
      __syncthreads();
      float before[Halo] = {}, after[Halo] = {};
      if (Halo <= near.before) {
        unpack(load<Halo>(&turn[thread - 1][Halo]), before);
      }
      if (0 < near.after) {
        unpack(load<Halo>(&turn[thread + 1][0]), after);
      }
#pragma unroll
      for (int i = 0; i < Halo; ++i) {
        q[i] = before[i];
        q[Halo + V + i] = after[i];
      }
      float sum[V];
      window_sums<Halo>(q, lrn.after, lrn.before, sum);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = fmaf(-lrn.slope * x[Halo + i], sum[i], a[i]);
        if (x[Halo + i] <= 0) {
          a[i] = 0;
        }
        total[i] += a[i];
      }
      if (is_active(pixel)) {
        store(p.dx + offset(pixel), pack<T>(a));
      }
    }
  }
  if (p.partial != nullptr) {
    store_block_sums(total, p.partial + int64_t{blockIdx.x} * channels, channel, true);
  }
}

// ---------------------------------------------------------------- launch

struct LrnPoolPatches {
  int64_t in_row, in_column, all;
  dim3 block;
  int64_t blocks;  // and so rows of `partial`

  LrnPoolPatches(const EpilogueParams& p, int V, bool summing)
      : in_row(ceil_div<int64_t>(p.width + p.window.pad_w, 2)),
        in_column(ceil_div<int64_t>(p.height + p.window.pad_h, 2)),
        all(p.batch * in_row * in_column),
        block(p.channels / V, kPatchThreads / (p.channels / V)) {
    constexpr int64_t kEnoughBlocks = 4096, kSumBlocks = 1320;  // twice as many as 132 multiprocessors hold at once
    const int64_t groups = ceil_div<int64_t>(all, block.y);
    blocks = ceil_div(groups, std::clamp<int64_t>(groups / kEnoughBlocks, 1, 4));
    blocks = summing ? std::min(blocks, kSumBlocks) : blocks;
  }
};

// Whether the kernel takes that stage.
template <class T>
bool lrn_pool_bwd_packs(const EpilogueParams& p, const LrnShape& shape, bool aligned) {
  constexpr int V = kVector<T>;
  return p.channels_last && aligned && lrn_in_vectors(shape, p.lrn, V) && p.channels / V <= kPatchThreads &&
         overlapping_3_by_2(p.window) && LrnOfFive::is(p.lrn) &&
         LrnPoolPatches(p, V, false).all <= INT32_MAX - kPatchThreads;
}

template <class T>
int launch_lrn_pool_bwd(const EpilogueParams& p, void* stream) {
  constexpr int V = kVector<T>;
  const LrnPoolPatches lie(p, V, p.db_partial != nullptr);
  const LrnPoolBackward<T> backward{static_cast<const T*>(p.r),
                                    static_cast<T*>(p.dz),
                                    static_cast<float*>(p.db_partial),
                                    PooledGradient<T>(p.dy, p.code, PoolShape(p)),
                                    Divider(lie.in_row),
                                    Divider(lie.in_column),
                                    static_cast<int32_t>(lie.all)};
  return launch<lrn_pool_bwd_packed<T, V>>(dim3(lie.blocks), lie.block, 0, stream, backward,
                                           static_cast<int32_t>(p.channels),
                                           static_cast<int32_t>(p.channels / p.lrn.groups), LrnOfFive(p.lrn));
}

}  // namespace alexnet_fast::cuda
