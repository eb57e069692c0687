// mbarrier (sm_90): a barrier in shared memory that waits for arrivals of threads and for bytes of bulk copies.
//
// A phase ends when as many arrivals have come as mbarrier_init() said and every byte that was expected has landed; the
// next phase then begins by itself. Phases are told apart by their number's lowest bit, so a waiting thread may be one
// phase behind and no more.
#pragma once

#include "cuda/common/launch.cuh"

namespace alexnet_fast::cuda {

using Mbarrier = uint64_t;

#ifndef ALEXNET_FAST_HOST_SIMT

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers that the calling thread has initialized visible to bulk copies. For other threads __syncthreads()
// is needed as well.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival, and so many bytes more to wait for in this phase. It comes before the copies are issued.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Waits until the phase of that parity has ended. Before the first phase ends, parity 1 counts as ended.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

#else

using ::host_simt::mbarrier_arrive;
using ::host_simt::mbarrier_expect;
using ::host_simt::mbarrier_init;
using ::host_simt::mbarrier_init_fence;
using ::host_simt::mbarrier_wait;
using ::host_simt::shared_address;

#endif

// A place in a ring of stages, and the parity of the phase that fills it.
template <int kStages>
struct RingPlace {
  uint32_t stage = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace alexnet_fast::cuda
