// Element types as kernels see them: 16-bit types are storage, arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/common/launch.cuh"
#include "params.h"

namespace alexnet_fast::cuda {

struct f16 {
  uint16_t bits;
};

struct bf16 {
  uint16_t bits;
};

// ---------------------------------------------------------------- conversions, round to nearest even

__device__ __forceinline__ float to_float(float value) { return value; }

#ifndef ALEXNET_FAST_HOST_SIMT

__device__ __forceinline__ float to_float(f16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

// A bfloat16 is the upper half of a float32.
__device__ __forceinline__ float to_float(bf16 value) {
  return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

__device__ __forceinline__ void from_float(float value, float& out) { out = value; }

__device__ __forceinline__ void from_float(float value, f16& out) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}

__device__ __forceinline__ void from_float(float value, bf16& out) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
}

// Two neighbours in one instruction; `low` has the lower address.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack_pair<f16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <>
__device__ __forceinline__ uint32_t pack_pair<bf16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

#else

inline float to_float(f16 value) { return host_simt::half_to_float(value.bits); }
inline float to_float(bf16 value) { return host_simt::bfloat16_to_float(value.bits); }
inline void from_float(float value, float& out) { out = value; }
inline void from_float(float value, f16& out) { out.bits = host_simt::float_to_half(value); }
inline void from_float(float value, bf16& out) { out.bits = host_simt::float_to_bfloat16(value); }

template <class T>
inline uint32_t pack_pair(float low, float high) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

#endif

// The value that a T would keep of `value`, as a float.
template <class T>
__device__ __forceinline__ float rounded(float value) {
  T kept;
  from_float(value, kept);
  return to_float(kept);
}

// ---------------------------------------------------------------- one body for three dtypes

// Calls body(T{}) with the T of `dtype`, or refuses a dtype that no kernel takes.
template <class Body>
int with_dtype(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::f16:
      return body(f16{});
    case DType::bf16:
      return body(bf16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace alexnet_fast::cuda
