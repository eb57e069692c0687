// A linear layer with int8 weights, for few rows. The formula: alexnet_fast/ops/linear_int8.py.
//
// A warp has an output: its lanes go along the weights, 16 bytes each, and multiply them with up to kRows rows at a
// time. More rows read the weights again, out of L2 where they fit. Bytes from device memory: weights once, a byte
// each, where float32's would be four.
//
// From sm_90 on the kernel begins while the one before it still runs, and asks for its weights into L2. fc6's 38 MB are
// 13 us of a memory that gives 3 TB/s; what comes while the layer before runs is saved, up to the 19 MB of two blocks
// a multiprocessor. None of this was measured.
#include "cuda/common/dependent.cuh"
#include "cuda/common/units.cuh"
#include "cuda/common/vector.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {
namespace {

constexpr int kRows = 4;
constexpr int kWarps = kThreads / 32;

// Byte i of the pack, as a number.
template <int N>
__device__ __forceinline__ float weight_of(const Pack<int8_t, N>& pack, int i) {
  if constexpr (N == 1) {
    return static_cast<int8_t>(pack.words[0]);
  } else {
    return static_cast<int8_t>(pack.words[i / 4] >> (8 * (i % 4)));
  }
}

template <class T>
struct LinearTensors {
  const T* x;
  const int8_t* weight;
  const float* scales;
  const T* bias;  // or null
  T* y;
  int64_t rows, inputs, outputs;
};

// V weights are read at once.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 2) linear_int8(LinearTensors<T> p) {
  constexpr int kStep = V < kVector<T> ? V : kVector<T>;  // elements of x that are read at once
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (int64_t c = lane * 128; first < p.outputs && c < p.inputs; c += 32 * 128) {
    prefetch_line(p.weight + first * p.inputs + c);
  }
  dependency_wait();
  launch_dependents();
  for (int64_t output = first; output < p.outputs; output += int64_t{gridDim.x} * kWarps) {
    const int8_t* const weight = p.weight + output * p.inputs;
    for (int64_t row = 0; row < p.rows; row += kRows) {
      // Of rows that are not there the last one is multiplied, and nothing is written.
      const T* x[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = p.x + min(row + i, p.rows - 1) * p.inputs;
      }
      float sums[kRows] = {};
      for (int64_t c = lane * V; c < p.inputs; c += 32 * V) {
        const Pack<int8_t, V> weights = load<V>(weight + c);
#pragma unroll
        for (int v = 0; v < V; v += kStep) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const Pack<T, kStep> some = load<kStep>(x[i] + c + v);
#pragma unroll
            for (int k = 0; k < kStep; ++k) {
              sums[i] += element(some, k) * weight_of(weights, v + k);
            }
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) {
          sums[i] += __shfl_xor_sync(0xffffffff, sums[i], step);
        }
        if (lane == 0 && row + i < p.rows) {
          const float bias = p.bias == nullptr ? 0.0f : to_float(p.bias[output]);
          from_float(p.scales[output] * sums[i] + bias, p.y[(row + i) * p.outputs + output]);
        }
      }
    }
  }
}

}  // namespace

int linear_int8_fwd(const LinearInt8Params& p, void* stream) {
  if (p.rows * p.outputs == 0) {
    return cudaSuccess;
  }
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(ceil_div<int64_t>(p.outputs, kWarps), INT32_MAX)));
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const LinearTensors<T> tensors{static_cast<const T*>(p.x),
                                   p.weight,
                                   static_cast<const float*>(p.scales),
                                   static_cast<const T*>(p.bias),
                                   static_cast<T*>(p.y),
                                   p.rows,
                                   p.inputs,
                                   p.outputs};
    const bool vectors = p.inputs % 16 == 0 && aligned_16(p.x) && aligned_16(p.weight);
    return vectors ? launch_early_if_possible<linear_int8<T, 16>>(grid, dim3(kThreads), 0, stream, tensors)
                   : launch_early_if_possible<linear_int8<T, 1>>(grid, dim3(kThreads), 0, stream, tensors);
  });
}

}  // namespace alexnet_fast::cuda
