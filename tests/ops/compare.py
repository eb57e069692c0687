"""When a result is as exact as PyTorch's: errors against float64, in the maximum norm.

Each dtype is allowed twice PyTorch's error in the same dtype, plus ``ROUNDING`` of the largest element, because
PyTorch's error can be zero by luck: one unit in the last place, and for float64, whose error nothing better measures,
64 of them for sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from .samples import Sample

ROUNDING = {torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float64: 2**-46}
DTYPES = list(ROUNDING)


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest deviation; infinite for another shape, or for NaN or infinity in one of the two alone."""
    if actual.shape != exact.shape:
        return inf
    deviation = torch.where(actual.double() == exact, 0, (actual.double() - exact).abs())
    deviation = torch.where(actual.isnan() & exact.isnan(), 0, deviation)
    return deviation.nan_to_num(nan=inf, posinf=inf).max().item() if deviation.numel() else 0.0


def as_exact(actual: Tensor, peer: Tensor, exact: Tensor) -> bool:
    """``actual`` errs at most twice as much as ``peer``, apart from rounding."""
    largest = exact.abs().max().item() if exact.numel() else 0.0
    return (
        actual.dtype == peer.dtype and error(actual, exact) <= 2 * error(peer, exact) + ROUNDING[peer.dtype] * largest
    )


def results(call, data: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """``call(data)`` and its gradients at ``dy``, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in data.items()}
    y = call(leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"output": y.detach(), **dict(zip(leaves, grads, strict=True))}


def output_gradient(sample: Sample, dtype: torch.dtype, whole_numbers: bool = False) -> Tensor:
    """A gradient for the sample's output, without zeros that would hide an error."""
    shape = sample.torch({name: torch.empty(size, device="meta") for name, size in sample.shapes.items()}).shape
    generator = torch.Generator().manual_seed(1)
    if whole_numbers:
        return (2 * torch.randint(2, shape, generator=generator) - 1).to(dtype)
    return (torch.rand(shape, generator=generator) + 0.5).to(dtype)


def double(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in data.items()}


def saved_bytes(call: Callable[[], Tensor]) -> int:
    """Bytes of the different tensors that ``call()`` keeps for backward."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr() if t.numel() else 0, t), lambda t: t
    ):
        call()
    return sum(t.numel() * t.itemsize for t in kept.values())
