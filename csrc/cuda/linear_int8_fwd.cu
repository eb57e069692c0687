// A linear layer with int8 weights, for few rows. The formula: alexnet_fast/ops/linear_int8.py.
#include "cuda/common/linear.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {

int linear_int8_fwd(const LinearInt8Params& p, void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return launch_linear(LinearTensors<T, int8_t>{static_cast<const T*>(p.x), p.weight,
                                                  static_cast<const float*>(p.scales), static_cast<const T*>(p.bias),
                                                  static_cast<T*>(p.y), p.rows, p.inputs, p.outputs, false},
                         stream);
  });
}

}  // namespace alexnet_fast::cuda
