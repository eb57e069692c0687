"""Local response normalization across channels.

    y_c = x_c · t_c^-β,    t_c = k + α/n · Σ_{j = c-⌊n/2⌋ … c+⌊(n-1)/2⌋} x_j²

(Krizhevsky, Sutskever, Hinton 2012, section 3.3, with torch's α: the paper's is α/n.) With g = ∂L/∂y,

    ∂L/∂x_i = g_i · t_i^-β − 2αβ/n · x_i · Σ_{j: i in window of j} g_j · x_j · t_j^-(β+1)

Saved for backward: x. t is computed again: 2n multiply-adds are cheaper than a second tensor's traffic.
"""

from __future__ import annotations

from functools import partial
from typing import SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.geometry import LRN
from alexnet_fast.ops.arguments import check_lrn, check_tensor, cuda_refuses, once_per_form
from alexnet_fast.ops.registry import NATIVE, Family, define, empty, family
from alexnet_fast.ops.run import WINDOWS, Layer
from alexnet_fast.reference.lrn import widened

MOST_DIMENSIONS = 65  # torch has no tensor of as many


def _autocast(family: Family, _dtype, x: Tensor, *rest):
    """torch's own ends in float32: its mean and its power are on autocast's list of what does."""
    return family.lrn(widened(x), *rest)


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.parameters = inputs
    ctx.save_for_backward(x)


def _backward(family: Family, ctx, dy: Tensor):
    (x,) = ctx.saved_tensors
    return family.lrn_backward(dy, x, *ctx.parameters), None, None, None, None, None


define(
    "lrn",
    "(Tensor x, int size, float alpha, float beta, float k, int groups) -> Tensor",
    fake=lambda x, size, alpha, beta, k, groups: empty(x, x.shape),
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
define(
    "lrn_backward",
    "(Tensor dy, Tensor x, int size, float alpha, float beta, float k, int groups) -> Tensor",
    fake=lambda dy, x, size, alpha, beta, k, groups: empty(x, x.shape),
)


def planned(operator, lrn: LRN, x: Tensor, *_) -> tuple[Layer, torch.Size] | None:
    """What C++ is told of a call, and its result's shape; None where it does not carry it out."""
    if operator is not NATIVE.lrn or x.dim() != 4:
        return None
    return Layer("lrn", **dict(zip(WINDOWS[:5], lrn, strict=True))), x.shape


@partial(once_per_form, planned=planned)
def _prepare(input, _weight, _bias, size, alpha, beta, k, groups, backend):
    """The operator that runs, or None for the reference, and its parameters."""
    check_tensor("input", input, range(3, MOST_DIMENSIONS))
    lrn = check_lrn(LRN(size, alpha, beta, k, groups), input.shape[1])
    chosen = choose("lrn", input, backend, cuda_refusal=cuda_refuses(lrn))
    return None if chosen == "reference" else family(chosen).lrn, lrn


def local_response_norm(
    input: Tensor,
    size: SupportsIndex,
    alpha: SupportsFloat = 1e-4,
    beta: SupportsFloat = 0.75,
    k: SupportsFloat = 1.0,
    *,
    groups: SupportsIndex = 1,
    backend: str | None = None,
) -> Tensor:
    """Local response normalization, as :func:`torch.nn.functional.local_response_norm`.

    Args:
        input: (N, C, *), float32, float16, bfloat16 or float64. 4-D inputs keep their layout, NCHW or channels_last;
            others give a contiguous result.
        size: channels in a window, odd or even.
        alpha: coefficient of the window's mean square; the paper's and TensorFlow's coefficient is ``alpha / size``.
        beta: exponent.
        k: added to the mean square.
        groups: windows end at the borders of ``groups`` equal parts of the channels, as where a layer is split over two
            GPUs.
        backend: see :mod:`alexnet_fast.backends`.

    Returns:
        A tensor of input's shape and dtype; float32 where autocast is on and input is float16 or bfloat16, as torch's.
        float16 and bfloat16 are computed in float32: x² does not overflow.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator, lrn, native = _prepare(input, None, None, size, alpha, beta, k, groups, backend)
    if native is not None and (y := native(input)) is not None:
        return y
    if operator is None:
        return reference.local_response_norm(input, *lrn[:4], groups=lrn.groups)
    x = input if input.dim() == 4 else input.flatten(2).unsqueeze(-1)
    y = operator(x, *lrn)
    return y if input.dim() == 4 else y.reshape(input.shape)
