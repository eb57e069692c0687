// What the bindings of linear layers, of floats and of int8 weights, have in common.
#pragma once

#include "torch_compat.h"

namespace alexnet_fast {

// Checks a layer's tensors but for the weight's dtype, and sets what follows from them. Returns the bias that params
// point to.
template <class Params>
std::optional<Tensor> begin_linear(const char* op, const Tensor& x, const Tensor& weight,
                                   const std::optional<Tensor>& bias, Params& params) {
  params.dtype = dtype_of(x);
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), op,
                  ": x and weight must be matrices with as many columns");
  STD_TORCH_CHECK(weight.device() == x.device(), op, ": weight must be on x's device");
  params.rows = x.size(0);
  params.inputs = x.size(1);
  params.outputs = weight.size(0);
  std::optional<Tensor> added;
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == params.outputs && bias->device() == x.device(), op,
                    ": bias must be on x's device, with one element an output");
    check_dtype(*bias, x.scalar_type(), op, "bias");
    added = torch::stable::contiguous(*bias);
    params.bias = added->const_data_ptr();
  }
  return added;
}

}  // namespace alexnet_fast
