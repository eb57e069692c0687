// A linear layer with int8 weights. The formula: alexnet_fast/ops/linear_int8.py.
//
// With few rows the time is that of reading the weights, a byte each: a pass over eight outputs at once turns each
// vector of them into floats and multiplies. With more rows, a few share each vector of weights.
#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kUnit = 8;  // outputs
#if defined(__AVX512F__)
constexpr int kRows = 4;  // 16 sums in 32 registers
#else
constexpr int kRows = 2;  // 8 sums in 16
#endif

// Weights as numbers. Lanes from n on are zero; n >= 0.
template <class A>
inline Vector<A> load_weights(const int8_t* from, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 lanes = n >= kLanes<A> ? 0xffff : first_lanes(n);
    const __m512i wide = _mm512_maskz_cvtepi8_epi32(0xffff, _mm_maskz_loadu_epi8(lanes, from));
    return reinterpret_cast<Vector<A>>(_mm512_maskz_cvtepi32_ps(0xffff, wide));
  }
#endif
  const Ints<A> bytes = load_codes<A>(reinterpret_cast<const uint8_t*>(from), n);
  return __builtin_convertvector((bytes ^ 128) - 128, Vector<A>);
}

// kOutputs outputs of kRowCount rows, from the given ones on. Of outputs that are not there the last one's weights are
// read in their place, and nothing is written.
template <class T, int kRowCount, int kOutputs>
void multiply(const LinearInt8Params& p, int64_t row, int64_t output) {
  using A = Acc<T>;
  const T* x[kRowCount];
  const int8_t* weight[kOutputs];
  for (int i = 0; i < kRowCount; ++i) x[i] = static_cast<const T*>(p.x) + (row + i) * p.inputs;
  for (int j = 0; j < kOutputs; ++j) weight[j] = p.weight + min(output + j, p.outputs - 1) * p.inputs;
  Vector<A> sums[kRowCount][kOutputs] = {};
  for_each_vector<A>(p.inputs, [&](int64_t c, int64_t n) {
    Vector<A> w[kOutputs];
    for (int j = 0; j < kOutputs; ++j) w[j] = load_weights<A>(weight[j] + c, n);
    for (int i = 0; i < kRowCount; ++i) {
      const Vector<A> v = load(x[i] + c, n);
      for (int j = 0; j < kOutputs; ++j) sums[i][j] += v * w[j];
    }
  });
  for (int j = 0; j < min(kOutputs, p.outputs - output); ++j) {
    const A scale = static_cast<const A*>(p.scales)[output + j];
    const A bias = p.bias == nullptr ? A{0} : load(static_cast<const T*>(p.bias) + output + j, 1)[0];
    for (int i = 0; i < kRowCount; ++i) {
      const Vector<A> y = broadcast<A>(scale * sum<A>(sums[i][j]) + bias);
      store(static_cast<T*>(p.y) + (row + i) * p.outputs + output + j, y, 1);
    }
  }
}

inline Cut cut(const LinearInt8Params& p) { return Cut(1, ceil_div(p.outputs, kUnit), kUnit * p.inputs); }

template <class T>
void run(const LinearInt8Params& p, int64_t begin, int64_t end) {
  cut(p).for_each(begin, end, [&](int64_t, int64_t, int64_t first, int64_t past) {
    for (int64_t output = kUnit * first; output < min(kUnit * past, p.outputs); output += kUnit) {
      int64_t row = 0;
      for (; row + kRows <= p.rows; row += kRows) {
        multiply<T, kRows, kUnit / 2>(p, row, output);
        if (output + kUnit / 2 < p.outputs) multiply<T, kRows, kUnit / 2>(p, row, output + kUnit / 2);
      }
      for (; row < p.rows; ++row) multiply<T, 1, kUnit>(p, row, output);
    }
  });
}

}  // namespace

int64_t linear_int8_fwd_items(const LinearInt8Params& p) { return cut(p).items; }

void linear_int8_fwd(const LinearInt8Params& p, int64_t begin, int64_t end) {
  dispatch(p.dtype, [&](auto type) { run<typename decltype(type)::type>(p, begin, end); });
}

}  // namespace alexnet_fast::cpu::ALEXNET_FAST_ISA
