// Programmatic dependent launch (sm_90 and later; elsewhere these words do nothing).
//
// A kernel that launch_early() enqueues may begin while the one before it on the stream still runs, whoever wrote that
// one: as soon as all of its blocks have ended or called launch_dependents(). So it may do no more than prepare itself
// before dependency_wait(), which returns when the kernel before is over and all that it wrote can be seen. Each thread
// that touches global memory waits, and in each block one at least.
//
// Dependents are let go after the own wait and not before: then no more than one kernel is in flight besides the one
// that waits, and kernels of others that read ahead of their wait what the one just before them does not write, such as
// weights, find it written.
#pragma once

#include "cuda/common/launch.cuh"

namespace alexnet_fast::cuda {

#ifndef ALEXNET_FAST_HOST_SIMT

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define ALEXNET_FAST_FROM_90(...)
#else
#define ALEXNET_FAST_FROM_90(...) asm volatile(__VA_ARGS__ : "memory")
#endif

__device__ __forceinline__ void dependency_wait() { ALEXNET_FAST_FROM_90("griddepcontrol.wait;" ::); }

__device__ __forceinline__ void launch_dependents() { ALEXNET_FAST_FROM_90("griddepcontrol.launch_dependents;" ::); }

// The 128 bytes of global memory around `at` into L2, and no further: what is written later is seen.
__device__ __forceinline__ void prefetch_line(const void* at) {
  ALEXNET_FAST_FROM_90("prefetch.global.L2 [%0];" ::"l"(at));
}

// As launch_on().
template <int kOnly, auto kernel, class... Args>
int launch_early(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  if (const int error = allow_shared<kernel>(shared_bytes)) {
    return error;
  }
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

#else

using ::host_simt::dependency_wait;
using ::host_simt::launch_dependents;
inline void prefetch_line(const void*) {}

template <int kOnly, auto kernel, class... Args>
int launch_early(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  host_simt::next_is_early();
  return launch_on<kOnly, kernel>(grid, block, shared_bytes, stream, args...);
}

#endif

// A kernel for all cards, early where they can.
template <auto kernel, class... Args>
int launch_early_if_possible(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  int device, major = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return error != cudaSuccess ? error
         : major < 9          ? launch<kernel>(grid, block, shared_bytes, stream, args...)
                              : launch_early<0, kernel>(grid, block, shared_bytes, stream, args...);
}

}  // namespace alexnet_fast::cuda
