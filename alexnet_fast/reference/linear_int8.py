from __future__ import annotations

import torch
from torch import Tensor

from alexnet_fast.reference.lrn import widened


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q = round(w / s) in int8, to nearest even, and s = max |w| / 127 of each row; s is 1 where a row is zero."""
    wide = widened(weight.detach())
    largest = wide.abs().amax(1)
    scales = torch.where(largest == 0, 1, largest / 127)
    return (wide / scales[:, None]).round().to(torch.int8), scales


def linear_int8(input: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """scales · (input · weightᵀ) + bias, in float32 for 16 bits."""
    x = widened(input)
    y = x @ weight.to(x.dtype).mT * scales
    return (y if bias is None else y + bias.to(y.dtype)).to(input.dtype)
