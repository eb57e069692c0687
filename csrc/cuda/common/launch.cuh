// The one place where a kernel is launched, and the words of CUDA that differ between nvcc and the host build.
//
// nvcc compiles kernels for the card. With ALEXNET_FAST_HOST_SIMT the same sources are plain C++, and host_simt runs
// their threads as fibers on a CPU. Nothing outside csrc/cuda/common/ knows which of the two it is.
#pragma once

#ifdef ALEXNET_FAST_HOST_SIMT

#include "host_simt/hopper.h"

#else

#include <cuda_runtime.h>

// A __shared__ variable, aligned for 16-byte accesses: ALEXNET_FAST_SHARED(float[32][33], tile).
#define ALEXNET_FAST_SHARED(type, name) __shared__ __align__(16)::alexnet_fast::cuda::Same<type> name

#endif

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

namespace alexnet_fast::cuda {

template <class T>
using Same = T;

#ifndef ALEXNET_FAST_HOST_SIMT

// The block's dynamic shared memory, aligned for 128-byte swizzles.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char alexnet_fast_dynamic_shared[];
  return alexnet_fast_dynamic_shared;
}

#else

using ::host_simt::dynamic_shared;

#endif

// The same from its first multiple of kBytes on; the launch asks for so many bytes more.
template <int kBytes>
__device__ __forceinline__ unsigned char* dynamic_shared_at() {
  unsigned char* const begin = dynamic_shared();
#ifndef ALEXNET_FAST_HOST_SIMT
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(begin));
#else
  const uint32_t address = host_simt::shared_address(begin);
#endif
  return begin + (-address & (kBytes - 1));
}

// Lets `kernel` have that much dynamic shared memory on the current device. Nothing need be asked for up to 48 KB of
// static and dynamic memory together. Attributes are read once for each kernel and device, and what was allowed is
// never lowered, because another thread may be about to launch with more.
template <auto kernel>
int allow_shared(size_t dynamic_bytes) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (dynamic_bytes == 0) {  // nvcc refuses kernels with more of static memory alone
    return cudaSuccess;
  }
  struct Known {
    size_t static_bytes, allowed;
  };
  static std::mutex mutex;
  static std::map<int, Known> devices;
  int device;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  auto known = devices.find(device);
  if (known == devices.end()) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel); error != cudaSuccess) {
      return error;
    }
    known = devices.insert({device, {attributes.sharedSizeBytes, 0}}).first;
  }
  auto& [static_bytes, allowed] = known->second;
  if (static_bytes + dynamic_bytes > kWithoutAsking && dynamic_bytes > allowed) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic_bytes));
    if (error != cudaSuccess) {
      return error;
    }
    allowed = dynamic_bytes;
  }
  return cudaSuccess;
}

#ifndef ALEXNET_FAST_HOST_SIMT

// Enqueues kernel<<<grid, block, shared_bytes, stream>>>(args...) and returns the cudaError_t as int.
// `kernel` is a template argument so that the host build can name the very instantiation in its reports; kOnly is the
// architecture that it is for, or 0 for all.
template <int kOnly, auto kernel, class... Args>
int launch_on(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  if (const int error = allow_shared<kernel>(shared_bytes)) {
    return error;
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}

#else

// A CPU learns of a kernel's __shared__ variables by running it, so what they ask for is looked at afterwards.
template <int kOnly, auto kernel, class... Args>
int launch_on(dim3 grid, dim3 block, size_t shared_bytes, void* /*stream*/, const Args&... args) {
  int error = host_simt::launch_on<kOnly, kernel>(grid, block, shared_bytes, args...);
  if (error == cudaSuccess) {
    error = allow_shared<kernel>(shared_bytes);
  }
  host_simt::expect_allowed<kernel>(block, shared_bytes, kOnly);
  return error;
}

#endif

template <auto kernel, class... Args>
int launch(dim3 grid, dim3 block, size_t shared_bytes, void* stream, const Args&... args) {
  return launch_on<0, kernel>(grid, block, shared_bytes, stream, args...);
}

// The current device's multiprocessors, if it is of compute capability 9.0: code for sm_90a runs on no other.
inline int hopper_multiprocessors(int& count) {
  int device, major, minor;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return error;
  }
  const std::pair<cudaDeviceAttr, int*> wanted[] = {{cudaDevAttrComputeCapabilityMajor, &major},
                                                    {cudaDevAttrComputeCapabilityMinor, &minor},
                                                    {cudaDevAttrMultiProcessorCount, &count}};
  for (const auto& [attribute, value] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) {
      return error;
    }
  }
  return major == 9 && minor == 0 ? cudaSuccess : cudaErrorNotSupported;
}

template <class Int>
__host__ __device__ constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace alexnet_fast::cuda
