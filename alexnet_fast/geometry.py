"""What operators and the kernels behind them share: checked options, and the sizes and layouts of results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

IntPair = SupportsIndex | Sequence[SupportsIndex]


class LRN(NamedTuple):
    """Local response normalization inside :func:`epilogue` and :func:`conv_stage`; fields as in
    :func:`alexnet_fast.ops.local_response_norm`."""

    size: SupportsIndex
    alpha: SupportsFloat = 1e-4
    beta: SupportsFloat = 0.75
    k: SupportsFloat = 1.0
    groups: SupportsIndex = 1


class Pool(NamedTuple):
    """Max-pooling inside :func:`epilogue` and :func:`conv_stage`; fields as in :func:`alexnet_fast.ops.max_pool2d`."""

    kernel_size: IntPair
    stride: IntPair | None = None
    padding: IntPair = 0
    ceil_mode: bool = False


class Window(NamedTuple):
    """A checked pooling window."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool

    def out(self, height: int, width: int) -> list[int]:
        sides = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        return [out_side("kernel_size", *side, self.ceil_mode) for side in sides]


class Geometry(NamedTuple):
    """A convolution's checked stride, padding, dilation and groups."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def out_side(name: str, side: int, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> int:
    """Output side of a window that slides over ``side`` elements, as torch counts it."""
    out = (side + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= side + padding:
        out -= 1  # the last window must begin inside the image or its left padding
    if out < 1:
        raise ValueError(f"{name}: a window of {kernel} is larger than the input's side {side} with padding {padding}")
    return out


def layout_of(x: Tensor, weight: Tensor) -> Tensor:
    """The tensor whose layout the result takes: channels_last if input or weight is, as in torch."""
    return weight if memory_format(weight) == torch.channels_last else x


def out_sides(x: Tensor, weight: Tensor, stride, padding, dilation) -> list[int]:
    """Height and width of the convolution's output."""
    return sides_of(x.shape, weight.shape, stride, padding, dilation)


def sides_of(x: Sequence[int], weight: Sequence[int], stride, padding, dilation) -> list[int]:
    extents = [d * (side - 1) + 1 for d, side in zip(dilation, weight[-2:], strict=True)]
    return [out_side("weight", *side) for side in zip(x[-2:], extents, stride, padding, strict=True)]


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that every implementation gives its results: x's own order of axes, NCHW where that is ambiguous."""
    if x.dim() == 4:  # the two plain cases first: each call asks several times
        if x.is_contiguous():
            if not x.is_contiguous(memory_format=torch.channels_last):
                return torch.contiguous_format
        else:
            _, channels, height, width = x.shape
            if x.stride() == (height * width * channels, 1, width * channels, channels):
                return torch.channels_last
    return torch._prims_common.suggest_memory_format(x)
