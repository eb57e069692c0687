// Linear layers of few rows: y = x weight^T + bias, of weights in x's dtype, or of int8 weights with a scale an output.
//
// A warp has two outputs. Its lanes go along the weights of both, 16 bytes of each at a time, and multiply them with up
// to eight rows: weights come from device memory once, and what a lane has of x serves both outputs. A lane adds its
// products in float32, in their order, and the 32 sums are added in a tree: a row's bits depend neither on how many
// rows there are nor on where a block runs.
//
// AlexNet's fc6 to fc8 are 58.6 M weights: 117 MB of bfloat16, which 3.0 TB/s bring in 39 us and 4.3 TB/s in 27, and of
// int8 half of it. In flight have to be 25 KB a multiprocessor (bytes a second times 700 ns). fc6 and fc7 are 512
// blocks, four a multiprocessor; with one row a thread has two outputs' four loads in flight, 16 KB a block, and with
// more rows, whose sums take the registers, half of that. fc8's 125 blocks are one a multiprocessor, with 16 or 8 KB.
//
// x is read by every warp, out of L1: R / 2 bytes for each byte of weights, which with eight rows and those themselves
// are five of the 28.7 TB/s that 132 multiprocessors read at 128 bytes a cycle: 5.7 TB/s of weights. Instructions for a
// byte of bfloat16, of the 9.6 that 3.0 TB/s leave and 6.7 of 4.3 TB/s: 1.4 with one row, 3.9 with up to four and 7.3
// with up to eight (a product a weight and row, half a conversion of x, one of the weight): bytes bind, but with eight
// rows on an H200, where instructions do by a tenth. float32: 0.4, 1.5 and 3.5, and bytes bind. int8: 3.9 and 9.0, with
// up to four rows at a time.
//
// From sm_90 on the kernel begins while the one before it still runs, and asks for 4 KB of each output's weights into
// L2, a line a lane. Four blocks a multiprocessor ask for 17 MB, 6 us of a memory that gives 3 TB/s; more might drive
// each other out of its 50 MB before they are read. None of this was measured.
#pragma once

#include "cuda/common/dependent.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

constexpr int kLinearThreads = 128, kLinearWarps = kLinearThreads / 32;
constexpr int kLinearOutputs = 2;                     // of a warp
constexpr int64_t kMostInputs = INT32_MAX - 32 * 16;  // places in a row are ints

template <int N>
__device__ __forceinline__ float element(const Pack<int8_t, N>& pack, int i) {
  if constexpr (N == 1) {
    return static_cast<int8_t>(pack.words[0]);
  } else {
    return static_cast<int8_t>(pack.words[i / 4] >> (8 * (i % 4)));
  }
}

template <class T, class W>
struct LinearTensors {
  const T* x;
  const W* weight;
  const float* scales;  // of int8 weights
  const T* bias;        // or null
  T* y;
  int64_t rows, inputs, outputs;
  bool relu;
};

// V weights are read at once, of R rows.
template <class T, class W, int V, int R>
__global__ void __launch_bounds__(kLinearThreads, 4) linear(LinearTensors<T, W> p) {
  constexpr int kStep = V < kVector<T> ? V : kVector<T>;  // elements of x that are read at once
  // Loads of an output's weights in flight, as registers allow.
  [[maybe_unused]] constexpr int kUnroll = (R == 1 ? 4 : 2) / (V == 16 || (V == 4 && R == 8) ? 2 : 1);
  const int lane = threadIdx.x % 32, inputs = static_cast<int>(p.inputs);
  const int64_t first = (int64_t{blockIdx.x} * kLinearWarps + threadIdx.x / 32) * kLinearOutputs;
  constexpr int kLine = 128 / sizeof(W);
#pragma unroll
  for (int j = 0; j < kLinearOutputs; ++j) {
    if (first + j < p.outputs && lane * kLine < inputs) {
      prefetch_line(p.weight + (first + j) * p.inputs + lane * kLine);
    }
  }
  dependency_wait();
  launch_dependents();
  for (int64_t output = first; output < p.outputs; output += int64_t{gridDim.x} * kLinearWarps * kLinearOutputs) {
    for (int64_t row = 0; row < p.rows; row += R) {
      // Of outputs and rows that are not there the last one is multiplied, and nothing is written.
      const W* weight[kLinearOutputs];
#pragma unroll
      for (int j = 0; j < kLinearOutputs; ++j) {
        weight[j] = p.weight + min(output + j, p.outputs - 1) * p.inputs + lane * V;
      }
      const T* x[R];
#pragma unroll
      for (int i = 0; i < R; ++i) {
        x[i] = p.x + min(row + i, p.rows - 1) * p.inputs + lane * V;
      }
      float sums[R][kLinearOutputs] = {};
#pragma unroll kUnroll
      for (int32_t c = lane * V; c < inputs; c += 32 * V) {
        Pack<W, V> weights[kLinearOutputs];
#pragma unroll
        for (int j = 0; j < kLinearOutputs; ++j) {
          weights[j] = load<V>(weight[j]);
          weight[j] += 32 * V;
        }
#pragma unroll
        for (int v = 0; v < V; v += kStep) {
#pragma unroll
          for (int i = 0; i < R; ++i) {
            const Pack<T, kStep> some = load<kStep>(x[i] + v);
#pragma unroll
            for (int k = 0; k < kStep; ++k) {
#pragma unroll
              for (int j = 0; j < kLinearOutputs; ++j) {
                sums[i][j] += element(some, k) * element(weights[j], v + k);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < R; ++i) {
          x[i] += 32 * V;
        }
      }
      float mine = 0;  // a lane writes one of them
#pragma unroll
      for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < kLinearOutputs; ++j) {
#pragma unroll
          for (int step = 16; step > 0; step /= 2) {
            sums[i][j] += __shfl_xor_sync(0xffffffff, sums[i][j], step);
          }
          mine = lane == i * kLinearOutputs + j ? sums[i][j] : mine;
        }
      }
      const int64_t at_row = row + lane / kLinearOutputs, at_output = output + lane % kLinearOutputs;
      if (lane < R * kLinearOutputs && at_row < p.rows && at_output < p.outputs) {
        const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[at_output]);
        float y;
        if constexpr (std::is_same_v<W, int8_t>) {
          y = p.scales[at_output] * mine + bias;
        } else {
          y = mine + bias;
        }
        from_float(p.relu && y <= 0 ? 0.0f : y, p.y[at_row * p.outputs + at_output]);
      }
    }
  }
}

template <class T, class W>
int launch_linear(const LinearTensors<T, W>& p, void* stream) {
  if (p.rows * p.outputs == 0) {
    return cudaSuccess;
  }
  if (p.inputs > kMostInputs) {
    return cudaErrorInvalidValue;
  }
  constexpr int64_t kOutputs = kLinearWarps * kLinearOutputs;  // of a block
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(ceil_div(p.outputs, kOutputs), INT32_MAX)));
  const dim3 block(kLinearThreads);
  constexpr int V = kVector<W>;
  if (p.inputs % V != 0 || !aligned_16(p.x) || !aligned_16(p.weight)) {
    return launch_early_if_possible<linear<T, W, 1, 4>>(grid, block, 0, stream, p);
  }
  if (p.rows == 1) {
    return launch_early_if_possible<linear<T, W, V, 1>>(grid, block, 0, stream, p);
  }
  constexpr int kMost = V == 16 ? 4 : 8;  // of x's rows at once: eight of 16 inputs would be spilled
  return p.rows <= 4 ? launch_early_if_possible<linear<T, W, V, 4>>(grid, block, 0, stream, p)
                     : launch_early_if_possible<linear<T, W, V, kMost>>(grid, block, 0, stream, p);
}

}  // namespace alexnet_fast::cuda
