// Several neighbouring elements moved by one instruction, up to 16 bytes a thread: a warp then moves 512 bytes at once.
#pragma once

#include "cuda/common/dtype.cuh"

namespace alexnet_fast::cuda {

namespace detail {

template <int bytes>
struct Word {
  using Type = uint32_t;
};
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<1> {
  using Type = uint8_t;
};

}  // namespace detail

// N elements of T as they lie in memory. All bits zero is N zeros for every T.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  static constexpr int kBytes = N * sizeof(T);
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  using Word = typename detail::Word<kBytes>::Type;
  Word words[kBytes / sizeof(Word)];
};

// As many elements as 16 bytes hold.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
#ifdef ALEXNET_FAST_HOST_SIMT
  host_simt::expect_aligned(from, sizeof(Pack<T, N>));
#endif
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// The same by `kParts` instructions, from multiples of so much less.
template <int kParts, int N, class T>
__device__ __forceinline__ Pack<T, N> load_in(const T* from) {
  Pack<T, N> result;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const Pack<T, N / kParts> some = load<N / kParts>(from + part * (N / kParts));
    constexpr int kWords = sizeof(some.words) / sizeof(some.words[0]);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      result.words[part * kWords + i] = some.words[i];
    }
  }
  return result;
}

template <int N, class T>
__device__ __forceinline__ void store_shared(T* to, const Pack<T, N>& pack) {
#ifdef ALEXNET_FAST_HOST_SIMT
  host_simt::expect_aligned(to, sizeof(Pack<T, N>));
#endif
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// To global memory, which the launch does not read again: no "memory" is clobbered, so that loads may overtake it. The
// instruction is spelled out because nvcc 13.0 makes four stores of a Pack whose words it has in registers, as in a
// conditional store after a loop.
template <int N, class T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
#ifdef ALEXNET_FAST_HOST_SIMT
  host_simt::expect_global(to);
  store_shared(to, pack);
#else
  if constexpr (sizeof(pack) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(pack.words[0]), "r"(pack.words[1]),
                 "r"(pack.words[2]), "r"(pack.words[3]));
  } else {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  }
#endif
}

// store_shared of 16 bytes, spelled out as store() is: nvcc 13.0 makes four stores of it.
template <class T, int N>
__device__ __forceinline__ void store_shared_16(T* to, const Pack<T, N>& pack) {
  static_assert(sizeof(pack) == 16);
#ifdef ALEXNET_FAST_HOST_SIMT
  store_shared(to, pack);
#else
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "r"(pack.words[0]), "r"(pack.words[1]), "r"(pack.words[2]), "r"(pack.words[3])
               : "memory");
#endif
}

template <class T, int N>
__device__ __forceinline__ float element(const Pack<T, N>& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(pack.words[i]);
  } else if constexpr (N == 1) {
    return to_float(T{pack.words[0]});
  } else {
    return to_float(T{static_cast<uint16_t>(pack.words[i / 2] >> (16 * (i % 2)))});
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, 1> one_of(const Pack<T, N>& pack, int i) {
  if constexpr (sizeof(T) == 4) {
    return {{pack.words[i]}};
  } else {
    return {{static_cast<uint16_t>(pack.words[i / 2] >> (16 * (i % 2)))}};
  }
}

template <class T, int N>
__device__ __forceinline__ void unpack(const Pack<T, N>& pack, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    values[i] = element(pack, i);
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> pack(const float (&values)[N]) {
  Pack<T, N> result;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.words[i] = __float_as_uint(values[i]);
    }
  } else if constexpr (N == 1) {
    T kept;
    from_float(values[0], kept);
    result.words[0] = kept.bits;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      result.words[i / 2] = pack_pair<T>(values[i], values[i + 1]);
    }
  }
  return result;
}

template <class Pointer>
bool aligned_16(Pointer pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace alexnet_fast::cuda
