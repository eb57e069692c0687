from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.reference.max_pool import IntPair


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:
    """max(0, convolution + bias)."""
    return F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
