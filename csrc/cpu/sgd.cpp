// One step of SGD for one parameter. The formulas: params.h.
//
// torch's own kernels multiply and add in one rounding where the processor can, and so does this file: in float32 the
// results are theirs bit for bit.
#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

using V = Vector<float>;
constexpr int64_t kItem = 1 << 14;  // elements

// a * b + c. By name: compilers take a loop of __builtin_fmaf apart into lanes, and may or may not fuse a * b + c.
inline V multiply_add(float a, V b, V c) {
#if defined(__AVX512F__)
  return reinterpret_cast<V>(
      _mm512_fmadd_ps(_mm512_set1_ps(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<V>(
      _mm256_fmadd_ps(_mm256_set1_ps(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__ARM_FEATURE_FMA)
  for (int i = 0; i < kLanes<float>; ++i) c[i] = __builtin_fmaf(a, b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

}  // namespace

int64_t sgd_items(const SgdParams& p) { return ceil_div(p.count, kItem); }

void sgd(const SgdParams& params, int64_t begin, int64_t end) {
  const SgdParams p = params;  // a copy, which no store below can reach: else every element reads its numbers anew
  dispatch(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (sizeof(T) <= sizeof(float)) {
      const int64_t first = begin * kItem, count = min(p.count, end * kItem) - first;
      const T* const grad = static_cast<const T*>(p.grad) + first;
      float* const weight = p.weight + first;
      float* const velocity = p.velocity != nullptr ? p.velocity + first : nullptr;
      T* const copy = p.copy != nullptr ? static_cast<T*>(p.copy) + first : nullptr;
      for_each_vector<float>(count, [&](int64_t i, int64_t n) {
        V w = load(weight + i, n), g = load(grad + i, n);
        if (p.rule_2012) {
          V v = load(velocity + i, n) * p.momentum;
          v = multiply_add(-p.lr, g, multiply_add(-p.decayed_lr, w, v));
          store(velocity + i, v, n);
          w += v;
        } else {
          if (p.weight_decay != 0) g = multiply_add(p.weight_decay, w, g);
          if (p.momentum != 0) {
            const V v = p.first ? g : multiply_add(p.keep, g, load(velocity + i, n) * p.momentum);
            store(velocity + i, v, n);
            g = p.nesterov ? multiply_add(p.momentum, v, g) : v;
          }
          w = multiply_add(-p.lr, g, w);
        }
        store(weight + i, w, n);
        if (copy != nullptr) store(copy + i, w, n);
      });
    }
  });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
