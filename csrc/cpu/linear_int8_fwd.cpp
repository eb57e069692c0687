// A linear layer with int8 weights. The formula: alexnet_fast/ops/linear_int8.py.
//
// With few rows the time is that of reading the weights, a byte each: a pass over eight outputs at once turns each
// vector of them into floats and multiplies. With more rows, a few share each vector of weights. With many, a chunk of
// the weights becomes floats once for all of them, and stays in the first cache: two instructions a vector to convert,
// in the units that multiply, were half as many as the products of four rows. A row's sums are the same in all ways.
#include "cpu/vec.h"

namespace alexnet_fast::cpu::ALEXNET_FAST_ISA {
namespace {

constexpr int64_t kUnit = 8;  // outputs
#if defined(__AVX512F__)
constexpr int kRows = 4;               // 16 sums in 32 registers
constexpr int kShared = 3, kWide = 8;  // with weights in memory: 24 sums and 3 inputs
#else
constexpr int kRows = 2;  // 8 sums in 16
constexpr int kShared = 3, kWide = 4;
#endif
constexpr int64_t kMany = 8;     // rows from which on weights are converted once
constexpr int64_t kChunk = 512;  // inputs, of which eight outputs have 16 KB of weights

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

// Writes a row's outputs, `count` of them from the given one on, of which these are the sums.
template <class T>
void finish(const LinearInt8Params& p, int64_t row, int64_t output, int64_t count, const Vector<Acc<T>>* sums) {
  using A = Acc<T>;
  for (int64_t j = 0; j < count; ++j) {
    const A scale = static_cast<const A*>(p.scales)[output + j];
    const A bias = p.bias == nullptr ? A{0} : load(static_cast<const T*>(p.bias) + output + j, 1)[0];
    const Vector<A> y = broadcast<A>(scale * sum<A>(sums[j]) + bias);
    store(static_cast<T*>(p.y) + row * p.outputs + output + j, y, 1);
  }
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
  for (int i = 0; i < kRowCount; ++i) finish<T>(p, row + i, output, min(kOutputs, p.outputs - output), sums[i]);
}

// Adds kRowCount rows' products with kOutputs of a chunk's weights, `inputs` of them from the first one on, to sums. Of
// weights and sums a vector each lies beside those of the unit's other outputs.
template <class T, int kRowCount, int kOutputs>
void add_chunk(const T* x, int64_t stride, int64_t inputs, const Vector<Acc<T>>* weights, Vector<Acc<T>>* sums) {
  using A = Acc<T>;
  Vector<A> kept[kRowCount][kOutputs];
  for (int i = 0; i < kRowCount; ++i) {
    for (int j = 0; j < kOutputs; ++j) kept[i][j] = sums[i * kUnit + j];
  }
  for_each_vector<A>(inputs, [&](int64_t c, int64_t n) {
    Vector<A> v[kRowCount];
    for (int i = 0; i < kRowCount; ++i) v[i] = load(x + i * stride + c, n);
    for (int j = 0; j < kOutputs; ++j) {
      for (int i = 0; i < kRowCount; ++i) kept[i][j] += v[i] * weights[j];
    }
    weights += kUnit;
  });
  for (int i = 0; i < kRowCount; ++i) {
    for (int j = 0; j < kOutputs; ++j) sums[i * kUnit + j] = kept[i][j];
  }
}

// A unit's outputs of all rows. weights and sums: kChunk / kLanes<A> and p.rows times kUnit vectors.
template <class T>
void multiply_many(const LinearInt8Params& p, int64_t output, Vector<Acc<T>>* weights, Vector<Acc<T>>* sums) {
  using A = Acc<T>;
  for (int64_t i = 0; i < p.rows * kUnit; ++i) sums[i] = Vector<A>{};
  for (int64_t first = 0; first < p.inputs; first += kChunk) {
    const int64_t inputs = min(kChunk, p.inputs - first);
    for (int64_t j = 0; j < kUnit; ++j) {
      const int8_t* from = p.weight + min(output + j, p.outputs - 1) * p.inputs + first;
      for_each_vector<A>(
          inputs, [&](int64_t c, int64_t n) { weights[c / kLanes<A> * kUnit + j] = load_weights<A>(from + c, n); });
    }
    for (int64_t row = 0; row < p.rows; row += kShared) {
      const T* x = static_cast<const T*>(p.x) + row * p.inputs + first;
      for (int64_t j = 0; j < kUnit; j += kWide) {
        if (row + kShared <= p.rows) {
          add_chunk<T, kShared, kWide>(x, p.inputs, inputs, weights + j, sums + row * kUnit + j);
        } else {
          for (int64_t i = 0; i < p.rows - row; ++i) {
            add_chunk<T, 1, kWide>(x + i * p.inputs, 0, inputs, weights + j, sums + (row + i) * kUnit + j);
          }
        }
      }
    }
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    finish<T>(p, row, output, min(kUnit, p.outputs - output), sums + row * kUnit);
  }
}

inline Cut cut(const LinearInt8Params& p) { return Cut(1, ceil_div(p.outputs, kUnit), kUnit * p.inputs); }

template <class T>
void run(const LinearInt8Params& p, int64_t begin, int64_t end) {
  const bool many = p.rows >= kMany;
  const Scratch<Vector<Acc<T>>> weights(many ? kChunk / kLanes<Acc<T>> * kUnit : 0), sums(many ? p.rows * kUnit : 0);
  cut(p).for_each(begin, end, [&](int64_t, int64_t, int64_t first, int64_t past) {
    for (int64_t output = kUnit * first; output < min(kUnit * past, p.outputs); output += kUnit) {
      if (many) {
        multiply_many<T>(p, output, weights.get(), sums.get());
        continue;
      }
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
