// Partial sums that pieces of work left on a CPU, added up in their order: the same for any number of threads.
#pragma once

#include <algorithm>

#include "torch_compat.h"

namespace alexnet_fast {

// What sums over elements of x are made in.
inline ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Acc>
void add_rows(const Tensor& partial, double* out) {
  const int64_t rows = partial.size(0), columns = partial.size(1);
  const Acc* const in = static_cast<const Acc*>(partial.const_data_ptr());
  std::fill_n(out, columns, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      out[c] += in[row * columns + c];
    }
  }
}

// The sum of the rows of a float32 or float64 (rows, columns), in float64.
inline Tensor add_rows(const Tensor& partial) {
  Tensor total = empty1d(partial, partial.size(1), ScalarType::Double);
  double* const out = static_cast<double*>(total.mutable_data_ptr());
  partial.scalar_type() == ScalarType::Double ? add_rows<double>(partial, out) : add_rows<float>(partial, out);
  return total;
}

inline Tensor empty2d(const Tensor& like, int64_t rows, int64_t columns, ScalarType dtype) {
  const std::array<int64_t, 2> size{rows, columns};
  return torch::stable::empty({size.data(), size.size()}, dtype, std::nullopt, like.device());
}

}  // namespace alexnet_fast
