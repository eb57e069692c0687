from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IntPair = int | tuple[int, int]


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The largest element of each window; of equals the first in row order, and NaN above all."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
