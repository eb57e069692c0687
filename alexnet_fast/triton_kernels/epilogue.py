"""Bias and ReLU on a raw convolution output, before an optional LRN and an optional max-pooling.

    r = max(0, z + b),    y = pool(lrn(r))
    dz = ∂L/∂r where r > 0, else 0,    db = Σ dz over images and pixels

With LRN or pooling alone, its kernel does this on load (lrn.py, max_pool.py), in one pass. With both there are two: a
pooling window would compute the norm of most pixels twice. This file's kernels are the case of neither.

Tile: 16 bytes for each of 256 threads, in NCHW too, where they may end in the next plane and take its bias (tiles.py);
db is summed over a tile's pixels, then over the tiles in order.
Instructions an element, NCHW, bfloat16 (float32): forward 15 (20), before 42 (48); backward 30 (44), before 47 (54).
Bytes: forward reads z and writes y, backward reads dy and y and writes dz, each once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import LRN, Window, memory_format
from alexnet_fast.triton_kernels import lrn as norm
from alexnet_fast.triton_kernels import max_pool
from alexnet_fast.triton_kernels.launch import accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import (
    Planes,
    Sheet,
    add_up,
    bias_of,
    bias_of_rows,
    rectify,
    rows_of,
    sum_rows,
    tile_of,
)


@triton.jit
def _forward_kernel(
    z_ptr,
    y_ptr,
    bias_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    bias_channels,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    _, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    here = pixel.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride
    bias = bias_of(bias_ptr, channel, channel < channels, bias_channels, ACC)
    tl.store(y_ptr + here, rectify(tl.load(z_ptr + here, mask, other=0), bias, ACC), mask)


@triton.jit
def _forward_rows(
    z_ptr,
    y_ptr,
    bias_ptr,
    image_lines,
    channels,
    pixels,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    image, channel, _, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    spilled = tl.arange(0, VECTOR)[None, None, :] >= left
    bias = bias_of_rows(bias_ptr, channel, channels, spilled, ACC)
    tl.store(y_ptr + image + here, rectify(tl.load(z_ptr + image + here, mask, other=0), bias, ACC), mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    y_ptr,
    dz_ptr,
    sum_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    tile_row, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    here = pixel.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride
    dy = tl.load(dy_ptr + here, mask, other=0).to(ACC)
    dz = tl.where(tl.load(y_ptr + here, mask, other=0) <= 0, 0.0, dy * SCALE)
    tl.store(dz_ptr + here, dz, mask)
    if sum_ptr is not None:
        tl.store(
            sum_ptr + tile_row.to(tl.int64) * channels + channel, tl.sum(dz, 0, keep_dims=True), channel < channels
        )


@triton.jit
def _backward_rows(
    dy_ptr,
    y_ptr,
    dz_ptr,
    sum_ptr,
    image_lines,
    channels,
    pixels,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    image, channel, _, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    dy = tl.load(dy_ptr + image + here, mask, other=0).to(ACC)
    dz = tl.where(tl.load(y_ptr + image + here, mask, other=0) <= 0, 0.0, dy * SCALE)
    tl.store(dz_ptr + image + here, dz, mask)
    if sum_ptr is not None:
        sum_rows(sum_ptr, channel, channels, dz, tl.arange(0, VECTOR)[None, None, :] >= left)


def forward(
    z: Tensor, form: torch.memory_format, bias: Tensor | None, lrn: LRN, window: Window, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, code, r) for a dense z in layout ``form``; lrn.size 0 is no LRN, window.kernel [0, 0] no pooling."""
    code, r = z.new_empty(0, dtype=torch.uint8), z.new_empty(0)
    pooling = window.kernel[0] != 0
    if lrn.size:
        y, r = norm.forward(z, form, lrn, bias, relu=True, keep_r=training)
        if pooling:
            y, code = max_pool.forward(y, form, window, training)
    elif pooling:
        y, code = max_pool.forward(z, form, window, training, bias, relu=True)
    else:
        y = torch.empty_like(z)
        sheet, planes, acc = Sheet.of(z, form), Planes.of(z, form), accumulator(z)
        if planes and z.numel():
            tile = planes.tile()
            _forward_rows[planes.grid(tile)](z, y, bias, *planes.sizes, ACC=acc, **tile)
        elif z.numel():
            _forward_kernel[sheet.grid](z, y, bias, *sheet.sizes, z.shape[1], ACC=acc, **sheet.tile)
    return y, code, r


def backward(
    dy: Tensor,
    code: Tensor,
    r: Tensor,
    form: torch.memory_format,
    sides: list[int],
    want_bias: bool,
    lrn: LRN,
    window: Window,
) -> tuple[Tensor, Tensor]:
    """(dz, db) for dense dy and what forward kept; with neither LRN nor pooling, r is forward's y."""
    if window.kernel[0] != 0:
        if not lrn.size:
            return max_pool.backward(dy, code, form, sides, window, want_bias)
        dy, _ = max_pool.backward(dy, code, form, sides, window)
    if lrn.size:
        return norm.backward(dy, r, form, lrn, relu=True, want_bias=want_bias)
    return mask(dy, r, form, want_bias)


def mask(
    dy: Tensor, y: Tensor, form: torch.memory_format, want_bias: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(dz, db): dy · scale where the ReLU's output y is positive (or NaN), and its sums over all but channels."""
    dz = torch.empty_like(dy)
    if not dz.numel():
        return dz, dz.new_zeros(dy.shape[1] if want_bias else 0)
    sheet, planes = Sheet.of(dy, form), Planes.of(dy, form)
    constants = {"SCALE": scale, "ACC": accumulator(dy)}
    if planes:
        tile = planes.tile()
        grid = planes.grid(tile)
        sums = planes.partial_sums(dy, grid) if want_bias else None
        _backward_rows[grid](dy, y, dz, sums, *planes.sizes, **constants, **tile)
    else:
        sums = sheet.partial_sums(dy) if want_bias else None
        _backward_kernel[sheet.grid](dy, y, dz, sums, *sheet.sizes, **constants, **sheet.tile)
    return dz, dz.new_empty(0) if sums is None else add_up(sums, dy)


# ---- Operators -------------------------------------------------------------------------------------------------------


@implements("epilogue")
def _epilogue(z: Tensor, bias: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor]:
    form = memory_format(z)
    b = None if bias is None else bias.contiguous()
    return forward(*dense(form, z), form, b, LRN(*rest[:5]), Window(*rest[5:9]), rest[9])


@implements("epilogue_backward")
def _epilogue_backward(
    dy: Tensor, code: Tensor, r: Tensor, height: int, width: int, want_bias: bool, *rest
) -> tuple[Tensor, Tensor]:
    lrn, window = LRN(*rest[:5]), Window(*rest[5:8], False)
    pooling = window.kernel[0] != 0
    form = memory_format(r if lrn.size or not pooling else code)
    code, r = (t.contiguous(memory_format=form) if t.dim() == 4 else t for t in (code, r))
    return backward(*dense(form, dy), code, r, form, [height, width], want_bias, lrn, window)
