from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.reference.lrn import widened

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


def max_pool_backward(
    dy: Tensor,
    code: Tensor,
    height: int,
    width: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
) -> Tensor:
    """∂L/∂input (N, C, height, width): each gradient where its window's winner is, row · kernel width + column."""
    rows, columns = (
        torch.arange(side, device=dy.device) * step - pad
        for side, step, pad in zip(dy.shape[2:], stride, padding, strict=True)
    )
    row, column = rows[:, None] + code.long() // kernel_size[1], columns + code.long() % kernel_size[1]
    # Of a code that is no place (see ops/epilogue.py) the gradient is zero, wherever it is put.
    place = (row * width + column).clamp(0, height * width - 1).flatten(2)
    wide = widened(dy).flatten(2)
    dx = wide.new_zeros(*dy.shape[:2], height * width).scatter_add(2, place, wide)
    return dx.unflatten(2, (height, width)).to(dy.dtype)
