// Instructions that CUDA C++ has no name for, or none without its 16-bit headers.
#pragma once

#include "cuda/common/dtype.cuh"

namespace alexnet_fast::cuda {

#ifndef ALEXNET_FAST_HOST_SIMT

// sqrt and 1 / sqrt within 2^-23 and 2^-22.9 of the result, about 2 ulp, for arguments that are not subnormal.
__device__ __forceinline__ float approximate_root(float value) {
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ float approximate_reciprocal_root(float value) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

__device__ __forceinline__ double reciprocal_root(double value) { return rsqrt(value); }

// max(0, value); NaN stays one. A comparison and a selection are two instructions.
__device__ __forceinline__ float rectified(float value) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(value), "f"(0.0f));
  return result;
}

// max(0, a + b) of two pairs, each sum rounded once; NaN stays.
template <class T>
__device__ __forceinline__ uint32_t add_relu_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, f16>) {
    asm("fma.rn.relu.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x3c003c00), "r"(b));
  } else {
    asm("fma.rn.relu.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x3f803f80), "r"(b));
  }
  return result;
}

#else

inline float approximate_root(float value) { return host_simt::sqrt_approx_ftz(value); }
inline float approximate_reciprocal_root(float value) { return host_simt::rsqrt_approx_ftz(value); }
inline double reciprocal_root(double value) { return 1 / std::sqrt(value); }
inline float __log2f(float value) { return host_simt::lg2_approx(value); }
using host_simt::exp2f;
using host_simt::log2f;
using host_simt::rsqrtf;

inline float rectified(float value) { return value <= 0 ? 0.0f : value; }

// Rounding a sum to float32 and then to 16 bits could round twice. Rounded to odd, float32 keeps enough to tell.
inline float add_to_odd(float a, float b) {
  const double sum = static_cast<double>(a) + b;
  float kept = static_cast<float>(sum);
  if (std::isfinite(kept) && kept != sum) {
    if (std::fabs(static_cast<double>(kept)) > std::fabs(sum)) {
      kept = std::nextafterf(kept, 0);
    }
    kept = __uint_as_float(__float_as_uint(kept) | 1);
  }
  return kept;
}

template <class T>
inline uint32_t add_relu_pair(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float sum =
        add_to_odd(to_float(T{static_cast<uint16_t>(a >> shift)}), to_float(T{static_cast<uint16_t>(b >> shift)}));
    T kept;
    from_float(sum <= 0 ? 0.0f : sum, kept);
    result |= static_cast<uint32_t>(kept.bits) << shift;
  }
  return result;
}

#endif

}  // namespace alexnet_fast::cuda
