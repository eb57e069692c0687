from __future__ import annotations

from collections.abc import Sequence

import torch
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


def conv_relu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂L/∂x, ∂L/∂weight and ∂L/∂bias, those that are ``wanted``; ``y`` is the output, None if dy is masked already."""
    masked = dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
    bias, geometry = [weight.shape[0]], (stride, padding, dilation, False, [0, 0], groups)
    return torch.ops.aten.convolution_backward(masked, x, weight, bias, *geometry, list(wanted))
