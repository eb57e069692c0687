// cp.async: from global to shared memory past the registers, several groups of copies in flight.
#pragma once

#include "cuda/common/launch.cuh"

namespace alexnet_fast::cuda {

// Copies the first `valid` of kBytes bytes and sets the others to zero; nothing is read at `from` if valid is 0. Both
// addresses must be multiples of kBytes. The bytes may be read after async_wait(), by other threads after a barrier
// too.
template <int kBytes>
__device__ __forceinline__ void async_copy(void* to, const void* from, int valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#ifndef ALEXNET_FAST_HOST_SIMT
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {  // .cg: through L2 alone
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(valid)
                 : "memory");
  }
#else
  host_simt::copy_async(to, from, valid, kBytes);
#endif
}

// Ends the group of copies that this thread has issued since the last call; it may be empty.
__device__ __forceinline__ void async_commit() {
#ifndef ALEXNET_FAST_HOST_SIMT
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host_simt::commit_copies();
#endif
}

// Waits until at most the newest `kInFlight` groups of this thread are on their way.
template <int kInFlight>
__device__ __forceinline__ void async_wait() {
#ifndef ALEXNET_FAST_HOST_SIMT
  asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
#else
  host_simt::wait_copies(kInFlight);
#endif
}

}  // namespace alexnet_fast::cuda
