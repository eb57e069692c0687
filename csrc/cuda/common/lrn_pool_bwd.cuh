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

// Fewer than of a block elsewhere: a barrier holds up fewer warps. 96 or 64 channels of 16 bits fill all lanes of so
// many.
constexpr int kPatchThreads = 96;

// Six blocks leave a thread 96 registers, which are enough for sm_90's code, and elsewhere two or three too few.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kPatchBlocks = 6;
#else
constexpr int kPatchBlocks = 5;
#endif

template <class T>
struct LrnPoolBackward {
  const T* x;
  T* dx;
  float* partial;  // (blocks, channels): sums of dx for the bias, or null
  const T* dy;
  const uint8_t* code;
  PoolShape shape;
  Divider columns, rows;  // patches in a row and in a column of the image
  uint32_t patches;       // of the batch
};

template <class T, int V>
__global__ void __launch_bounds__(kPatchThreads, kPatchBlocks)
    lrn_pool_bwd_packed(LrnPoolBackward<T> p, int32_t channels, int32_t group_channels, LrnOfFive lrn) {
  constexpr int S = 2, Halo = 2;
  static_assert(V >= 2 * Halo);
  // q of a thread's first and last channels, in turns, and zeros for those who have no neighbour.
  ALEXNET_FAST_SHARED(float[2][kPatchThreads + 1][2 * Halo], shown);
  const PoolShape& shape = p.shape;
  const int32_t thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int32_t channel = threadIdx.x * V;
  const Neighbourhood<Plain<T>, T, V, Halo> near(Plain<T>{p.x}, channel, group_channels);
  if (thread < 4 * Halo) {
    shown[thread / (2 * Halo)][kPatchThreads][thread % (2 * Halo)] = 0;
  }
  const int32_t left_thread = Halo <= near.before ? thread - 1 : kPatchThreads;
  const int32_t right_thread = 0 < near.after ? thread + 1 : kPatchThreads;
  float total[V] = {};
#pragma unroll 1
  for (uint32_t first = blockIdx.x * blockDim.y; first < p.patches; first += gridDim.x * blockDim.y) {
    // Patches and pixels that are not there are read as the nearest ones that are: no load waits behind a branch.
    const uint32_t patch = min(first + threadIdx.y, p.patches - 1);
    const bool there = patch == first + threadIdx.y;
    uint32_t column, row;
    const uint32_t image = p.rows.divide_small(p.columns.divide_small(patch, column), row);
    const int32_t top = row * S - shape.window.pad_h, left = column * S - shape.window.pad_w;
    const int32_t rows[S] = {max(top, 0), min(top + 1, shape.height - 1)};
    const int32_t columns[S] = {max(left, 0), min(left + 1, shape.width - 1)};
    uint32_t at[S * S];
    bool active[S * S];
#pragma unroll
    for (int pixel = 0; pixel < S * S; ++pixel) {
      at[pixel] =
          anew(((image * shape.height + rows[pixel / S]) * shape.width + columns[pixel % S]) * channels + channel);
      active[pixel] = there && rows[pixel / S] == top + pixel / S && columns[pixel % S] == left + pixel % S;
    }
    auto values = near.load(p.x + at[0]);
    float dy[S][S][V];
    gather_patch(p.dy, p.code, image * shape.out_height, shape, row, column, channel, channels, dy);
#pragma unroll
    for (int pixel = 0; pixel < S * S; ++pixel) {
      float (&a)[V] = dy[pixel / S][pixel % S];
      float x[Halo + V + Halo], q[Halo + V + Halo], t[V], power[V], reciprocal[V];
      values.unpack(x);
      const Pack<T, V> own = values.own;
      if (pixel + 1 < S * S) {  // on its way while this one is worked on
        values = near.load(p.x + at[pixel + 1]);
      }
      scales<Halo>(x, lrn, t);
      inverse_power<T>(t, lrn, power, reciprocal);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] *= power[i];
        q[Halo + i] = a[i] * x[Halo + i] * reciprocal[i];
      }
      auto& turn = shown[pixel % 2];
      const float ends[2 * Halo] = {q[Halo], q[Halo + 1], q[V], q[V + 1]};
      store_shared(&turn[thread][0], pack<float>(ends));
      __syncthreads();
      const Pack<float, Halo> before = load<Halo>(&turn[left_thread][Halo]), after = load<Halo>(&turn[right_thread][0]);
#pragma unroll
      for (int i = 0; i < Halo; ++i) {
        q[i] = element(before, i);
        q[Halo + V + i] = element(after, i);
      }
      float sum[V];
      window_sums<Halo>(q, lrn.after, lrn.before, sum);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        a[i] = fmaf(-lrn.slope * x[Halo + i], sum[i], a[i]);
      }
#pragma unroll
      for (int i = 0; i < V; i += 2) {
        if constexpr (sizeof(T) == 2) {
          mask_pair(own.words[i / 2], a[i], a[i + 1]);
        } else {
          a[i] = x[Halo + i] <= 0 ? 0 : a[i];
          a[i + 1] = x[Halo + i + 1] <= 0 ? 0 : a[i + 1];
        }
      }
      if (active[pixel]) {
        store(p.dx + at[pixel], pack<T>(a));
#pragma unroll
        for (int i = 0; i < V; ++i) {
          total[i] += a[i];
        }
      }
    }
  }
  if (p.partial != nullptr) {
    // A block has few rows of threads, and mostly as many threads as channels: each adds up one. store_block_sums takes
    // twice as many instructions for so few rows.
    ALEXNET_FAST_SHARED(float[kPatchThreads * V], totals);  // [row][channel]
    const int32_t threads = blockDim.x * blockDim.y;
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      const float some[4] = {total[i], total[i + 1], total[i + 2], total[i + 3]};
      store_shared(&totals[threadIdx.y * channels + channel + i], pack<float>(some));
    }
    __syncthreads();
    for (int32_t c = thread; c < channels; c += threads) {
      float sum = 0;
      for (int32_t row = c; row < threads * V; row += channels) {
        sum += totals[row];
      }
      p.partial[int64_t{blockIdx.x} * channels + c] = sum;
    }
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
    constexpr int64_t kEnoughBlocks = 4096, kSumBlocks = 1584;  // twice as many as 132 multiprocessors hold at once
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
         p.batch * p.channels * p.height * p.width <= UINT32_MAX &&
         LrnPoolPatches(p, V, false).all <= INT32_MAX - kPatchThreads;
}

template <class T>
int launch_lrn_pool_bwd(const EpilogueParams& p, void* stream) {
  constexpr int V = kVector<T>;
  const LrnPoolPatches lie(p, V, p.db_partial != nullptr);
  const LrnPoolBackward<T> backward{static_cast<const T*>(p.r),
                                    static_cast<T*>(p.dz),
                                    static_cast<float*>(p.db_partial),
                                    static_cast<const T*>(p.dy),
                                    p.code,
                                    PoolShape(p),
                                    Divider(lie.in_row),
                                    Divider(lie.in_column),
                                    static_cast<uint32_t>(lie.all)};
  return launch<lrn_pool_bwd_packed<T, V>>(dim3(lie.blocks), lie.block, 0, stream, backward,
                                           static_cast<int32_t>(p.channels),
                                           static_cast<int32_t>(p.channels / p.lrn.groups), LrnOfFive(p.lrn));
}

}  // namespace alexnet_fast::cuda
