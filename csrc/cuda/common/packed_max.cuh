// Maxima and comparisons of two 16-bit elements in a word, without conversions.
#pragma once

#include "cuda/common/dtype.cuh"

namespace alexnet_fast::cuda {

#ifndef ALEXNET_FAST_HOST_SIMT

// NaN (0x7fff) where either is NaN; +0 is more than -0.
template <class T>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, f16>) {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  }
  return result;
}

// Of outputs of a ReLU, whose bits are integers in order, NaN (0x7fff) above infinity: sm_90 has one instruction for
// three.
template <class T>
__device__ __forceinline__ uint32_t max_of_rectified(uint32_t a, uint32_t b, uint32_t c) {
#if __CUDA_ARCH__ >= 900
  return __vimax3_s16x2_relu(a, b, c);
#else
  return max_pair<T>(max_pair<T>(a, b), c);
#endif
}

// All ones in the halves that are equal as float16, else zeros: equal bits, or zeros of either sign, and never where
// one holds the bits of a float16's NaN. As good for bfloat16: these bits are 2^121 and more there (see
// unequal_to_itself).
__device__ __forceinline__ uint32_t equal_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("set.eq.u32.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Adds each value to its sum where its half of `codes` is that of `places`, by one comparison for both; first: to 0.
// Codes are small numbers, and as float16 subnormal ones, which compare as others do.
__device__ __forceinline__ void add_where_equal(bool first, uint32_t codes, uint32_t places, float value0, float value1,
                                                float& sum0, float& sum1) {
  if (first) {
    asm("{\n.reg .pred p, q;\nsetp.eq.f16x2 p|q, %2, %3;\nselp.f32 %0, %4, 0f00000000, p;\n"
        "selp.f32 %1, %5, 0f00000000, q;\n}"
        : "=f"(sum0), "=f"(sum1)
        : "r"(codes), "r"(places), "f"(value0), "f"(value1));
  } else {
    asm("{\n.reg .pred p, q;\nsetp.eq.f16x2 p|q, %2, %3;\n@p add.f32 %0, %0, %4;\n@q add.f32 %1, %1, %5;\n}"
        : "+f"(sum0), "+f"(sum1)
        : "r"(codes), "r"(places), "f"(value0), "f"(value1));
  }
}

// 0 where the half of x, an output of a ReLU, is 0, by one comparison for both. As good for bfloat16 (see equal_pair).
__device__ __forceinline__ void mask_pair(uint32_t x, float& value0, float& value1) {
  asm("{\n.reg .pred p, q;\nsetp.le.f16x2 p|q, %2, %3;\nselp.f32 %0, 0f00000000, %0, p;\n"
      "selp.f32 %1, 0f00000000, %1, q;\n}"
      : "+f"(value0), "+f"(value1)
      : "r"(x), "r"(0));
}

// The same number, but the compiler does not know: what is computed from it is not kept in registers from before.
__device__ __forceinline__ uint32_t anew(uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Of a place in global memory, which the compiler goes on to know.
template <class T>
__device__ __forceinline__ T* anew(T* at) {
  asm volatile("" : "+l"(at));
  __builtin_assume(__isGlobal(at));
  return at;
}

// Two halves in a word, by one instruction: of a shift and an OR the compiler makes one for each use.
__device__ __forceinline__ uint32_t pair_of(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x5410); }

// Bytes `first` and first + 1 of a word, each in a half.
__device__ __forceinline__ uint32_t two_bytes(uint32_t word, int first) {
  return __byte_perm(word, 0, 0x4140 + 0x101 * first);
}

// The lower bytes of four halves.
__device__ __forceinline__ uint32_t even_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x6420); }

#else

template <class T>
inline uint32_t max_pair(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t x = static_cast<uint16_t>(a >> shift), y = static_cast<uint16_t>(b >> shift);
    const float of_x = to_float(T{x}), of_y = to_float(T{y});
    uint16_t larger = of_x > of_y || (of_x == of_y && x < y) ? x : y;  // of two zeros the one without a sign
    if (of_x != of_x || of_y != of_y) {
      larger = 0x7fff;
    }
    result |= static_cast<uint32_t>(larger) << shift;
  }
  return result;
}

template <class T>
inline uint32_t max_of_rectified(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    int16_t larger = 0;
    for (const uint32_t pair : {a, b, c}) {
      larger = std::max(larger, static_cast<int16_t>(pair >> shift));
    }
    result |= static_cast<uint32_t>(larger) << shift;
  }
  return result;
}

inline uint32_t equal_pair(uint32_t a, uint32_t b) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const float x = to_float(f16{static_cast<uint16_t>(a >> shift)});
    const float y = to_float(f16{static_cast<uint16_t>(b >> shift)});
    result |= x == y ? 0xffffu << shift : 0;
  }
  return result;
}

inline void add_where_equal(bool first, uint32_t codes, uint32_t places, float value0, float value1, float& sum0,
                            float& sum1) {
  const uint32_t equal = equal_pair(codes, places);
  const float before0 = first ? 0 : sum0, before1 = first ? 0 : sum1;
  sum0 = equal & 0xffff ? before0 + value0 : before0;
  sum1 = equal >> 16 ? before1 + value1 : before1;
}

inline void mask_pair(uint32_t x, float& value0, float& value1) {
  value0 = to_float(f16{static_cast<uint16_t>(x)}) <= 0 ? 0 : value0;
  value1 = to_float(f16{static_cast<uint16_t>(x >> 16)}) <= 0 ? 0 : value1;
}

template <class T>
T anew(T number) {
  return number;
}

inline uint32_t pair_of(uint32_t low, uint32_t high) { return low | high << 16; }

inline uint32_t two_bytes(uint32_t word, int first) {
  return (word >> 8 * first & 0xff) | (word >> 8 * (first + 1) & 0xff) << 16;
}

inline uint32_t even_bytes(uint32_t a, uint32_t b) {
  return (a & 0xff) | (a >> 16 & 0xff) << 8 | (b & 0xff) << 16 | (b >> 16 & 0xff) << 24;
}

#endif

// One bit or more for a pair of which a half is never equal_pair to anything.
__device__ __forceinline__ uint32_t unequal_to_itself(uint32_t pair) {
  return ((pair & 0x7fff7fff) + 0x03ff03ff) & 0x80008000;  // beyond 0x7c00, float16's infinity
}

// One bit or more for a pair of which a half is 0 or -0.
__device__ __forceinline__ uint32_t zero_in(uint32_t pair) { return ~((pair & 0x7fff7fff) + 0x7fff7fff) & 0x80008000; }

// The bits of `yes` where the mask has ones, else those of `no`.
__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t yes, uint32_t no) {
  return (mask & yes) | (~mask & no);
}

}  // namespace alexnet_fast::cuda
