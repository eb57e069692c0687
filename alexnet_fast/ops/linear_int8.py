"""A linear layer whose weights are int8, with a scale for each output: weight-only quantization, as torchao's
``Int8WeightOnlyConfig`` and :func:`torch._weight_int8pack_mm` have it.

    y_nk = s_k Σ_c x_nc q_kc + b_k,    s_k = max_c |w_kc| / 127,  q_kc = round(w_kc / s_k)

Inputs and sums stay floating-point, so nothing has to be calibrated: a weight is off by s_k / 2 at most. It pays where
reading weights takes the time, with one row or a few: fc6 to fc8 are 96% of AlexNet's bytes, and a row reads all of
them. Kernels turn int8 into float32 in registers; 16-bit inputs are added up in float32 and rounded once. From 65 rows
on, CPUs turn 256 outputs' weights at a time into floats, for PyTorch's own product: 1 kB for each input feature.

Weights and scales have no gradient. With g = ∂L/∂y, ∂L/∂x_nc = Σ_k g_nk s_k q_kc by torch's own product, and ∂L/∂b is
g's sum over rows. Saved for backward: q and s, which the net keeps anyway.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.ops.arguments import check_bias, check_tensor
from alexnet_fast.ops.lpips_layer import accumulation
from alexnet_fast.ops.registry import Family, define, family

MOST_ROWS = 64  # that the CUDA kernel is for: with more, a product of whole tiles is faster


def _setup_context(ctx, inputs, output) -> None:
    _x, weight, scales, _bias = inputs
    ctx.save_for_backward(weight, scales)


def _backward(family: Family, ctx, dy: Tensor):
    weight, scales = ctx.saved_tensors
    by_input, _, _, by_bias = ctx.needs_input_grad
    dx = ((dy * scales) @ weight.to(scales.dtype)).to(dy.dtype) if by_input else None
    return dx, None, None, dy.sum(0) if by_bias else None


define(
    "linear_int8",
    "(Tensor x, Tensor weight, Tensor scales, Tensor? bias) -> Tensor",
    fake=lambda x, weight, scales, bias: x.new_empty((x.shape[0], weight.shape[0])),
    setup_context=_setup_context,
    backward=_backward,
    flops=lambda x, weight, *_: 2 * x[0] * x[1] * weight[0],
)


def linear_int8(
    input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """linear(input, scales · weight, bias), of weights as :func:`alexnet_fast.nn.weight_only_int8` makes them.

    Args:
        input: (…, in), float32, float16, bfloat16 or float64.
        weight: int8 (out, in).
        scales: (out,), of any floating-point dtype; taken in float32, or float64 if input is.
        bias: (out,) or None, taken in input's dtype.
        backend: see :mod:`alexnet_fast.backends`. ``auto`` takes ``cuda`` for up to 64 rows.

    Returns:
        (…, out) in input's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    check_tensor("input", input, range(1, 65))
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype != torch.int8:
        found = (
            f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise TypeError(f"weight: expected an int8 Tensor (out, in), got {found}")
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)} takes {weight.shape[1]} features, got {input.shape[-1]}")
    check_tensor("scales", scales, (1,))
    if scales.shape[0] != weight.shape[0]:
        raise ValueError(f"scales: expected one for each of {weight.shape[0]} outputs, got {scales.shape[0]}")
    for name, tensor in (("weight", weight), ("scales", scales)):
        if tensor.device != input.device:
            raise ValueError(f"{name}: is on {tensor.device}, but input is on {input.device}")
    bias = bias.to(input.dtype) if isinstance(bias, Tensor) and bias.is_floating_point() else bias
    if bias is not None:
        check_bias(bias, weight.shape[0], input)
    rows = prod(input.shape[:-1])  # numel() would fix the batch of an exported program
    refusal = f"{rows} rows, but at most {MOST_ROWS}" if input.is_cuda and rows > MOST_ROWS else ""
    chosen = choose("linear_int8", input, backend, cuda_refusal=refusal)
    scales = scales.to(accumulation(input.dtype))
    if chosen == "reference":
        return reference.linear_int8(input, weight, scales, bias)
    y = family(chosen).linear_int8(input.reshape(rows, input.shape[-1]), weight, scales, bias)
    return y.view(*input.shape[:-1], weight.shape[0])
