// Where a forward kernel's input comes from: a tensor as it is, or the ReLU of a raw convolution output plus bias.
#pragma once

#include "cuda/common/math.cuh"
#include "cuda/common/vector.cuh"

namespace alexnet_fast::cuda {

// max(0, z + bias), rounded to T.
template <class T, int N>
__device__ __forceinline__ Pack<T, N> add_relu(const Pack<T, N>& z, const Pack<T, N>& bias) {
  Pack<T, N> result;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.words[i] = __float_as_uint(rectified(element(z, i) + element(bias, i)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(result.words) / sizeof(result.words[0])); ++i) {
      using Word = typename Pack<T, N>::Word;
      result.words[i] = static_cast<Word>(add_relu_pair<T>(z.words[i], bias.words[i]));
    }
  }
  return result;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> splat(T value) {
  Pack<T, N> result;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      result.words[i] = __float_as_uint(value);
    }
  } else {
#pragma unroll
    for (auto& word : result.words) {
      word = static_cast<typename Pack<T, N>::Word>(value.bits * 0x10001u);
    }
  }
  return result;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, 1> first(const Pack<T, N>& pack) {
  return {{static_cast<typename Pack<T, 1>::Word>(pack.words[0])}};
}

// A Source reads N neighbours in memory at an offset or a place: source.local<N>(channel).at(offset). What depends on
// the channel alone is read by local(), once however many offsets follow. over(copy) reads a copy of the tensor, or of
// a part of it, tensor() is where the tensor begins, and kept() where keep() writes, or null.
template <class T>
struct Plain {
  static constexpr bool kRectified = false;
  const T* x;

  template <int N>
  struct Local {
    const T* x;
    __device__ __forceinline__ Pack<T, N> at(const T* here) const { return load<N>(here); }
    __device__ __forceinline__ Pack<T, N> at(int64_t offset) const { return at(x + offset); }
  };

  template <int N>
  __device__ __forceinline__ Local<N> local(int32_t /*channel*/) const {
    return {x};
  }

  template <int N>
  __device__ __forceinline__ void keep(int64_t /*offset*/, const Pack<T, N>& /*value*/) const {}

  __host__ __device__ __forceinline__ const T* tensor() const { return x; }
  __host__ __device__ __forceinline__ T* kept() const { return nullptr; }
  __device__ __forceinline__ Plain over(const T* copy) const { return {copy}; }
};

// N neighbours in memory are N channels with kChannelsLast, else N pixels of one channel.
template <class T, bool kChannelsLast>
struct Rectified {
  static constexpr bool kRectified = true;  // no element is negative, nor -0; NaN is 0x7fff
  const T* z;
  const T* bias;  // or null
  T* r;           // or null: where the ReLU's output is kept

  template <int N>
  struct Local {
    const T* z;
    Pack<T, N> bias;
    __device__ __forceinline__ Pack<T, N> at(const T* here) const { return add_relu(load<N>(here), bias); }
    __device__ __forceinline__ Pack<T, N> at(int64_t offset) const { return at(z + offset); }
  };

  template <int N>
  __device__ __forceinline__ Local<N> local(int32_t channel) const {
    if (bias == nullptr) {
      return {z, Pack<T, N>{}};
    }
    if constexpr (kChannelsLast) {
      return {z, load<N>(bias + channel)};
    } else {
      return {z, splat<T, N>(bias[channel])};
    }
  }

  template <int N>
  __device__ __forceinline__ void keep(int64_t offset, const Pack<T, N>& value) const {
    if (r != nullptr) {
      store(r + offset, value);
    }
  }

  __host__ __device__ __forceinline__ const T* tensor() const { return z; }
  __host__ __device__ __forceinline__ T* kept() const { return r; }
  __device__ __forceinline__ Rectified over(const T* copy) const { return {copy, bias, r}; }
};

}  // namespace alexnet_fast::cuda
