"""What follows a matrix product z in a fully connected layer, in one pass: bias, ReLU, and dropout.

    y_i = max(0, z_i + b) / (1 − p) where element i is kept, else 0

It is kept if the first word of Philox4x32-10 with the seed for its key and i for its counter is at least p · 2³²: no
mask is stored, and one seed gives one mask on every device and backend. With m = ∂L/∂y / (1 − p) where y > 0 and 0
elsewhere, ∂L/∂z is m and ∂L/∂b its sum over rows. Saved for backward: y, whose zeros are both masks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.ops.arguments import check_linear
from alexnet_fast.ops.epilogue import NO_LRN, NO_POOL
from alexnet_fast.ops.registry import LIBRARY, NATIVE, Family, define, family
from alexnet_fast.reference.linear_relu_dropout import dropout_factors, seed_tensor


def _setup_context(ctx, inputs, output) -> None:
    _z, _bias, ctx.p, _seed = inputs
    ctx.save_for_backward(output)


def _backward(family: Family, ctx, dy: Tensor):
    (y,) = ctx.saved_tensors
    dz, db = family.linear_relu_dropout_backward(dy, y, ctx.p, ctx.needs_input_grad[1])
    return dz, db if ctx.needs_input_grad[1] else None, None, None


def _autocast(family: Family, _dtype, z: Tensor, bias: Tensor | None, *rest):
    return family.linear_relu_dropout(z, None if bias is None else bias.to(z.dtype), *rest)


# seed None: no dropout, and p is 0.
define(
    "linear_relu_dropout",
    "(Tensor z, Tensor? bias, float p, Tensor? seed) -> Tensor",
    fake=lambda z, bias, p, seed: z.new_empty(z.shape),
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
define(
    "linear_relu_dropout_backward",
    "(Tensor dy, Tensor y, float p, bool want_bias) -> (Tensor dz, Tensor db)",
    fake=lambda dy, y, p, want_bias: (y.new_empty(y.shape), y.new_empty(y.shape[1] if want_bias else 0)),
)


def _forward(z: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """The epilogue's bias and ReLU, then the reference's factors: right everywhere, but one pass on Triton alone."""
    y = NATIVE.epilogue(z[:, :, None, None], bias, *NO_LRN, *NO_POOL, False)[0].flatten(1)
    if seed is None:
        return y
    return y * dropout_factors(y, p, seed) if p < 1 else torch.zeros_like(y)


def _backward_by_epilogue(dy: Tensor, y: Tensor, p: float, want_bias: bool) -> tuple[Tensor, Tensor]:
    scaled = dy if p == 0 else dy / (1 - p) if p < 1 else torch.zeros_like(dy)
    no_code = y.new_empty(0, dtype=torch.uint8)
    windows = *NO_LRN, *NO_POOL[:3]
    dz, db = NATIVE.epilogue_backward(scaled[:, :, None, None], no_code, y[:, :, None, None], 1, 1, want_bias, *windows)
    return dz.flatten(1), db


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear_relu_dropout", _forward, _key)
    LIBRARY.impl("linear_relu_dropout_backward", _backward_by_epilogue, _key)


def linear_relu_dropout(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """dropout(relu(linear(input, weight, bias)), p, training), as in :mod:`torch.nn.functional`.

    The random numbers are not those of :func:`torch.nn.functional.dropout`.

    Args:
        input: (N, in) or (in,), float32, float16, bfloat16 or float64.
        weight: (out, in), of input's dtype and device.
        bias: (out,) or None.
        p: probability of an element to be zeroed.
        training: False leaves dropout out.
        seed: an int, or an int64 tensor of one element on input's device, which decides what is zeroed. Drawn from
            torch's generator of the device if None, so that :func:`torch.manual_seed` makes it repeatable, and each
            replay of a CUDA graph zeroes other elements; with a seed, each zeroes the same.
        backend: see :mod:`alexnet_fast.backends`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    check_linear(input, weight, bias)
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability, got {p!r}")
    if isinstance(seed, Tensor) and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != input.device):
        raise ValueError(
            f"seed: expected an int64 tensor of one element on {input.device}, "
            f"got {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        )
    chosen = choose("linear_relu_dropout", input, backend)
    if chosen == "reference":
        return reference.linear_relu_dropout(input, weight, bias, p, training, seed=seed)
    drops = training and p > 0
    z = F.linear(input if input.dim() == 2 else input.unsqueeze(0), weight)
    number = seed_tensor(seed, input.device) if drops else None
    y = family(chosen).linear_relu_dropout(z, bias, float(p) if drops else 0.0, number)
    return y if input.dim() == 2 else y.squeeze(0)
