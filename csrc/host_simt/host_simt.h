// CUDA's execution model on a CPU: csrc/cuda/*.cu compile as plain C++ against this header and run in tests.
//
// The model, as the code below plays it:
//
//   grid    launch<kernel>(grid, block, ...) runs every block of the grid once, in a random order. Blocks share global
//           memory alone and may not rely on each other's order.
//   block   Its threads are fibers: each has a stack of its own and runs until it reaches a point where CUDA would let
//           another thread overtake it. Which one comes next is drawn from a seed. Every schedule is one that a card
//           could take.
//   warp    Thread 32 w + l is lane l of warp w. Shuffles, votes and matrix instructions are meetings: nobody leaves
//           before every lane of the mask has come.
//   barrier __syncthreads() is a meeting of the whole block. It must be reached by all threads, at the same line.
//   shared  ALEXNET_FAST_SHARED and dynamic_shared() name memory of the block. At its start they hold nothing that may
//   be read.
//
// A kernel's fault rarely shows in its result: most schedules forgive a missing barrier. So one build takes
// -fsanitize=thread, without the library of that name: the compiler then calls races.cpp before every load and store,
// and races.cpp remembers which thread wrote and read each byte since which barrier. It reports, with kernel, block,
// thread and line:
//
//   race           two threads met at a byte, one of them writing, with no barrier between
//   uninitialized  a read of shared memory, or of an output, that nobody wrote in this block or launch
//   out of bounds  an access outside the tensors and shared arrays the kernel was given
//   misaligned     a 2-, 4-, 8- or 16-byte access at an address that is no multiple of it
//   divergence     a barrier or warp meeting that some threads never reach, or reach at another line
//   launch         a grid, block, cluster, parameters or shared memory that a card refuses, by the table in limits.h:
//                  of one architecture, or of all. Registers are nvcc's business: tests/cuda/limits.py counts those
//   dependency     a kernel launched early, a block of which ends without dependency_wait(): see hopper.h
//
// The other build, with -fsanitize=address,undefined, finds what lies in the kernel's own arrays and arithmetic.
// Not modelled: time, caches, banks, more than one block at once, and the weak order of global memory between blocks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string_view>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------- words that mean nothing on a CPU

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

// ---------------------------------------------------------------- built-in types and variables

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// Those of the thread that runs: set anew at every switch.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

using cudaError_t = int;
constexpr int cudaSuccess = 0;
constexpr int cudaErrorInvalidValue = 1;
constexpr int cudaErrorNotSupported = 801;

namespace host_simt {

// A place in the kernel's source. As a default argument, here() is the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// ---------------------------------------------------------------- grid

struct Launch {
  std::string_view kernel;
  dim3 grid, block;
  size_t shared_bytes;
  size_t parameter_bytes;
  const std::function<void()>& thread;  // runs one thread of the kernel
  const void* address = nullptr;        // the kernel's
  dim3 cluster = 1;                     // its blocks run like any others, and see nothing of each other
  int only = 0;                         // the architecture that it is for, or 0
};

// A launch that a card refuses is a fault. So is one of no blocks.
int run(const Launch& launch);

// The architecture whose limits count for the launches that follow; 0: what each of the table takes. At first it is
// the one that the environment's HOST_SIMT_ARCHITECTURE names, or 0.
void set_architecture(int architecture);

// __PRETTY_FUNCTION__ holds "... [with auto kernel = name<arguments>; Args = ...]": the instantiation's full name.
constexpr std::string_view kernel_name(std::string_view function) {
  const size_t begin = function.find("kernel = ") + 9;
  return function.substr(begin, function.find_first_of(";]", begin) - begin);
}

// As they lie one after the other, each aligned as its type wants it.
template <class... Args>
constexpr size_t parameter_bytes() {
  size_t end = 0;
  ((end = (end + alignof(Args) - 1) / alignof(Args) * alignof(Args) + sizeof(Args)), ...);
  return end;
}

template <int kOnly, auto kernel, class... Args>
int launch_on(dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  return run({kernel_name(__PRETTY_FUNCTION__), grid, block, shared_bytes, parameter_bytes<Args...>(),
              [&] { kernel(args...); }, reinterpret_cast<const void*>(kernel), 1, kOnly});
}

template <auto kernel, class... Args>
int launch(dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  return launch_on<0, kernel>(grid, block, shared_bytes, args...);
}

// Faults unless the kernel's static memory, as far as its runs have shown it, fits together with dynamic_bytes into
// what a block has without asking, or into what was asked for (cudaFuncSetAttribute) and an architecture gives.
// only: the architecture that the kernel is for, or 0.
void expect_allowed(const void* address, std::string_view kernel, dim3 block, size_t dynamic_bytes, int only);

template <auto kernel>
void expect_allowed(dim3 block, size_t dynamic_bytes, int only = 0) {
  expect_allowed(reinterpret_cast<const void*>(kernel), kernel_name(__PRETTY_FUNCTION__), block, dynamic_bytes, only);
}

// Of the launches so far: a kernel whose threads never came to a __shared__ variable has not shown it.
size_t static_shared_bytes(const void* address);
void allow_dynamic(const void* address, size_t bytes);

// ---------------------------------------------------------------- shared memory

// The block's array of that declaration: the same bytes for all its threads.
void* shared_array(const void* declaration, const char* name, size_t bytes);

unsigned char* dynamic_shared();

template <class T>
using Same = T;

#define ALEXNET_FAST_SHARED(type, name)     \
  static const char name##_declaration = 0; \
  auto& name =                              \
      *static_cast<::host_simt::Same<type>*>(::host_simt::shared_array(&name##_declaration, #name, sizeof(type)))

// ---------------------------------------------------------------- meetings

enum class Meeting { syncwarp, shuffle, vote, matrix_load, matrix_store, matrix_multiply, products };

// Largest thing that one lane shows the others.
constexpr size_t kShownBytes = 32;
using Shown = unsigned char[kShownBytes];

// Waits for every lane of `mask` and returns what each of the warp's 32 lanes showed.
const Shown* meet(Meeting kind, uint32_t mask, const void* shown, size_t bytes, Site site);

enum class Combine { none, any, all, count };
int barrier(Combine combine, bool predicate, Site site);

// True while `lane` of the running thread's warp takes part in what `meet` last returned.
bool took_part(uint32_t mask, int lane);

template <class T>
T shuffle(uint32_t mask, T value, int lane, bool within, Site site) {
  static_assert(sizeof(T) <= kShownBytes && std::is_trivially_copyable_v<T>);
  const Shown* shown = meet(Meeting::shuffle, mask, &value, sizeof(T), site);
  if (within) {
    took_part(mask, lane);
    std::memcpy(&value, shown[lane], sizeof(T));
  }
  return value;
}

int lane();

// ---------------------------------------------------------------- cp.async

// Copies `bytes` (the rest up to `room` becomes zero) when the wait that covers the open group is reached, not before.
void copy_async(void* to, const void* from, size_t bytes, size_t room);
void commit_copies();
// Lands all but the newest `still_flying` groups of the calling thread.
void wait_copies(int still_flying);

// ---------------------------------------------------------------- matrix instructions

// D = A B + C for a 16 x 8 tile, as mma.sync.m16n8k{16,8} lays it over a warp: `a` holds 4 registers and `b` 2 of each
// lane.
enum class Element { f16, bf16, tf32 };
void multiply_16x8(Element element, const uint32_t (&a)[4], const uint32_t (&b)[2], float (&d)[4], Site site);

// Lane l gives the address of row l % 8 of matrix l / 8 (8 x 8 elements of 16 bits); each lane gets two neighbours of
// each matrix, with `transposed` of each transposed matrix.
void load_matrices(uint32_t* registers, int matrices, const void* row, bool transposed, Site site);
void store_matrices(const uint32_t* registers, int matrices, void* row, Site site);

// ---------------------------------------------------------------- 16-bit elements

float half_to_float(uint16_t bits);
uint16_t float_to_half(float value);

inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if (value != value) {
    return 0x7fff;  // the card's NaN
  }
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---------------------------------------------------------------- approximate instructions

// As approximate.cpp says: the card's NaN, zeros for subnormal numbers where there is ftz, and an error that is drawn.
// The seed is at first the environment's HOST_SIMT_APPROXIMATION, or 1. The schedule does not change it.
void set_approximation(uint64_t seed);
float sqrt_approx_ftz(float value);
float rsqrt_approx_ftz(float value);
float lg2_approx(float value);
float rsqrtf(float value);
float exp2f(float value);
float log2f(float value);

// ---------------------------------------------------------------- tensors and faults, for the program that runs the
// kernels

enum class Content { defined, undefined };

// Global memory of exactly `bytes` bytes at `offset` from a 256-byte boundary.
void* allocate(const char* name, size_t bytes, size_t offset, Content content);
void free_all();

// The order of blocks and threads of the launches that follow.
void set_seed(uint64_t seed);

// Of the launches that follow, runs no more than the last `count` blocks in x: for tensors too large to go through.
void run_last_blocks(unsigned count);

// Bytes of global memory that kernels asked for since the last call: what a block reads again counts once, as if L1
// held all that a block reads; writes go through and count each time. Zero unless built with -fsanitize=thread.
struct Traffic {
  int64_t read, written;
};
Traffic take_traffic();

// Prints the fault, what runs where, and ends the process with kFaultExit.
constexpr int kFaultExit = 70;
[[noreturn]] void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

// An instruction for global memory alone must not be given a shared address.
void expect_global(const void* address);

// A vector access that a compiler for CPUs may take apart says itself what it wants.
inline void expect_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail("misaligned", "%zu bytes at %p", bytes, address);
  }
}

}  // namespace host_simt

// ---------------------------------------------------------------- CUDA's names

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
// Of the architecture that counts, sm_90 if all do; of few multiprocessors, so that persistent blocks meet several
// tiles.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
template <class... Args>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Args...)) {
  attributes->sharedSizeBytes = host_simt::static_shared_bytes(reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}
template <class... Args>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute, int bytes) {
  host_simt::allow_dynamic(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

inline void __syncthreads(host_simt::Site site = host_simt::Site::here()) {
  host_simt::barrier(host_simt::Combine::none, false, site);
}
inline int __syncthreads_or(int predicate, host_simt::Site site = host_simt::Site::here()) {
  return host_simt::barrier(host_simt::Combine::any, predicate, site);
}
inline int __syncthreads_and(int predicate, host_simt::Site site = host_simt::Site::here()) {
  return host_simt::barrier(host_simt::Combine::all, predicate, site);
}
inline int __syncthreads_count(int predicate, host_simt::Site site = host_simt::Site::here()) {
  return host_simt::barrier(host_simt::Combine::count, predicate, site);
}

inline void __syncwarp(uint32_t mask = 0xffffffff, host_simt::Site site = host_simt::Site::here()) {
  host_simt::meet(host_simt::Meeting::syncwarp, mask, nullptr, 0, site);
}

// A shuffle whose source lies outside the segment of `width` lanes returns the lane's own value.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, host_simt::Site site = host_simt::Site::here()) {
  const int base = host_simt::lane() & ~(width - 1);
  return host_simt::shuffle(mask, value, base + (source & (width - 1)), true, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                 host_simt::Site site = host_simt::Site::here()) {
  const int lane = host_simt::lane(), source = lane - static_cast<int>(delta);
  return host_simt::shuffle(mask, value, source, source >= (lane & ~(width - 1)), site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32,
                   host_simt::Site site = host_simt::Site::here()) {
  const int lane = host_simt::lane(), source = lane + static_cast<int>(delta);
  return host_simt::shuffle(mask, value, source, source <= (lane | (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, host_simt::Site site = host_simt::Site::here()) {
  const int lane = host_simt::lane(), source = lane ^ bits;
  return host_simt::shuffle(mask, value, source, source <= (lane | (width - 1)), site);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, host_simt::Site site = host_simt::Site::here()) {
  const unsigned char mine = predicate != 0;
  const host_simt::Shown* shown = host_simt::meet(host_simt::Meeting::vote, mask, &mine, 1, site);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    votes |= static_cast<uint32_t>((mask >> lane & 1) && shown[lane][0]) << lane;
  }
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, host_simt::Site site = host_simt::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, host_simt::Site site = host_simt::Site::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}

// A fiber is never interrupted between two meetings, so a plain addition is atomic. The compiler's builtin tells the
// sanitizer build that it was meant so: atomics do not race with each other.
inline int atomicAdd(int* to, int value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* to, unsigned value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline unsigned atomicMax(unsigned* to, unsigned value) {
  unsigned old = __atomic_load_n(to, __ATOMIC_RELAXED);
  __atomic_store_n(to, std::max(old, value), __ATOMIC_RELAXED);
  return old;
}
inline float atomicAdd(float* to, float value) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(to);
  const uint32_t old = __atomic_load_n(bits, __ATOMIC_RELAXED);
  const float sum = __builtin_bit_cast(float, old) + value;
  __atomic_store_n(bits, __builtin_bit_cast(uint32_t, sum), __ATOMIC_RELAXED);
  return __builtin_bit_cast(float, old);
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

using std::max;
using std::min;

inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t __float_as_uint(float value) { return __builtin_bit_cast(uint32_t, value); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
