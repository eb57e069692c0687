// Partial sums that pieces of work left on a CPU, added up in their order: the same for any number of threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

#include "torch_compat.h"

namespace alexnet_fast {

// What sums over elements of x are made in.
inline ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Acc, class Out>
void add_rows(const void* x, int64_t rows, Tensor& out) {
  const int64_t columns = out.size(0);
  const Acc* const in = static_cast<const Acc*>(x);
  std::vector<double> sums(columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      sums[c] += in[row * columns + c];
    }
  }
  std::copy(sums.begin(), sums.end(), static_cast<Out*>(out.mutable_data_ptr()));
}

// out: the sum of `rows` contiguous rows at x, of `from`, float32 or float64, made in float64 and rounded; float64's in
// float64.
inline void add_rows(const void* x, ScalarType from, int64_t rows, Tensor& out) {
  if (from == ScalarType::Double) return add_rows<double, double>(x, rows, out);
  switch (out.scalar_type()) {
    case ScalarType::Half:
      return add_rows<float, torch::headeronly::Half>(x, rows, out);
    case ScalarType::BFloat16:
      return add_rows<float, torch::headeronly::BFloat16>(x, rows, out);
    default:
      return add_rows<float, float>(x, rows, out);
  }
}

// Of a contiguous x, (rows, columns).
inline void add_rows(const Tensor& x, Tensor& out) { add_rows(x.const_data_ptr(), x.scalar_type(), x.size(0), out); }

inline Tensor empty2d(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> size{rows, columns};
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, like.device());
}

}  // namespace alexnet_fast
