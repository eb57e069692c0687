// wgmma (sm_90a): products of a warpgroup, four warps in succession, with B in shared memory, and A there or in
// registers.
//
//   D (64 x N, float32, in registers) = A (64 x 16) B (16 x N) + D
//
// in depth 16 being 32 bytes of 16-bit elements. Of float32 it takes 8, as TF32: it cuts their lower 13 bits off (PTX
// ISA, "wgmma.mma_async"), so what should be rounded is before (tma.cuh).
//
// Lane 4 g + t of warp w holds of D the rows 16 w + g and + 8, and columns 8 j + 2 t and + 1: d[4 j + 2 h + e] is row
// 16 w + g + 8 h, column 8 j + 2 t + e, as mma.sync has it.
//
// Operands lie in shared memory with the 128-byte swizzle, as bulk copies write them (tma.cuh), in lines of 128 bytes:
//
//   Major::depth   a line is 64 elements (32 of float32) in depth of one row of A (or column of B); lines follow each
//                  other. The next 16 (8) in depth are 32 bytes on.
//   Major::pixels  of 16-bit elements alone: a line is 64 rows of A (or columns of B) at one place in depth; lines
//                  follow each other in depth, and the next 64 rows or columns are `leading` bytes on. The next 16 in
//                  depth are 2048 bytes on.
//
// Without swizzle (plain_descriptor) they lie in core matrices: 8 rows of A (or columns of B) by 8 elements in depth,
// 16 bytes each, 128 contiguous bytes. The second 8 in depth are `leading` bytes on, the next 8 rows or columns
// `stride`. Such an operand begins at any multiple of 16.
//
// A in registers: a[0] to a[3] of lane 4 g + t of warp w are rows 16 w + g and + 8 at 2 t and 2 t + 1 in depth, and the
// same rows at 2 t + 8 and 2 t + 9, as mma.sync has them.
//
// The product may read its operands, registers too, and read and write D's, at any moment between its issue and the
// wait for its group.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/mbarrier.cuh"

namespace alexnet_fast::cuda {

enum class Major { depth, pixels };

// Bits 0-13: address / 16; 16-29: bytes to the next 64 rows / 16; 32-45: bytes between groups of eight lines / 16;
// 62-63: 1, the 128-byte swizzle (PTX ISA, "Matrix Descriptor Format").
__device__ __forceinline__ uint64_t matrix_descriptor(const void* lines, uint32_t leading = 16) {
  return (shared_address(lines) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The same with 0 there: no swizzle.
__device__ __forceinline__ uint64_t plain_descriptor(const void* first, uint32_t leading, uint32_t stride) {
  return (shared_address(first) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32;
}

template <Major kMajor>
constexpr uint64_t kDepthStep = (kMajor == Major::depth ? 32 : 2048) >> 4;  // to be added to a descriptor

#ifndef ALEXNET_FAST_HOST_SIMT

// Before the first product, and before one that uses registers which something else has touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the newest `kInFlight` groups are on their way.
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// After the wait: what reads the sums from here on is not moved before it.
template <int kCount>
__device__ __forceinline__ void wgmma_done(float (&d)[kCount]) {
#pragma unroll
  for (float& sum : d) {
    asm volatile("" : "+f"(sum)::"memory");
  }
}

// Registers a thread from here on, for the calling warpgroup: what a block has at its start is handed out anew.
template <int kCount>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

namespace detail {

// clang-format off
#define ALEXNET_FAST_REGISTERS_28 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27"
#define ALEXNET_FAST_REGISTERS_32 ALEXNET_FAST_REGISTERS_28 ", %28, %29, %30, %31"
#define ALEXNET_FAST_REGISTERS_64 ALEXNET_FAST_REGISTERS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ALEXNET_FAST_REGISTERS_96 ALEXNET_FAST_REGISTERS_64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define ALEXNET_FAST_SUMS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define ALEXNET_FAST_SUMS_28 \
  ALEXNET_FAST_SUMS_8(0), ALEXNET_FAST_SUMS_8(8), ALEXNET_FAST_SUMS_8(16), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define ALEXNET_FAST_SUMS_32(i) \
  ALEXNET_FAST_SUMS_8(i), ALEXNET_FAST_SUMS_8(i + 8), ALEXNET_FAST_SUMS_8(i + 16), ALEXNET_FAST_SUMS_8(i + 24)
#define ALEXNET_FAST_SUMS_64 ALEXNET_FAST_SUMS_32(0), ALEXNET_FAST_SUMS_32(32)
#define ALEXNET_FAST_SUMS_96 ALEXNET_FAST_SUMS_64, ALEXNET_FAST_SUMS_32(64)

template <class T, int kN>
struct Wgmma;

// a, b, p, ta, tb: the numbers of the operands that follow the sums.
#define ALEXNET_FAST_WGMMA(type, name, n, registers, sums, a, b, p, ta, tb)                                             \
  template <>                                                                                                          \
  struct Wgmma<type, n> {                                                                                              \
    template <int kTurnA, int kTurnB>                                                                                  \
    static __device__ __forceinline__ void multiply(float (&d)[n / 2], uint64_t a_at, uint64_t b_at, int accumulate) { \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, "                         \
          a ", " b ", p, 1, 1, " ta ", " tb ";\n}"                                                                     \
          : sums                                                                                                       \
          : "l"(a_at), "l"(b_at), "r"(accumulate), "n"(kTurnA), "n"(kTurnB));                                          \
    }                                                                                                                  \
  }
ALEXNET_FAST_WGMMA(f16, "f16", 64, ALEXNET_FAST_REGISTERS_32, ALEXNET_FAST_SUMS_32(0), "%32", "%33", "%34", "%35", "%36");
ALEXNET_FAST_WGMMA(f16, "f16", 128, ALEXNET_FAST_REGISTERS_64, ALEXNET_FAST_SUMS_64, "%64", "%65", "%66", "%67", "%68");
ALEXNET_FAST_WGMMA(f16, "f16", 192, ALEXNET_FAST_REGISTERS_96, ALEXNET_FAST_SUMS_96, "%96", "%97", "%98", "%99", "%100");
ALEXNET_FAST_WGMMA(bf16, "bf16", 64, ALEXNET_FAST_REGISTERS_32, ALEXNET_FAST_SUMS_32(0), "%32", "%33", "%34", "%35", "%36");
ALEXNET_FAST_WGMMA(bf16, "bf16", 128, ALEXNET_FAST_REGISTERS_64, ALEXNET_FAST_SUMS_64, "%64", "%65", "%66", "%67", "%68");
ALEXNET_FAST_WGMMA(bf16, "bf16", 192, ALEXNET_FAST_REGISTERS_96, ALEXNET_FAST_SUMS_96, "%96", "%97", "%98", "%99", "%100");

// The same with A's registers; p, tb: as above.
template <class T, int kN>
struct WgmmaOfRegisters;
#define ALEXNET_FAST_WGMMA_OF_REGISTERS(type, name, n, registers, sums, a, b, p, tb)                                    \
  template <>                                                                                                          \
  struct WgmmaOfRegisters<type, n> {                                                                                   \
    static __device__ __forceinline__ void multiply(float (&d)[n / 2], const uint32_t (&of_a)[4], uint64_t b_at,       \
                                                    int accumulate) {                                                  \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, {" a "}, "                \
          b ", p, 1, 1, " tb ";\n}"                                                                                    \
          : sums                                                                                                       \
          : "r"(of_a[0]), "r"(of_a[1]), "r"(of_a[2]), "r"(of_a[3]), "l"(b_at), "r"(accumulate), "n"(0));               \
    }                                                                                                                  \
  }
ALEXNET_FAST_WGMMA_OF_REGISTERS(f16, "f16", 56, ALEXNET_FAST_REGISTERS_28, ALEXNET_FAST_SUMS_28, "%28, %29, %30, %31", "%32", "%33", "%34");
ALEXNET_FAST_WGMMA_OF_REGISTERS(f16, "f16", 64, ALEXNET_FAST_REGISTERS_32, ALEXNET_FAST_SUMS_32(0), "%32, %33, %34, %35", "%36", "%37", "%38");
ALEXNET_FAST_WGMMA_OF_REGISTERS(bf16, "bf16", 56, ALEXNET_FAST_REGISTERS_28, ALEXNET_FAST_SUMS_28, "%28, %29, %30, %31", "%32", "%33", "%34");
ALEXNET_FAST_WGMMA_OF_REGISTERS(bf16, "bf16", 64, ALEXNET_FAST_REGISTERS_32, ALEXNET_FAST_SUMS_32(0), "%32, %33, %34, %35", "%36", "%37", "%38");

#define ALEXNET_FAST_WGMMA_TF32(n, registers, sums, a, b, p)                                                            \
  template <>                                                                                                          \
  struct Wgmma<float, n> {                                                                                             \
    template <int kTurnA, int kTurnB>                                                                                  \
    static __device__ __forceinline__ void multiply(float (&d)[n / 2], uint64_t a_at, uint64_t b_at, int accumulate) { \
      static_assert(kTurnA == 0 && kTurnB == 0);                                                                       \
      asm volatile(                                                                                                    \
          "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\n"                                                               \
          "wgmma.mma_async.sync.aligned.m64n" #n "k8.f32.tf32.tf32 {" registers "}, " a ", " b ", p, 1, 1;\n}"         \
          : sums                                                                                                       \
          : "l"(a_at), "l"(b_at), "r"(accumulate));                                                                    \
    }                                                                                                                  \
  }
ALEXNET_FAST_WGMMA_TF32(64, ALEXNET_FAST_REGISTERS_32, ALEXNET_FAST_SUMS_32(0), "%32", "%33", "%34");
ALEXNET_FAST_WGMMA_TF32(128, ALEXNET_FAST_REGISTERS_64, ALEXNET_FAST_SUMS_64, "%64", "%65", "%66");
ALEXNET_FAST_WGMMA_TF32(192, ALEXNET_FAST_REGISTERS_96, ALEXNET_FAST_SUMS_96, "%96", "%97", "%98");
// clang-format on

}  // namespace detail

// T: f16, bf16, or float for TF32. Without `accumulate` D is A B.
template <class T, int kN, Major kA = Major::depth, Major kB = Major::depth>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  constexpr int kTurnA = kA == Major::pixels, kTurnB = kB == Major::pixels;
  detail::Wgmma<T, kN>::template multiply<kTurnA, kTurnB>(d, a, b, accumulate);
}

// With A in registers, and depth contiguous in B.
template <class T, int kN>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  detail::WgmmaOfRegisters<T, kN>::multiply(d, a, b, accumulate);
}

#else

using ::host_simt::wgmma_commit;
using ::host_simt::wgmma_fence;
using ::host_simt::wgmma_wait;

template <int kCount>
inline void wgmma_done(float (&)[kCount]) {}

template <int kCount>
inline void fewer_registers(host_simt::Site site = host_simt::Site::here()) {
  host_simt::set_registers(kCount, site);
}
template <int kCount>
inline void more_registers(host_simt::Site site = host_simt::Site::here()) {
  host_simt::set_registers(kCount, site);
}

template <class T, int kN, Major kA = Major::depth, Major kB = Major::depth>
inline void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, int accumulate,
                  host_simt::Site site = host_simt::Site::here()) {
  constexpr host_simt::Element element = std::is_same_v<T, f16>    ? host_simt::Element::f16
                                         : std::is_same_v<T, bf16> ? host_simt::Element::bf16
                                                                   : host_simt::Element::tf32;
  host_simt::wgmma(element, kN, a, kA == Major::pixels, b, kB == Major::pixels, d, accumulate != 0, site);
}

template <class T, int kN>
inline void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int accumulate,
                  host_simt::Site site = host_simt::Site::here()) {
  constexpr host_simt::Element element = std::is_same_v<T, f16> ? host_simt::Element::f16 : host_simt::Element::bf16;
  host_simt::wgmma(element, kN, a, b, d, accumulate != 0, site);
}

#endif

}  // namespace alexnet_fast::cuda
