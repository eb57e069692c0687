"""Max-pooling over windows that may overlap.

    forward   y = max over the window, which is cut off at the image's borders
    backward  dx_i = Σ dy_o over the outputs o whose code names i

code: for each output, kernel width · row + column of the winner in its whole window. Of equal elements the first in
row order wins, and a NaN wins over all before it, as in torch. After bias and ReLU (epilogue), CLOSED = 255 where the
maximum is not positive: no window has that place, so backward needs no case for it.

Tile: 16 bytes of output (backward: input) for each of 256 threads. Backward gathers: over an input lie at most
⌈kernel / stride⌉² windows. So there are no atomics, and the order of sums is fixed.
Bytes: forward reads x and writes y and code, backward reads dy and code and writes dx, each once; what windows share
comes from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import Window, memory_format
from alexnet_fast.triton_kernels.launch import accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import Sheet, add_up, bias_of, rectify, tile_of

CLOSED = tl.constexpr(255)


@triton.jit
def place(pixel, height, width):
    """(image, row, column) of a pixel's index. NCHW sheets hold one image."""
    return pixel // (height * width), pixel // width % height, pixel % width


# ---- Forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    code_ptr,
    bias_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    height,
    width,
    out_height,
    out_width,
    x_channel_stride,
    bias_channels,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    _, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    image, out_row, out_column = place(pixel, out_height, out_width)
    top, left = out_row * STRIDE_H - PAD_H, out_column * STRIDE_W - PAD_W
    in_channel = channel.to(tl.int64) * x_channel_stride
    bias = bias_of(bias_ptr, channel, channel < channels, bias_channels, ACC)

    best = tl.full((PIXELS, CHANNELS), -float("inf"), ACC)
    # A window of -inf alone goes to its first element inside the image.
    code = tl.maximum(-top, 0) * KERNEL_W + tl.maximum(-left, 0) + tl.zeros((PIXELS, CHANNELS), tl.int32)
    for i in range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            row, column = top + i, left + j
            inside = mask & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            in_pixel = (image.to(tl.int64) * height + row) * width + column
            x = tl.load(x_ptr + in_pixel * pixel_stride + in_channel, inside, other=-float("inf"))
            if RELU:
                x = tl.where(inside, rectify(x, bias, ACC), -float("inf"))
            x = x.to(ACC)
            wins = (x > best) | (x != x)
            best = tl.where(wins, x, best)
            code = tl.where(wins, i * KERNEL_W + j, code)

    out = pixel.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride
    tl.store(y_ptr + out, best, mask)
    if code_ptr is not None:
        if RELU:
            code = tl.where(best <= 0, CLOSED, code)
        tl.store(code_ptr + out, code.to(tl.uint8), mask)


def forward(
    x: Tensor,
    form: torch.memory_format,
    window: Window,
    keep_code: bool,
    bias: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, code) for a dense x in layout ``form``; with ``relu``, of max(0, x + bias). code comes back empty without
    ``keep_code``."""
    size = (*x.shape[:2], *window.out(*x.shape[2:]))
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
    code = torch.empty_like(y, dtype=torch.uint8) if keep_code else y.new_empty(0, dtype=torch.uint8)
    if y.numel():
        sheet = Sheet.of(y, form)
        _forward_kernel[sheet.grid](
            x,
            y,
            code if keep_code else None,
            bias,
            *sheet.sizes,
            *x.shape[2:],
            *y.shape[2:],
            Sheet.of(x, form).channel_stride,
            x.shape[1],
            *window.kernel,
            *window.stride,
            *window.padding,
            RELU=relu,
            ACC=accumulator(x),
            **sheet.tile,
        )
    return y, code


# ---- Backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_kernel(
    dy_ptr,
    code_ptr,
    dx_ptr,
    sum_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    height,
    width,
    out_height,
    out_width,
    y_channel_stride,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    tile_row, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    image, row, column = place(pixel, height, width)
    out_channel = channel.to(tl.int64) * y_channel_stride
    OVER_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H  # windows over an input, at most
    OVER_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W

    dx = tl.zeros((PIXELS, CHANNELS), ACC)
    for i in range(OVER_H):
        for j in tl.static_range(OVER_W):
            out_row, out_column = (row + PAD_H) // STRIDE_H - i, (column + PAD_W) // STRIDE_W - j
            inside = mask & (out_row >= 0) & (out_row < out_height) & (out_column >= 0) & (out_column < out_width)
            # The input's place in that window; out of the window it is no place that a code could name.
            at_row, at_column = row + PAD_H - out_row * STRIDE_H, column + PAD_W - out_column * STRIDE_W
            inside = inside & (at_row < KERNEL_H) & (at_column < KERNEL_W)
            out_pixel = (image.to(tl.int64) * out_height + out_row) * out_width + out_column
            out = out_pixel * pixel_stride + out_channel
            code = tl.load(code_ptr + out, inside, other=0).to(tl.int32)
            dy = tl.load(dy_ptr + out, inside, other=0).to(ACC)
            dx += tl.where(inside & (code == at_row * KERNEL_W + at_column), dy, 0.0)

    tl.store(dx_ptr + pixel.to(tl.int64) * pixel_stride + channel.to(tl.int64) * channel_stride, dx, mask)
    if sum_ptr is not None:
        column_sum = tl.sum(dx, 0, keep_dims=True)
        tl.store(sum_ptr + tile_row.to(tl.int64) * channels + channel, column_sum, channel < channels)


def backward(
    dy: Tensor, code: Tensor, form: torch.memory_format, sides: list[int], window: Window, want_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, db) for dense dy and code and an input of ``sides`` (height, width); db, if wanted, is dx summed over all
    but channels."""
    dx = torch.empty((*dy.shape[:2], *sides), dtype=dy.dtype, device=dy.device, memory_format=form)
    if not dx.numel():
        return dx, dx.new_zeros(dy.shape[1] if want_bias else 0)
    sheet = Sheet.of(dx, form)
    sums = sheet.partial_sums(dy) if want_bias else None
    _backward_kernel[sheet.grid](
        dy,
        code,
        dx,
        sums,
        *sheet.sizes,
        *sides,
        *dy.shape[2:],
        Sheet.of(dy, form).channel_stride,
        *window.kernel,
        *window.stride,
        *window.padding,
        ACC=accumulator(dy),
        **sheet.tile,
    )
    return dx, dx.new_empty(0) if sums is None else add_up(sums, dy)


# ---- Operators -------------------------------------------------------------------------------------------------------


@implements("max_pool")
def _max_pool(x: Tensor, kernel_size, stride, padding, ceil_mode: bool, keep_code: bool) -> tuple[Tensor, Tensor]:
    form = memory_format(x)
    return forward(*dense(form, x), form, Window(kernel_size, stride, padding, ceil_mode), keep_code)


@implements("max_pool_backward")
def _max_pool_backward(dy: Tensor, code: Tensor, height: int, width: int, *window) -> Tensor:
    form = memory_format(code)
    return backward(*dense(form, dy, code), form, [height, width], Window(*window, False))[0]
