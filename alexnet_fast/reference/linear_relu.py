from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = True) -> Tensor:
    """max(0, input · weightᵀ + bias), or without ``relu`` the sum itself."""
    y = F.linear(input, weight, bias)
    return F.relu(y) if relu else y
