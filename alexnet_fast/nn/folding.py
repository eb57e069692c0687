"""Batch normalization folded into the convolution before it, for inference.

    γ (w * x + b − mean) / √(var + ε) + β  =  (s w) * x + s (b − mean) + β,    s = γ / √(var + ε)

The modules stay; the folded weight and bias are copies, kept until one of the tensors that they come from changes.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import finalize

import torch
from torch import Tensor, nn

ASKED = "folds_in_inference"  # what fuse(model, fold_batchnorm=True) sets on the normalizations


class _Folded(NamedTuple):
    sources: list[Tensor | None]
    addresses: list[tuple[int, int] | None]
    eps: float
    weight: Tensor
    bias: Tensor


_kept: dict[int, _Folded] = {}  # by the id of a normalization that lives


def applies(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether ``norm`` is a fixed map of each channel in this call, and nobody asks for gradients."""
    return (
        not torch.is_grad_enabled()
        and not norm.training
        and norm.running_mean is not None
        and norm.num_features == conv.out_channels
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.device == norm.running_mean.device
    )


def parameters(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The convolution's weight and bias with ``norm`` inside, of the convolution's dtype, computed in float32 or more.

    A tensor that is written through ``.data`` changes unseen.
    """
    sources = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    counted = not any(t is not None and t.is_inference() for t in sources)  # such tensors count no versions
    addresses = [None if t is None else (t.data_ptr(), t._version) for t in sources] if counted else []
    kept = _kept.get(id(norm))
    if (
        kept is not None
        and counted
        and all(a is b for a, b in zip(kept.sources, sources, strict=True))
        and kept.addresses == addresses
        and kept.eps == norm.eps
    ):
        return kept.weight, kept.bias
    with torch.inference_mode(False):
        weight, bias = _fold(sources, norm.eps)
    made = _Folded(sources, addresses, norm.eps, weight, bias)
    if counted:
        if id(norm) not in _kept:
            finalize(norm, _kept.pop, id(norm), None).atexit = False
        _kept[id(norm)] = made
    return made.weight, made.bias


def _fold(sources: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    form = sources[0].dtype
    wide = torch.promote_types(form, torch.float32)
    weight, bias, gamma, beta, mean, variance = [None if t is None else t.detach().to(wide) for t in sources]
    scale = (variance + eps).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if beta is None else shift * scale + beta
    return (weight * scale.view(-1, 1, 1, 1)).to(form), shift.to(form)
