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


class SpaceToDepth(NamedTuple):
    """How :func:`augment` lays out images for a convolution with these options: with a stride s, s x s pixels become
    channels of one pixel, in the order (a, b, channel). The convolution then is one of stride 1 and padding 0 over
    s·s·channels. Its own padding is part of the images, and pixels that no window sees are not."""

    kernel_size: IntPair
    stride: IntPair
    padding: IntPair = 0


class Fold(NamedTuple):
    """A checked :class:`SpaceToDepth` for images of one size: pixel (i, j) is made of the pixels (i · factor + a -
    padding, j · factor + b - padding); ``sides`` in pixels of the result."""

    factor: list[int]
    padding: list[int]
    sides: list[int]


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


def fold_of(options: SpaceToDepth | None, crop: Sequence[int]) -> Fold:
    """The fold of images of ``crop`` pixels; None: the one that changes nothing."""
    if options is None:
        return Fold([1, 1], [0, 0], list(crop))
    kernel, stride, padding = ([v, v] if isinstance(v, int) else list(v) for v in options)
    outs = [out_side("fold", *side) for side in zip(crop, kernel, stride, padding, strict=True)]
    return Fold(stride, padding, [out + -(-k // s) - 1 for out, k, s in zip(outs, kernel, stride, strict=True)])


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
