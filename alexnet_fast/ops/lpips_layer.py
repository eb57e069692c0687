"""The end of each layer of LPIPS: how far two images' features are from each other.

    d_p = Σ_c w_c · (u_cp − v_cp)²,    u_cp = a_cp / (|a_p| + ε),  v_cp = b_cp / (|b_p| + ε),  ε = 1e-10

of the features a and b that two images have at pixel p, and its mean over pixels (Zhang, Isola, Efros, Shechtman and
Wang 2018, equation 1). With g_p = ∂L/∂d_p, h_cp = 2 g_p w_c (u_cp − v_cp) and s = 1 / (|a_p| + ε),

    ∂L/∂a_cp = s · h_cp − a_cp · s² / |a_p| · Σ_j h_jp a_jp,    ∂L/∂b_cp likewise of −h,
    ∂L/∂w_c  = Σ_p g_p (u_cp − v_cp)²

Where all features of a pixel are zero, u is 0 and so, by convention, is its gradient: |a| has no derivative there, and
1/ε, which is u's, is a number that no training survives. Sums and roots are float32 for 16-bit features, as ε would be
0 in float16.

Both images' features come as one batch, so that they go through the net as one, and their gradient is one tensor. Saved
for backward: the features and w, both of which the net keeps anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.ops.arguments import check_tensor, once_per_form
from alexnet_fast.ops.registry import Family, define, empty, family


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What sums over features of ``dtype`` are made, and returned, in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(x: Tensor, weight: Tensor, spatial: bool) -> Tensor:
    sides = x.shape[2:] if spatial else (1, 1)
    return x.new_empty((x.shape[0] // 2, 1, *sides), dtype=accumulation(x.dtype))


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, spatial: bool, want_weight: bool) -> tuple[Tensor, Tensor]:
    return empty(x, x.shape), weight.new_empty(x.shape[1] if want_weight else 0)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, ctx.spatial = inputs
    ctx.save_for_backward(x, weight)


def _backward(family: Family, ctx, dy: Tensor):
    want_weight = ctx.needs_input_grad[1]
    dx, dweight = family.lpips_layer_backward(dy, *ctx.saved_tensors, ctx.spatial, want_weight)
    return dx, dweight if want_weight else None, None


define(
    "lpips_layer",
    "(Tensor x, Tensor weight, bool spatial) -> Tensor",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "lpips_layer_backward",
    "(Tensor dy, Tensor x, Tensor weight, bool spatial, bool want_weight) -> (Tensor dx, Tensor dweight)",
    fake=_fake_backward,
)


@once_per_form
def _prepare(input, weight, _bias, backend):
    """The operator that runs, or None for the reference."""
    check_tensor("input", input, (4,))
    check_tensor("weight", weight, (1,))
    if input.shape[0] % 2:
        raise ValueError(f"input: expected the features of both images, an even batch, got shape {tuple(input.shape)}")
    if weight.shape[0] != input.shape[1]:
        raise ValueError(f"weight: expected one element for each of {input.shape[1]} channels, got {weight.shape[0]}")
    if 0 in input.shape[1:]:
        raise ValueError(f"input: only the batch may be empty, got shape {tuple(input.shape)}")
    if weight.device != input.device:
        raise ValueError(f"weight: is on {weight.device}, but input is on {input.device}")
    chosen = choose("lpips_layer", input, backend)
    return None if chosen == "reference" else family(chosen).lpips_layer


def lpips_layer(input: Tensor, weight: Tensor, spatial: bool = False, *, backend: str | None = None) -> Tensor:
    """The distance of two images' features in one layer, as LPIPS measures it.

    Args:
        input: (2N, C, H, W), the features of N images and then of those that they are compared with; float32, float16,
            bfloat16 or float64, NCHW or channels_last.
        weight: (C,), of any floating-point dtype: what each channel counts.
        spatial: a distance for each pixel, not their mean.
        backend: see :mod:`alexnet_fast.backends`.

    Returns:
        (N, 1, 1, 1), or (N, 1, H, W) if ``spatial``; float64 for float64, otherwise float32, also under autocast.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator = _prepare(input, weight, None, backend)
    if operator is None:
        return reference.lpips_layer(input, weight, spatial)
    return operator(input, weight.to(accumulation(input.dtype)), bool(spatial))
