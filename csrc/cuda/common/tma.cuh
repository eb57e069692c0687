// Bulk tensor copies (TMA, sm_90): one thread asks, the card moves a box of a tensor between global and shared memory.
//
// A tensor map says how the tensor lies in memory and what a box is. It is made on the host and given to a kernel as
// part of a __grid_constant__ parameter. Axes come fastest first. Boxes lie in shared memory line by line, a line of
// the fastest axis being at most 128 bytes; with the 128-byte swizzle the 16-byte chunk c of the line at shared address
// a is at chunk c ^ (a / 128 % 8), so a box begins at a multiple of 1024. Without swizzle it begins at one of 128.
//
//   tiled    a box of fixed extent anywhere; elements outside of the tensor are zeros, and are not stored
//   im2col   of (channels, width, height, images): a number of successive pixels, from a first one on. They walk
//            through the rows of a rectangle in every image, whose corners are given relative to the image's, and each
//            pixel is moved by the kernel's offset (s, r) before it is read. Pixels outside of the image are zeros.
//
// Elements are copied as they are, but float32 in a map for `Elements::tf32`: of these a load brings the nearest number
// with ten bits of mantissa, as a product by TF32 wants them.
//
// A load is complete when the barrier's phase ends; the phase counts the bytes of the whole box, also of pixels that
// are zeros. A store has read shared memory when bulk_wait_read() returns. A thread that wrote what a bulk store or a
// wgmma reads passes async_proxy_fence() first, and then a barrier before the thread that issues the store or product.
#pragma once

#include "cuda/common/mbarrier.cuh"

#ifndef ALEXNET_FAST_HOST_SIMT
#include <cuda.h>
#endif

namespace alexnet_fast::cuda {

#ifndef ALEXNET_FAST_HOST_SIMT

enum class Elements { bits16, bits32, tf32 };  // of a tensor map

using TensorMap = CUtensorMap;
#define ALEXNET_FAST_GRID_CONSTANT __grid_constant__

// ---------------------------------------------------------------- on the host

// The driver's entry as cudart hands it out: the library links no libcuda, which builders do not have.
template <class Function>
int driver_entry(const char* name, Function& out) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result != cudaDriverEntryPointSuccess) {
    return cudaErrorNotSupported;
  }
  out = reinterpret_cast<Function>(found);
  return error;
}

enum class Swizzle { none, bytes_128 };

namespace detail {

constexpr CUtensorMapDataType kElements[] = {CU_TENSOR_MAP_DATA_TYPE_UINT16, CU_TENSOR_MAP_DATA_TYPE_UINT32,
                                             CU_TENSOR_MAP_DATA_TYPE_TFLOAT32};
constexpr CUtensorMapInterleave kInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
constexpr CUtensorMapSwizzle kSwizzle = CU_TENSOR_MAP_SWIZZLE_128B;
constexpr CUtensorMapL2promotion kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
constexpr CUtensorMapFloatOOBfill kFill = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;

}  // namespace detail

// Extents of the axes, bytes between neighbours along all but the first, and the box's extents.
template <int kRank, Swizzle kSwizzle = Swizzle::bytes_128>
int encode_tiled(TensorMap& map, Elements elements, const void* tensor, const uint64_t (&extents)[kRank],
                 const uint64_t (&strides)[kRank - 1], const uint32_t (&box)[kRank]) {
  static decltype(&cuTensorMapEncodeTiled) encode = nullptr;
  static const int found = driver_entry("cuTensorMapEncodeTiled", encode);
  if (found != cudaSuccess) {
    return found;
  }
  constexpr uint32_t kSteps[] = {1, 1, 1, 1, 1};
  constexpr CUtensorMapSwizzle kOfBox = kSwizzle == Swizzle::none ? CU_TENSOR_MAP_SWIZZLE_NONE : detail::kSwizzle;
  const CUresult result = encode(&map, detail::kElements[int(elements)], kRank, const_cast<void*>(tensor), extents,
                                 strides, box, kSteps, detail::kInterleave, kOfBox, detail::kPromotion, detail::kFill);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Elements of (channels, width, height, images); corners are (w, h); a box has `channels` x `pixels`.
inline int encode_im2col(TensorMap& map, Elements elements, const void* tensor, const uint64_t (&extents)[4],
                         const uint64_t (&strides)[3], const int32_t (&lower)[2], const int32_t (&upper)[2],
                         uint32_t channels, uint32_t pixels) {
  static decltype(&cuTensorMapEncodeIm2col) encode = nullptr;
  static const int found = driver_entry("cuTensorMapEncodeIm2col", encode);
  if (found != cudaSuccess) {
    return found;
  }
  constexpr uint32_t kSteps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, detail::kElements[int(elements)], 4, const_cast<void*>(tensor), extents, strides, lower, upper,
             channels, pixels, kSteps, detail::kInterleave, detail::kSwizzle, detail::kPromotion, detail::kFill);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// ---------------------------------------------------------------- in kernels

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The pixels from (n, h, w) on, coordinates in the image before the kernel's offset, channels c and on.
__device__ __forceinline__ void bulk_load_im2col(void* to, const TensorMap& map, Mbarrier* barrier, int32_t c,
                                                 int32_t w, int32_t h, int32_t n, uint16_t s, uint16_t r) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8};" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(c), "r"(w), "r"(h), "r"(n), "h"(s), "h"(r)
      : "memory");
}

__device__ __forceinline__ void bulk_load(void* to, const TensorMap& map, Mbarrier* barrier, const int32_t (&at)[4]) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
      : "memory");
}

__device__ __forceinline__ void bulk_load(void* to, const TensorMap& map, Mbarrier* barrier, const int32_t (&at)[5]) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, "
      "%7}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]), "r"(at[4])
      : "memory");
}

// A box into L2, and no further: it may be asked for before dependency_wait(), for what is written later is seen.
__device__ __forceinline__ void bulk_prefetch(const TensorMap& map, const int32_t (&at)[4]) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(at[0]),
               "r"(at[1]), "r"(at[2]), "r"(at[3])
               : "memory");
}

__device__ __forceinline__ void bulk_store(const TensorMap& map, const void* from, const int32_t (&at)[3]) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(at[0]), "r"(at[1]), "r"(at[2])
               : "memory");
}

// Ends the group of stores that this thread has issued since the last call.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the newest `kInFlight` groups of this thread have read shared memory.
template <int kInFlight>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kInFlight) : "memory");
}

__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#else

using ::host_simt::Elements;
using TensorMap = ::host_simt::TensorMap;
#define ALEXNET_FAST_GRID_CONSTANT

using ::host_simt::async_proxy_fence;
using ::host_simt::bulk_commit;
using ::host_simt::bulk_load;
using ::host_simt::bulk_load_im2col;
using ::host_simt::bulk_store;
using ::host_simt::bulk_wait_read;
using ::host_simt::encode_im2col;
using ::host_simt::encode_tiled;
using ::host_simt::Swizzle;
inline void prefetch_map(const TensorMap&) {}
inline void bulk_prefetch(const TensorMap&, const int32_t (&)[4]) {}

#endif

}  // namespace alexnet_fast::cuda
