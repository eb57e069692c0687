// The one place where a kernel is launched, and the words of CUDA that differ between nvcc and the host build.
//
// nvcc compiles kernels for the card. With ALEXNET_FAST_HOST_SIMT the same sources are plain C++, and host_simt runs
// their threads as fibers on a CPU. Nothing outside csrc/cuda/common/ knows which of the two it is.
#pragma once

#ifdef ALEXNET_FAST_HOST_SIMT

#include "host_simt/host_simt.h"

#else

#include <cuda_runtime.h>

// A __shared__ variable, aligned for 16-byte accesses: ALEXNET_FAST_SHARED(float[32][33], tile).
#define ALEXNET_FAST_SHARED(type, name) __shared__ __align__(16)::alexnet_fast::cuda::Same<type> name

#endif

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace alexnet_fast::cuda {

template <class T>
using Same = T;

#ifndef ALEXNET_FAST_HOST_SIMT

// The block's dynamic shared memory, aligned for 128-byte swizzles.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char alexnet_fast_dynamic_shared[];
  return alexnet_fast_dynamic_shared;
}

// Enqueues kernel<<<grid, block, shared_bytes, stream>>>(args...) and returns the cudaError_t as int.
// `kernel` is a template argument so that the host build can name the very instantiation in its reports.
template <auto kernel, class... Args>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args... args) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

#else

using ::host_simt::dynamic_shared;
using ::host_simt::launch;

#endif

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace alexnet_fast::cuda
