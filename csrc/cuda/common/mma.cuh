// Tensor-core tiles of one warp: D = A B + D with A of 16 rows, B of 8 columns, D in float32.
//
// Lane 4 g + t holds (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   d[0], d[1]   row g, columns 2 t and 2 t + 1;  d[2], d[3]   row g + 8, the same columns
//   16-bit types, depth 16, two neighbours in depth a register:
//     a[0], a[1]   rows g, g + 8, depth 2 t and 2 t + 1;   a[2], a[3]   the same rows, depth 2 t + 8 and 2 t + 9
//     b[0], b[1]   column g, depth 2 t and 2 t + 1; 2 t + 8 and 2 t + 9
//   TF32, depth 8:
//     a[0], a[1]   rows g, g + 8, depth t;   a[2], a[3]   the same rows, depth t + 4;   b[0], b[1]   column g, depth t;
//     t + 4
#pragma once

#include "cuda/common/dtype.cuh"

namespace alexnet_fast::cuda {

// Elements of depth that one mma() takes.
template <class T>
constexpr int kMmaDepth = 32 / sizeof(T);
static_assert(kMmaDepth<f16> == 16 && kMmaDepth<float> == 8);

#ifndef ALEXNET_FAST_HOST_SIMT

// Reads kMatrices (1, 2, 4) matrices of 8 x 8 16-bit elements from shared memory: lane 8 m + i gives the address of row
// i of matrix m, a multiple of 16 bytes. Lane 4 g + t gets elements 2 t and 2 t + 1 of row g (kTransposed: of column
// g).
template <bool kTransposed = false, int kMatrices>
__device__ __forceinline__ void load_matrix(uint32_t (&registers)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  uint32_t (&r)[kMatrices] = registers;
  if constexpr (kMatrices == 4 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  }
}

// Writes four such matrices of 16-bit elements, for compute capability 9.0: lane 8 m + i gives the address of row i of
// matrix m, a multiple of 16 bytes. Of lane 4 g + t come elements 2 t and 2 t + 1 of row g.
__device__ __forceinline__ void store_matrix(const uint32_t (&registers)[4], void* row) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(row))),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
}

// T names the element type: f16, bf16, or float for TF32 (whose lower 13 bits the tensor core ignores: see tf32()).
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, f16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, float>);
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The nearest TF32 number (10 bits of mantissa), ties away from zero.
__device__ __forceinline__ uint32_t tf32(float value) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
}

#else

template <bool kTransposed = false, int kMatrices>
inline void load_matrix(uint32_t (&registers)[kMatrices], const void* row,
                        host_simt::Site site = host_simt::Site::here()) {
  host_simt::load_matrices(registers, kMatrices, row, kTransposed, site);
}

inline void store_matrix(const uint32_t (&registers)[4], void* row, host_simt::Site site = host_simt::Site::here()) {
  host_simt::store_matrices(registers, 4, row, site);
}

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                host_simt::Site site = host_simt::Site::here()) {
  constexpr host_simt::Element element = std::is_same_v<T, f16>    ? host_simt::Element::f16
                                         : std::is_same_v<T, bf16> ? host_simt::Element::bf16
                                                                   : host_simt::Element::tf32;
  host_simt::multiply_16x8(element, a, b, d, site);
}

inline uint32_t tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000 : bits;
}

#endif

}  // namespace alexnet_fast::cuda
