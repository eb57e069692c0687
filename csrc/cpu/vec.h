// One register of accumulators, loads and stores of the four dtypes, scratch memory, and how work is cut into items.
//
// Kernels are compiled once per instruction set, so everything here has internal linkage: were a template instance
// shared between those object files, the linker would keep one copy, perhaps the AVX-512 one, for every processor.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "params.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

// ---- Vectors ---------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Float and double are their own accumulation types; both 16-bit types accumulate in float.
template <class T>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class T>
using Acc = typename Accumulation<T>::type;

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// Vector: kLanes accumulators. Ints: integers of the same width: bit patterns, pooling codes, and what comparing two
// vectors gives (all ones or all zeros a lane). Shorts, Bytes: as many narrower integers.
template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
};
template <>
struct Lanes<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Ints __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 4)));
  typedef uint8_t Bytes __attribute__((vector_size(kVectorBytes / 8)));
};
template <class A>
using Vector = typename Lanes<A>::Vector;
template <class A>
using Int = typename Lanes<A>::Int;
template <class A>
using Ints = typename Lanes<A>::Ints;
template <class A>
using Shorts = typename Lanes<A>::Shorts;
template <class A>
using Bytes = typename Lanes<A>::Bytes;
using Bits = uint32_t __attribute__((vector_size(kVectorBytes)));

template <class A>
inline Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // minus, as -0 + 0 is +0
}

inline Vector<float> sqrt(Vector<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
inline Vector<double> sqrt(Vector<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}

inline Vector<float> power(Vector<float> v, float exponent) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_powf(v[i], exponent);
  return v;
}
inline Vector<double> power(Vector<double> v, double exponent) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_pow(v[i], exponent);
  return v;
}

template <class A>
inline A sum(Vector<A> v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// ---- 16-bit floating point -------------------------------------------------------------------------------------

inline Bits bits_of(Vector<float> v) { return reinterpret_cast<Bits>(v); }
inline Vector<float> float_of(Bits bits) { return reinterpret_cast<Vector<float>>(bits); }

inline Bits widen(Shorts<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(v)));
#else
  return __builtin_convertvector(v, Bits);
#endif
}
inline Shorts<float> narrow(Bits v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Shorts<float>>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(v)));
#else
  return __builtin_convertvector(v, Shorts<float>);
#endif
}

inline Vector<float> decode(BFloat16, Shorts<float> v) { return float_of(widen(v) << 16); }

// Adding 0x7fff, and one more where the last kept bit is odd, rounds to nearest even; a NaN could overflow to infinity
// that way, so it keeps its upper bits, with the quiet bit set lest no mantissa bit remain.
inline Shorts<float> encode(BFloat16, Vector<float> v) {
  const Bits bits = bits_of(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow(v == v ? rounded : (bits >> 16) | 0x40u);
}

inline Vector<float> decode(Half, Shorts<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(v)));
#elif defined(__F16C__)
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  const Bits half = widen(v);
  const Bits sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  // Exponents differ in their bias by 127 - 15 = 112; infinity and NaN go from 31 to 255, 112 further.
  Bits bits = (magnitude << 13) + (112u << 23);
  bits = magnitude >= 0x7c00u ? bits + (112u << 23) : bits;
  const Vector<float> subnormal =
      __builtin_convertvector(reinterpret_cast<Ints<float>>(magnitude), Vector<float>) * 0x1p-24f;
  return float_of(sign | (magnitude < 0x400u ? bits_of(subnormal) : bits));
#endif
}

inline Shorts<float> encode(Half, Vector<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Shorts<float>>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Shorts<float>>(_mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  const Bits bits = bits_of(v);
  const Bits sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has its last mantissa bit at 2^-24, half's smallest step: the addition rounds.
  const Bits subnormal = bits_of(float_of(magnitude) + 0.5f) - (126u << 23);
  Bits half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;  // 65520 and up round to infinity
  half = magnitude > (255u << 23) ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return narrow(sign | half);
#endif
}

// ---- Loads and stores of kLanes elements, or of the first n of them -----------------------------------------------

inline Vector<float> load(const float* from) {
  Vector<float> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
inline Vector<double> load(const double* from) {
  Vector<double> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class T>
inline Vector<float> load(const T* from) {
  Shorts<float> v;
  std::memcpy(&v, from, sizeof(v));
  return decode(T{}, v);
}

inline void store(float* to, Vector<float> v) { std::memcpy(to, &v, sizeof(v)); }
inline void store(double* to, Vector<double> v) { std::memcpy(to, &v, sizeof(v)); }
template <class T>
inline void store(T* to, Vector<float> v) {
  const Shorts<float> encoded = encode(T{}, v);
  std::memcpy(to, &encoded, sizeof(encoded));
}

// Copies n < 2 * kStep elements in steps that halve: no call, and no loop over elements.
template <int kStep, class T>
inline void copy_few(T* to, const T* from, int64_t n) {
  if (n & kStep) {
    std::memcpy(to, from, kStep * sizeof(T));
    to += kStep;
    from += kStep;
  }
  if constexpr (kStep > 1) copy_few<kStep / 2>(to, from, n);
}

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
#endif

// Lanes from n on are zero; n >= 0.
template <class T>
inline Vector<Acc<T>> load(const T* from, int64_t n) {
  constexpr int lanes = kLanes<Acc<T>>;
  if (n >= lanes) return load(from);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(first_lanes(n), from));
  if constexpr (sizeof(T) == 2) {
    return decode(T{}, reinterpret_cast<Shorts<float>>(_mm256_maskz_loadu_epi16(first_lanes(n), from)));
  }
#endif
  T padded[lanes] = {};
  copy_few<lanes / 2>(padded, from, n);
  return load(padded);
}

template <class T>
inline void store(T* to, Vector<Acc<T>> v, int64_t n) {
  constexpr int lanes = kLanes<Acc<T>>;
  if (n >= lanes) return store(to, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, first_lanes(n), reinterpret_cast<__m512>(v));
  if constexpr (sizeof(T) == 2) {
    return _mm256_mask_storeu_epi16(to, first_lanes(n), reinterpret_cast<__m256i>(encode(T{}, v)));
  }
#endif
  T padded[lanes];
  store(padded, v);
  copy_few<lanes / 2>(to, padded, n);
}

// Calls f(offset, lanes) for each register's worth of `count` elements; the last may have fewer lanes than kLanes.
template <class A, class F>
inline void for_each_vector(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) f(i, kLanes<A>);
  if (i < count) f(i, count - i);
}

// Asks for the cache lines of `count` elements; any address will do.
template <class T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(from + i);
}

// Pooling codes in memory are bytes. Lanes from n on are zero; n >= 0.
template <class A>
inline Ints<A> load_codes(const uint8_t* from, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 lanes = n >= kLanes<A> ? 0xffff : first_lanes(n);
    return reinterpret_cast<Ints<A>>(_mm512_maskz_cvtepu8_epi32(0xffff, _mm_maskz_loadu_epi8(lanes, from)));
  }
#endif
  Bytes<A> bytes{};
  if (n >= kLanes<A>) {
    std::memcpy(&bytes, from, sizeof(bytes));
  } else {
    uint8_t padded[kLanes<A>] = {};
    copy_few<kLanes<A> / 2>(padded, from, n);
    std::memcpy(&bytes, padded, sizeof(bytes));
  }
  // In two steps, which compilers turn into two instructions; in one, GCC 12 moves every lane by itself.
  return __builtin_convertvector(__builtin_convertvector(bytes, Shorts<A>), Ints<A>);
}

template <class A>
inline void store_codes(uint8_t* to, Ints<A> codes, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 lanes = n >= kLanes<A> ? 0xffff : first_lanes(n);
    return _mm512_mask_cvtepi32_storeu_epi8(to, lanes, reinterpret_cast<__m512i>(codes));
  }
#endif
  const Bytes<A> bytes = __builtin_convertvector(__builtin_convertvector(codes, Shorts<A>), Bytes<A>);
  if (n >= kLanes<A>) {
    std::memcpy(to, &bytes, sizeof(bytes));
  } else {
    uint8_t padded[kLanes<A>];
    std::memcpy(padded, &bytes, sizeof(bytes));
    copy_few<kLanes<A> / 2>(to, padded, n);
  }
}

template <class A>
inline Ints<A> load_ints(const Int<A>* from) {
  Ints<A> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}
template <class A>
inline void store_ints(Int<A>* to, Ints<A> v) {
  std::memcpy(to, &v, sizeof(v));
}

// The elements of a and b at even places, and those at odd places.
template <class A>
struct Halves {
  Vector<A> even, odd;
};
template <class A>
inline Halves<A> deinterleave(Vector<A> a, Vector<A> b) {
  Ints<A> even{}, odd{};
  for (int i = 0; i < kLanes<A>; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd)};
}

// The other way: the elements of `even` and `odd` in turn, in two vectors.
template <class A>
struct Pair {
  Vector<A> first, second;
};
template <class A>
inline Pair<A> interleave(Vector<A> even, Vector<A> odd) {
  Ints<A> first{}, second{};
  for (int i = 0; i < kLanes<A>; ++i) {
    first[i] = i / 2 + i % 2 * kLanes<A>;
    second[i] = first[i] + kLanes<A> / 2;
  }
  return {__builtin_shuffle(even, odd, first), __builtin_shuffle(even, odd, second)};
}

// What storing as T and loading again would give.
template <class T>
inline Vector<Acc<T>> rounded(Vector<Acc<T>> v) {
  if constexpr (sizeof(T) == sizeof(Acc<T>)) {
    return v;
  } else {
    return decode(T{}, encode(T{}, v));
  }
}

// to[i] += v, and what rounding lost to lost[i] (Knuth's two-sum): a channel's gradient is a sum over all pixels, and
// one register lane adds them one by one.
template <class A>
inline void add_exactly(A* to, A* lost, Vector<A> v, int64_t n) {
  const Vector<A> before = load(to, n), after = before + v, taken = after - before;
  store(to, after, n);
  store(lost, load(lost, n) + ((before - (after - taken)) + (v - taken)), n);
}

// ---- Scratch memory ----------------------------------------------------------------------------------------------

// Uninitialized, aligned to a cache line, taken once per kernel call.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : count_(count),
        data_(static_cast<A*>(std::aligned_alloc(64, (static_cast<size_t>(count) * sizeof(A) + 64) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return data_; }
  void fill(A value) {
    for (int64_t i = 0; i < count_; ++i) data_[i] = value;
  }

 private:
  int64_t count_;
  A* data_;
};

// ---- Cutting work into items -------------------------------------------------------------------------------------

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t power_of_two(int64_t at_least) {
  int64_t power = 1;
  while (power < at_least) power *= 2;
  return power;
}
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// So few elements stay together where each is a few instructions on data at hand: pooling 256 planes of 13 x 13 pixels
// in NHWC takes 6 us in one thread, and waking another may take longer.
constexpr bool is_little(int64_t elements) { return elements <= 1 << 16; }
// And so few where each waits for memory, which two threads ask for twice as much at a time, or is many instructions:
// bias and ReLU of 384 planes of 13 x 13 pixels take 12 us in one thread and 5 in two, their gradient 26 and 8.
constexpr bool is_tiny(int64_t elements) { return elements <= 1 << 15; }

// Images of `length` units each, cut into items by shape alone: runs of whole images, or of one image's units.
// An item holds about 1/32 of all elements, but hardly fewer than 2^14 (waking a thread costs more) and hardly more
// than 2^17 (so that many processors share a large batch). Their number is even where it can be, or of two threads one
// would wait. `together`: all is one item.
struct Cut {
  int64_t images, length, images_per_item, pieces, items;

  Cut(int64_t images, int64_t length, int64_t unit_elements, bool together = false)
      : images(images), length(length), images_per_item(1), pieces(1), items(0) {
    const int64_t image_elements = length * unit_elements;
    if (images == 0 || image_elements == 0) return;
    const int64_t elements = images * image_elements;
    const int64_t item_elements = together ? elements : max(1 << 14, min(1 << 17, elements / 32));
    const auto even = [](int64_t count) { return count > 1 ? round_up(count, 2) : count; };
    pieces = max(1, min(length, even((image_elements + item_elements / 2) / item_elements)));
    images_per_item = min(images, max(1, item_elements / image_elements));
    images_per_item = ceil_div(images, even(ceil_div(images, images_per_item)));
    items = pieces * ceil_div(images, images_per_item);
  }

  // Calls f(item, image, first unit, past the last unit) for each image that items [begin, end) touch.
  template <class F>
  void for_each(int64_t begin, int64_t end, F f) const {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / pieces * images_per_item, piece = item % pieces;
      const int64_t past = min(images, first + images_per_item);
      for (int64_t image = first; image < past; ++image) {
        f(item, image, length * piece / pieces, length * (piece + 1) / pieces);
      }
    }
  }
};

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the element type T that `dtype` names.
template <class F>
inline void dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f(Type<float>{});
    case DType::f16:
      return f(Type<Half>{});
    case DType::bf16:
      return f(Type<BFloat16>{});
    case DType::f64:
      return f(Type<double>{});
  }
}

}  // namespace
}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
