"""Crop, mirror, colour noise, normalization and cast of uint8 images, in one pass.

    y[n, i, j, c] = (x[n, top_n + i, left_n + j′, c] − shift[n, c]) / scale[c],   j′ = width − 1 − j if mirrored, else j

laid out for a first convolution with a stride where that is wanted: pixel (a, b) of y[n, i, j] is the one of row
i · factor + a − padding and column j · factor + b − padding, or 0 where there is none.

Tile: 1024 neighbouring elements of one image of y, in its order in memory (i, j, a, b, channel).
Bytes: x's crop read once, a byte an element, and y written once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels.launch import dense, implements
from alexnet_fast.triton_kernels.tiles import ELEMENTS


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    place_ptr,
    shift_ptr,
    scale_ptr,
    height,
    width,
    crop_height,
    CROP_WIDTH: tl.constexpr,
    out_height,
    OUT_WIDTH: tl.constexpr,
    FACTOR_H: tl.constexpr,
    FACTOR_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    PIXEL: tl.constexpr = FACTOR_H * FACTOR_W * 3
    tiles = tl.cdiv(out_height * OUT_WIDTH * PIXEL, ELEMENTS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    element = tl.program_id(0) % tiles * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = element < out_height * OUT_WIDTH * PIXEL
    channel = element % 3
    row = element // (OUT_WIDTH * PIXEL) * FACTOR_H + element // (FACTOR_W * 3) % FACTOR_H - PAD_H
    column = element // PIXEL % OUT_WIDTH * FACTOR_W + element // 3 % FACTOR_W - PAD_W
    inside = mask
    if FACTOR_H * FACTOR_W > 1 or PAD_H + PAD_W > 0:
        inside = mask & (row >= 0) & (row < crop_height) & (column >= 0) & (column < CROP_WIDTH)

    top, left = tl.load(place_ptr + 3 * image), tl.load(place_ptr + 3 * image + 1)
    mirrored = tl.load(place_ptr + 3 * image + 2) != 0
    column = tl.where(mirrored, CROP_WIDTH - 1 - column, column)
    x_pixel = (image * height + top + row) * width + left + column
    x = tl.load(x_ptr + 3 * x_pixel + channel, inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + 3 * image + channel)
    scale = tl.load(scale_ptr + channel)
    y = tl.div_rn(x - shift, scale)
    if FACTOR_H * FACTOR_W > 1 or PAD_H + PAD_W > 0:
        y = tl.where(inside, y, 0.0)
    tl.store(y_ptr + image * (out_height * OUT_WIDTH * PIXEL) + element, y, mask)


@implements("augment")
def _augment(
    images: Tensor,
    place: Tensor,
    shift: Tensor,
    scale: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    factor: list[int],
    padding: list[int],
    sides: list[int],
) -> Tensor:
    (images,) = dense(torch.channels_last, images)
    batch, channels = images.shape[:2]
    size = (batch, channels * factor[0] * factor[1], *sides)
    y = torch.empty(size, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    if batch:
        grid = (batch * triton.cdiv(y[0].numel(), ELEMENTS),)
        numbers = place.contiguous(), shift.contiguous(), scale.contiguous()
        _forward_kernel[grid](
            *(images, y, *numbers, *images.shape[2:], height, width, *sides, *factor, *padding), ELEMENTS=ELEMENTS
        )
    return y
