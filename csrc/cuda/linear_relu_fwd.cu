// A linear layer and its ReLU, for few rows. The formula: alexnet_fast/ops/linear_relu.py.
#include "cuda/common/linear.cuh"
#include "launchers.h"

namespace alexnet_fast::cuda {

int linear_relu_fwd(const LinearParams& p, void* stream) {
  return with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    return launch_linear(
        LinearTensors<T, T>{static_cast<const T*>(p.x), static_cast<const T*>(p.weight), nullptr,
                            static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.rows, p.inputs, p.outputs, p.relu},
        stream);
  });
}

}  // namespace alexnet_fast::cuda
