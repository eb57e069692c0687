"""Crop, mirror, colour noise, normalization and cast of uint8 images, in one pass.

    y[n, i, j, c] = (x[n, top_n + i, left_n + j′, c] − shift[n, c]) / scale[c],   j′ = width − 1 − j if mirrored, else j

Tile: 1024 neighbouring elements of one crop, in its order in memory (row, column, channel).
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
    out_height,
    OUT_WIDTH: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    tiles = tl.cdiv(out_height * OUT_WIDTH * 3, ELEMENTS)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    element = tl.program_id(0) % tiles * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = element < out_height * OUT_WIDTH * 3
    row, column, channel = element // (OUT_WIDTH * 3), element // 3 % OUT_WIDTH, element % 3

    top, left = tl.load(place_ptr + 3 * image), tl.load(place_ptr + 3 * image + 1)
    mirrored = tl.load(place_ptr + 3 * image + 2) != 0
    column = tl.where(mirrored, OUT_WIDTH - 1 - column, column)
    x_pixel = (image * height + top + row) * width + left + column
    x = tl.load(x_ptr + 3 * x_pixel + channel, mask, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + 3 * image + channel)
    scale = tl.load(scale_ptr + channel)
    tl.store(y_ptr + image * (out_height * OUT_WIDTH * 3) + element, tl.div_rn(x - shift, scale), mask)


@implements("augment")
def _augment(
    images: Tensor, place: Tensor, shift: Tensor, scale: Tensor, height: int, width: int, dtype: torch.dtype
) -> Tensor:
    (images,) = dense(torch.channels_last, images)
    batch, channels = images.shape[:2]
    size = (batch, channels, height, width)
    y = torch.empty(size, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    if batch:
        grid = (batch * triton.cdiv(height * width * 3, ELEMENTS),)
        numbers = place.contiguous(), shift.contiguous(), scale.contiguous()
        _forward_kernel[grid](images, y, *numbers, *images.shape[2:], height, OUT_WIDTH=width, ELEMENTS=ELEMENTS)
    return y
