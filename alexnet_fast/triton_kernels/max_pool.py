"""Max-pooling over windows that may overlap.

    forward   y = max over the window, which is cut off at the image's borders
    backward  dx_i = Σ dy_o over the outputs o whose code names i

code: for each output, kernel width · row + column of the winner in its whole window. Of equal elements the first in
row order wins, and a NaN wins over all before it, as in torch. After bias and ReLU (epilogue), CLOSED = 255 where the
maximum is not positive: no window has that place, so backward needs no case for it.

Tile: 16 bytes of output (backward: input) for each of 256 threads. Backward gathers: over an input lie at most
⌈kernel / stride⌉² windows. So there are no atomics, and the order of sums is fixed.

In NCHW a tile is a stretch of a plane's lines (tiles.py). What its windows read, whole rows of a plane and the first
ones of the next, follows without gaps: it is loaded by lines, and its elements are picked through shared memory
(tl.gather). Codes are bytes, so a thread's are 4 or 8 of them. Where images are no whole lines, windows have more than
MOST_TAPS places or rows are too long for a run of 4096 elements, elements are loaded one by one.
Instructions an output, forward, bfloat16 (float32): 122 (112) in 71 (56) registers, before, in three turns of a loop,
some 330 (400) in 161 (78); an input, backward: 138 (130) in 116 (57), before, in two turns, some 250 (370) in 204 (93).

Bytes: forward reads x and writes y and code, backward reads dy and code and writes dx, each once; what windows share
comes from the cache.
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import Window, memory_format
from alexnet_fast.triton_kernels.launch import accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import (
    Planes,
    Sheet,
    add_up,
    bias_of,
    bias_of_rows,
    rectify,
    rows_of,
    run_of,
    sum_rows,
    tile_of,
)

CLOSED = tl.constexpr(255)
MOST_TAPS = 16  # of a window in NCHW's kernels, which have the code of each


@triton.jit
def place(pixel, height, width):
    """(image, row, column) of a pixel's index. NCHW sheets hold one image."""
    return pixel // (height * width), pixel // width % height, pixel % width


@triton.jit
def place_in_rows(channel, left, here, pixels, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """Of a tile of rows (rows_of): which elements are spilled, the pixel of each in its plane, and that at which each
    row begins."""
    spilled = tl.arange(0, VECTOR)[None, None, :] >= left
    pixel = here - channel * pixels
    begin = tl.cdiv(channel * pixels, VECTOR) * VECTOR - channel * pixels + tl.program_id(1) * LINES * VECTOR
    return spilled, tl.where(spilled, pixel - pixels, pixel), begin


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


@triton.jit
def _forward_rows(
    x_ptr,
    y_ptr,
    code_ptr,
    bias_ptr,
    image_lines,
    channels,
    pixels,
    x_image_lines,
    height,
    width,
    OUT_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    CUT: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
):
    image, channel, _, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    ALL: tl.constexpr = ROWS * LINES * VECTOR
    spilled, pixel, begin = place_in_rows(channel, left, here, pixels, LINES, VECTOR)

    # From the first window's first row to the last one's last row, which may be in the next plane.
    last = tl.minimum(begin + (LINES * VECTOR - 1), pixels - 1) // OUT_WIDTH * STRIDE_H + (KERNEL_H - PAD_H)
    SPILL: tl.constexpr = (VECTOR - 2) // OUT_WIDTH * STRIDE_H + (KERNEL_H - PAD_H)
    last = tl.where(begin + LINES * VECTOR > pixels, height + tl.minimum(SPILL, height), tl.minimum(last, height))
    plane = channel * height
    top = tl.minimum(tl.maximum(begin // OUT_WIDTH * STRIDE_H - PAD_H, 0), height)
    end = tl.where(channel < channels, (plane + last) * width, 0)
    image_x = x_ptr + tl.program_id(2).to(tl.int64) * x_image_lines * VECTOR
    run, first = run_of(image_x, x_image_lines, (plane + top) * width, end, ROWS, RUN, VECTOR)
    first -= tl.arange(0, ROWS)[:, None, None] * RUN

    top, left_side = pixel // OUT_WIDTH * STRIDE_H - PAD_H, pixel % OUT_WIDTH * STRIDE_W - PAD_W
    place = (tl.where(spilled, plane + height, plane) + top) * width + left_side - first
    bias = 0.0
    if RELU:
        bias = bias_of_rows(bias_ptr, channel, channels, spilled, ACC) + tl.zeros((ROWS, LINES, VECTOR), ACC)
        bias = bias.reshape(ALL)
    # A window of -inf alone goes to its first element inside the image.
    code = (tl.maximum(-top, 0) * KERNEL_W + tl.maximum(-left_side, 0)).reshape(ALL)
    exists = tl.broadcast_to(mask, (ROWS, LINES, VECTOR)).reshape(ALL)
    place = tl.where(exists, place.reshape(ALL), 0)
    top, left_side = top.reshape(ALL), left_side.reshape(ALL)
    best = tl.full((ALL,), -float("inf"), ACC)
    for i in tl.static_range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            at = place + (i * width + j)
            if CUT:
                inside = exists & (top + i >= 0) & (top + i < height) & (left_side + j >= 0) & (left_side + j < width)
                at = tl.where(inside, at, 0)
            x = tl.gather(run, at, 0)
            x = rectify(x, bias, ACC) if RELU else x.to(ACC)
            if CUT:
                x = tl.where(inside, x, -float("inf"))
            wins = (x > best) | (x != x)
            best = tl.where(wins, x, best)
            code = tl.where(wins, i * KERNEL_W + j, code)

    tl.store(y_ptr + image + here, best.reshape(ROWS, LINES, VECTOR).to(y_ptr.dtype.element_ty), mask)
    if code_ptr is not None:
        if RELU:
            code = tl.where(best <= 0, CLOSED, code)
        tl.store(code_ptr + image + here, code.to(tl.uint8).reshape(ROWS, LINES, VECTOR), mask)


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
    planes, rows = Planes.of(y, form), None
    if planes and Planes.of(x, form) and prod(window.kernel) <= MOST_TAPS:
        rows = planes.tile_over_runs(partial(_forward_run, x.shape[2:], y.shape[2:], window, planes.vector))
    if rows and y.numel():
        cut = any(
            padding or (out - 1) * stride + kernel > side
            for side, out, kernel, stride, padding in zip(x.shape[2:], y.shape[2:], *window[:3], strict=True)
        )
        _forward_rows[planes.grid(rows)](
            x,
            y,
            code if keep_code else None,
            bias,
            *planes.sizes,
            Planes.of(x, form).sizes[0],
            *x.shape[2:],
            y.shape[3],
            *window.kernel,
            *window.stride,
            *window.padding,
            CUT=cut,
            RELU=relu,
            ACC=accumulator(x),
            **rows,
        )
    elif y.numel():
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


def _forward_run(sides: list[int], out: list[int], window: Window, vector: int, elements: int) -> int:
    """Elements from a tile's first window's first row to its last window's last row, in the next plane perhaps, and
    those before it in its line."""
    (height, width), (kernel, stride, padding) = sides, (side[0] for side in window[:3])
    rows = (elements + out[1] - 2) // out[1] + 1
    within = min(height, (rows - 1) * stride + kernel)
    to_end = min(height, rows * stride + height + padding - out[0] * stride)
    spilled = min(height, max(0, (vector - 2) // out[1] * stride + kernel - padding))
    return vector - 1 + max(within, to_end + spilled) * width


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


@triton.jit
def _backward_rows(
    dy_ptr,
    code_ptr,
    dx_ptr,
    sum_ptr,
    image_lines,
    channels,
    pixels,
    y_image_lines,
    out_height,
    out_width,
    WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    RUN: tl.constexpr,
):
    image, channel, _, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    ALL: tl.constexpr = ROWS * LINES * VECTOR
    OVER_H: tl.constexpr = (KERNEL_H + STRIDE_H - 1) // STRIDE_H  # windows over an input, at most
    OVER_W: tl.constexpr = (KERNEL_W + STRIDE_W - 1) // STRIDE_W
    spilled, pixel, begin = place_in_rows(channel, left, here, pixels, LINES, VECTOR)

    # From the row of the first window over the first input to that of the last one over the last.
    last = tl.minimum((tl.minimum(begin + LINES * VECTOR, pixels) - 1) // WIDTH + PAD_H, out_height * STRIDE_H - 1)
    last = last // STRIDE_H + 1
    SPILL: tl.constexpr = ((VECTOR - 2) // WIDTH + PAD_H) // STRIDE_H + 1
    last = tl.where(begin + LINES * VECTOR > pixels, out_height + tl.minimum(SPILL, out_height), last)
    plane = channel * out_height
    top = tl.minimum(tl.maximum((begin // WIDTH + PAD_H) // STRIDE_H - (OVER_H - 1), 0), out_height)
    end = tl.where(channel < channels, (plane + last) * out_width, 0)
    image_y = tl.program_id(2).to(tl.int64) * y_image_lines * VECTOR
    top = (plane + top) * out_width
    dys, first = run_of(dy_ptr + image_y, y_image_lines, top, end, ROWS, RUN, VECTOR)
    codes, _ = run_of(code_ptr + image_y, y_image_lines, top, end, ROWS, RUN, VECTOR)
    first -= tl.arange(0, ROWS)[:, None, None] * RUN

    row, column = pixel // WIDTH + PAD_H, pixel % WIDTH + PAD_W
    out_row, out_column = (row // STRIDE_H).reshape(ALL), (column // STRIDE_W).reshape(ALL)
    place = tl.where(spilled, plane + out_height, plane) * out_width - first
    place = place.reshape(ALL) + out_row * out_width + out_column
    exists = tl.broadcast_to(mask, (ROWS, LINES, VECTOR)).reshape(ALL)
    # The input's place in the window that begins last; it lies whole strides further on in those that begin before.
    at_row, at_column = (row % STRIDE_H).reshape(ALL), (column % STRIDE_W).reshape(ALL)
    here_code = at_row * KERNEL_W + at_column
    dx = tl.zeros((ALL,), ACC)
    for i in tl.static_range(OVER_H):
        inside_i = exists & (out_row >= i) & (out_row < out_height + i)
        if (i + 1) * STRIDE_H > KERNEL_H:
            inside_i = inside_i & (at_row < KERNEL_H - i * STRIDE_H)
        for j in tl.static_range(OVER_W):
            inside = inside_i & (out_column >= j) & (out_column < out_width + j)
            if (j + 1) * STRIDE_W > KERNEL_W:
                inside = inside & (at_column < KERNEL_W - j * STRIDE_W)
            at = tl.where(inside, place - (i * out_width + j), 0)
            code = tl.gather(codes, at, 0).to(tl.int32)
            named = inside & (code == here_code + (i * STRIDE_H * KERNEL_W + j * STRIDE_W))
            dx += tl.where(named, tl.gather(dys, at, 0).to(ACC), 0.0)

    dx = dx.reshape(ROWS, LINES, VECTOR)
    tl.store(dx_ptr + image + here, dx.to(dx_ptr.dtype.element_ty), mask)
    if sum_ptr is not None:
        sum_rows(sum_ptr, channel, channels, dx, spilled)


def _backward_run(sides: list[int], out: list[int], window: Window, vector: int, elements: int) -> int:
    """As _forward_run, of the outputs whose windows hold a tile's inputs."""
    (height, width), (kernel, stride, padding) = sides, (side[0] for side in window[:3])
    rows, over = (elements + width - 2) // width + 1, triton.cdiv(kernel, stride)
    within = min(out[0], (rows + stride - 2) // stride + over)
    to_end = min(out[0], out[0] - (height - rows + padding) // stride + over - 1)
    spilled = min(out[0], ((vector - 2) // width + padding) // stride + 1)
    return vector - 1 + max(within, to_end + spilled) * out[1]


def backward(
    dy: Tensor, code: Tensor, form: torch.memory_format, sides: list[int], window: Window, want_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, db) for dense dy and code and an input of ``sides`` (height, width); db, if wanted, is dx summed over all
    but channels."""
    dx = torch.empty((*dy.shape[:2], *sides), dtype=dy.dtype, device=dy.device, memory_format=form)
    if not dx.numel():
        return dx, dx.new_zeros(dy.shape[1] if want_bias else 0)
    planes, rows = Planes.of(dx, form), None
    if planes and Planes.of(dy, form) and prod(window.kernel) <= MOST_TAPS:
        rows = planes.tile_over_runs(partial(_backward_run, sides, dy.shape[2:], window, planes.vector))
    if rows:
        grid = planes.grid(rows)
        sums = planes.partial_sums(dy, grid) if want_bias else None
        _backward_rows[grid](
            dy,
            code,
            dx,
            sums,
            *planes.sizes,
            Planes.of(dy, form).sizes[0],
            *dy.shape[2:],
            sides[1],
            *window.kernel,
            *window.stride,
            *window.padding,
            ACC=accumulator(dy),
            **rows,
        )
        return dx, dx.new_empty(0) if sums is None else add_up(sums, dy)
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
