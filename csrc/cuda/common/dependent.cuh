// Programmatic dependent launch (sm_90).
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

__device__ __forceinline__ void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// As launch_on().
template <int kOnly, auto kernel, class... Args>
int launch_early(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  static_assert(kOnly >= 90);
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

template <int kOnly, auto kernel, class... Args>
int launch_early(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  host_simt::next_is_early();
  return launch_on<kOnly, kernel>(grid, block, shared_bytes, stream, args...);
}

#endif

}  // namespace alexnet_fast::cuda
