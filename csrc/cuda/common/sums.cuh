// Sums over a block's threads, over a warp's lanes, and over the rows that blocks have left. They are taken in a fixed
// order and without atomics, so that the bias's gradient has the same bits in every run.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/units.cuh"

namespace alexnet_fast::cuda {

// Blocks that go through units and sum as they go, at most: enough to fill any card, few enough that their rows of sums
// are small beside the tensors.
constexpr int64_t kSumItems = 1024;

// Adds up each of `sum` over threadIdx.y and stores the block's V sums, at row[channel] and on. All threads of the
// block must come; `wanted` says whether this one's channel exists.
template <int V>
__device__ __forceinline__ void store_block_sums(const float (&sum)[V], float* row, int32_t channel, bool wanted) {
  ALEXNET_FAST_SHARED(float[V][kThreads], sums);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    sums[v][thread] = sum[v];
  }
  for (int rows = blockDim.y; rows > 1;) {
    const int half = (rows + 1) / 2;
    __syncthreads();
    if (static_cast<int>(threadIdx.y) + half < rows) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[v][thread] += sums[v][thread + half * blockDim.x];
      }
    }
    rows = half;
  }
  if (threadIdx.y == 0 && wanted) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      row[channel + v] = sums[v][thread];
    }
  }
}

// Sums each of N values over a warp, or over kLanes lanes of it, for N = 4 in 6 shuffles instead of 20: with every
// exchange a lane gives away the half of its values that its partner goes on with. Lane l of those gets the sum of
// values[l / (kLanes / N)], or with kApart > 1 of the lanes alone that are a multiple of kApart from it.
template <int N, int kLanes = 32, int kApart = 1>
__device__ __forceinline__ float sum_lanes(float (&values)[N]) {
  const int lane = threadIdx.x % kLanes;
#pragma unroll
  for (int kept = N / 2; kept >= 1; kept /= 2) {
    const int distance = kLanes / N * kept;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = upper ? values[i] : values[i + kept];
      values[i] = (upper ? values[i + kept] : values[i]) + __shfl_xor_sync(0xffffffff, given, distance);
    }
  }
  float sum = values[0];
#pragma unroll
  for (int distance = kLanes / 2 / N; distance >= kApart; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffff, sum, distance);
  }
  return sum;
}

// sums[c] = the sum of column c of `rows` (rows, columns), rounded to T. A block takes 8 columns, a sector of memory,
// so that AlexNet's layers have 8 to 48 blocks. A thread adds up every 128th row of a column; the last additions, the
// largest numbers', go through a fixed tree in double: 127 roundings of the whole sum would show in float32.
//
// What bounds these few kilobytes is how often a block waits for them. The first version had 32 columns a block, two
// blocks for 64 channels, and up to 32 loads a thread, eight at a time: 4.9 us measured (one H100 80GB HBM3,
// 2026-11-27, bfloat16). Now up to 1,024 rows are 8 loads a thread, all in flight at once, one barrier and 7 shuffles.
// Predicted, not measured: 3 us, a launch and two latencies of memory.
constexpr int kSumColumns = 8, kSumRows = 128;

template <class T>
__global__ void __launch_bounds__(1024, 1)
    add_rows(const float* __restrict__ partial, int64_t rows, int32_t columns, T* __restrict__ sums) {
  constexpr int kWarps = kSumColumns * kSumRows / 32;
  ALEXNET_FAST_SHARED(double[kSumColumns][kWarps], shared);
  const int32_t column = blockIdx.x * kSumColumns + threadIdx.x;
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) {
      sum += partial[row * columns + column];
    }
  }
  // A warp holds four rows of eight columns, and then 32 of one column.
  const int thread = threadIdx.y * kSumColumns + threadIdx.x;
  double total = sum;
  total += __shfl_xor_sync(0xffffffff, total, 16);
  total += __shfl_xor_sync(0xffffffff, total, 8);
  if (thread % 32 < kSumColumns) {
    shared[threadIdx.x][thread / 32] = total;
  }
  __syncthreads();
  if (thread >= 32 * kSumColumns) {
    return;
  }
  total = shared[thread / 32][thread % 32];
#pragma unroll
  for (int distance = 16; distance >= 1; distance /= 2) {
    total += __shfl_xor_sync(0xffffffff, total, distance);
  }
  const int32_t own = blockIdx.x * kSumColumns + thread / 32;
  if (thread % 32 == 0 && own < columns) {
    from_float(static_cast<float>(total), sums[own]);
  }
}

template <class T>
int launch_add_rows(const void* partial, int64_t rows, int64_t columns, void* sums, void* stream) {
  return launch<add_rows<T>>(dim3(ceil_div<int64_t>(columns, kSumColumns)), dim3(kSumColumns, kSumRows), 0, stream,
                             static_cast<const float*>(partial), rows, static_cast<int32_t>(columns),
                             static_cast<T*>(sums));
}

}  // namespace alexnet_fast::cuda
