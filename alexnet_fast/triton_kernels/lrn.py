"""Local response normalization across channels.

    y_c  = x_c · t_c^-β,    t_c = k + α/n · Σ_{j = c-⌊n/2⌋ … c+⌊(n-1)/2⌋} x_j²
    dx_c = dy_c · t_c^-β − 2αβ/n · x_c · Σ_{j: c in window of j} dy_j · x_j · t_j^-(β+1)

every window cut off at the ends of c's group.

Over channels_last a thread owns the 16 bytes of channels that make a line, and loads the lines on either side as well,
out of L1: 3 loads of x forward for each line, 3 of x and 3 of dy backward. Taken apart, their elements are a thread's
own registers, so windows need no exchange and no other load. Backward computes t for the channels of its line and for
those that reach into them.

In NCHW lines are pixels, and planes of an odd number of them begin anywhere within a line. But j planes after the
elements of a line lie those of one line or of two that follow each other, at a place that is the same for all lines:
both are loaded (9 loads forward in a window of 5, 17 of x and 9 of dy backward, all but a few of them from L1, for a
tile is 16 planes high), and the line's elements picked from their registers. A group begins and ends with a line, so
what lies beyond it is masked by whole lines. Backward computes t at each of the n channels whose window holds c.
Instructions an element, NCHW, bfloat16 (float32): forward 42 (60), before 84 (84); backward 129 (138) in 80 registers,
before 224 (226) in 198.

Where images or groups are no whole lines, and for wider windows, a window's other channels are loaded again, element by
element, shifted, from the cache.
Bytes: forward reads x and writes y, backward reads x and dy and writes dx, each once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import LRN, memory_format
from alexnet_fast.triton_kernels.launch import INTERPRETED, accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import (
    Planes,
    Sheet,
    add_up,
    apart,
    bias_of,
    lines_of,
    rectify,
    rows_of,
    sum_rows,
    tile_of,
    together,
)

# Of a plane, side by side in a tile of rows: 16, so that 16 planes of 256 threads share most of their halo.
HALO_LINES = 1024 if INTERPRETED else 16
WIDEST = 7  # window over rows of lines


@triton.jit
def powers(t, BETA: tl.constexpr):
    """(t^-β, t^-1), without a power function for the exponents in use."""
    if BETA == 0.75:
        r = tl.rsqrt(t)
        power, inverse = r * tl.sqrt(r), r * r
    elif BETA == 0.5:
        power = tl.rsqrt(t)
        inverse = power * power
    else:
        inverse = 1.0 / t
        if BETA == 1.0:
            power = inverse
        elif BETA == 0.0:
            power = tl.full(t.shape, 1.0, t.dtype)
        else:
            power = tl.exp2(-BETA * tl.log2(t))
    return power, inverse


@triton.jit
def neighbour(
    row_ptr,
    channel,
    mask,
    group,
    channel_stride,
    bias_ptr,
    bias_channels,
    J: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
):
    """x at `channel + J` of each pixel (whose memory begins at row_ptr), 0 beyond the ends of the channel's group; with
    RELU, max(0, x + bias)."""
    first = channel // group * group
    inside = mask & (channel + J >= first) & (channel + J < first + group)
    x = tl.load(row_ptr + (channel + J).to(tl.int64) * channel_stride, inside, other=0)
    if RELU:
        bias = bias_of(bias_ptr, channel + J, inside, bias_channels, ACC)
        return tl.where(inside, rectify(x, bias, ACC), 0.0)
    return x.to(ACC)


@triton.jit
def line_of(
    x_ptr,
    here,
    line,
    mask,
    group_lines,
    bias_ptr,
    J: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """x in the lines ``J`` after the own ones, taken apart, 0 beyond the ends of the line's group; with RELU, max(0, x
    + bias). x_ptr: of the program's first pixel."""
    inside = mask & (line % group_lines + J >= 0) & (line % group_lines + J < group_lines)
    x = tl.load(x_ptr + (here + J * VECTOR), inside, other=0)
    if RELU:
        channel = (line + J) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + channel, inside, other=0).to(ACC)
        r = tl.where(inside, rectify(x, bias, ACC), 0.0)
    else:
        r = x.to(ACC)
    return apart(r, VECTOR)


@triton.jit
def moved_line(
    image_ptr, line, inside_line, mask, group_lines, pixels, J: tl.constexpr, PHASE: tl.constexpr, VECTOR: tl.constexpr
):
    """The elements J planes after those of each line, taken apart, 0 beyond the ends of the line's group: of one line,
    or of two that follow each other. inside_line: its number in the group. PHASE: pixels % VECTOR."""
    FIRST: tl.constexpr = J * PHASE % VECTOR
    parts = ()
    for i in tl.static_range(2 if FIRST else 1):
        step = (J * pixels - FIRST) // VECTOR + i
        inside = mask & (inside_line + step >= 0) & (inside_line + step < group_lines)
        x = tl.load(image_ptr + (line + step) * VECTOR + tl.arange(0, VECTOR)[None, None, :], inside, other=0)
        parts += apart(x, VECTOR)
    moved = ()
    for i in tl.static_range(VECTOR):
        moved += (parts[FIRST + i],)
    return moved


@triton.jit
def window_sum(values, FIRST: tl.constexpr, LAST: tl.constexpr):
    """values[FIRST] + ... + values[LAST]"""
    total = values[FIRST]
    for i in tl.static_range(FIRST + 1, LAST + 1):
        total += values[i]
    return total


@triton.jit
def squares_of(values):
    squares = ()
    for i in tl.static_range(len(values)):
        squares += (values[i] * values[i],)
    return squares


# ---- Forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    r_ptr,
    bias_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    group,
    bias_channels,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    _, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    row = pixel.to(tl.int64) * pixel_stride
    total = tl.zeros((PIXELS, CHANNELS), ACC)
    for j in tl.static_range(-BEFORE, AFTER + 1):
        x = neighbour(x_ptr + row, channel, mask, group, channel_stride, bias_ptr, bias_channels, j, RELU, ACC)
        total += x * x
    x = neighbour(x_ptr + row, channel, mask, group, channel_stride, bias_ptr, bias_channels, 0, RELU, ACC)
    here = row + channel.to(tl.int64) * channel_stride
    if r_ptr is not None:
        tl.store(r_ptr + here, x, mask)
    power, _ = powers(K + SCALE * total, BETA)
    tl.store(y_ptr + here, x * power, mask)


@triton.jit
def _forward_lines(
    x_ptr,
    y_ptr,
    r_ptr,
    bias_ptr,
    pixels,
    lines,
    group_lines,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
):
    _, first, here, line, mask = lines_of(pixels, lines, PIXELS, LINES, VECTOR, INDEX)
    x_ptr += first
    left = line_of(x_ptr, here, line, mask, group_lines, bias_ptr, -1, RELU, ACC, VECTOR)
    own = line_of(x_ptr, here, line, mask, group_lines, bias_ptr, 0, RELU, ACC, VECTOR)
    right = line_of(x_ptr, here, line, mask, group_lines, bias_ptr, 1, RELU, ACC, VECTOR)
    squares = squares_of(left + own + right)
    y = ()
    for i in tl.static_range(VECTOR):
        total = window_sum(squares, VECTOR + i - BEFORE, VECTOR + i + AFTER)
        power, _ = powers(K + SCALE * total, BETA)
        y += (own[i] * power,)
    if r_ptr is not None:
        tl.store(r_ptr + first + here, together(own, VECTOR).to(r_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + first + here, together(y, VECTOR).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def _forward_rows(
    x_ptr,
    y_ptr,
    r_ptr,
    bias_ptr,
    image_lines,
    channels,
    pixels,
    group,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    PHASE: tl.constexpr,
):
    image, channel, line, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    first = channel // group * group
    group_lines, inside_line = group * pixels // VECTOR, line - first * pixels // VECTOR
    own, squares = (), ()
    for j in tl.static_range(-BEFORE, AFTER + 1):
        x = moved_line(x_ptr + image, line, inside_line, mask, group_lines, pixels, j, PHASE, VECTOR)
        bias, after = 0.0, 0.0
        if RELU and bias_ptr is not None:
            row = (channel + j).reshape(ROWS)
            begin = first.reshape(ROWS)
            end = tl.minimum(begin + group, channels)
            bias = tl.load(bias_ptr + row, (row >= begin) & (row < end), other=0)[:, None].to(ACC)
            after = tl.load(bias_ptr + row + 1, (row + 1 >= begin) & (row + 1 < end), other=0)[:, None].to(ACC)
        for i in tl.static_range(VECTOR):
            value = x[i].to(ACC)
            if RELU:
                value = rectify(x[i], tl.where(i >= left.reshape(ROWS, LINES), after, bias), ACC)
            squares += (value * value,)
            if j == 0:
                own += (value,)
    y = ()
    for i in tl.static_range(VECTOR):
        total = squares[i]
        for j in tl.static_range(1, BEFORE + AFTER + 1):
            total += squares[j * VECTOR + i]
        power, _ = powers(K + SCALE * total, BETA)
        y += (own[i] * power,)
    if r_ptr is not None:
        tl.store(r_ptr + image + here, together(own, VECTOR).to(r_ptr.dtype.element_ty), mask)
    tl.store(y_ptr + image + here, together(y, VECTOR).to(y_ptr.dtype.element_ty), mask)


def forward(
    x: Tensor, form: torch.memory_format, lrn: LRN, bias: Tensor | None = None, relu: bool = False, keep_r: bool = False
) -> tuple[Tensor, Tensor]:
    """(y, r) for a dense x in layout ``form``: y = lrn(r) with r = max(0, x + bias) if ``relu``, else x. r comes back
    empty without ``keep_r``."""
    y = torch.empty_like(x)
    r = torch.empty_like(x) if keep_r else x.new_empty(0)
    if x.numel():
        sheet, constants = Sheet.of(x, form), _constants(x, lrn)
        tensors = (x, y, r if keep_r else None, bias)
        lines, rows = sheet.lines(x.shape[1] // lrn.groups), _rows(x, form, lrn)
        if rows is not None:
            grid, sizes, tile = rows
            _forward_rows[grid](*tensors, *sizes, RELU=relu, **constants, **tile)
        elif lines is not None and max(constants["BEFORE"], constants["AFTER"]) <= sheet.vector:
            _forward_lines[sheet.grid](*tensors, *_lines(x, lrn, sheet), RELU=relu, **constants, **lines)
        else:
            _forward_kernel[sheet.grid](*tensors, *sheet.sizes, *_window(x, lrn), RELU=relu, **constants, **sheet.tile)
    return y, r


# ---- Backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    dx_ptr,
    sum_ptr,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    group,
    bias_channels,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    tile_row, pixel, channel, mask = tile_of(pixels, channels, PIXELS, CHANNELS, INDEX)
    row = pixel.to(tl.int64) * pixel_stride
    first = channel // group * group
    dx = tl.zeros((PIXELS, CHANNELS), ACC)
    through = tl.zeros((PIXELS, CHANNELS), ACC)  # Σ dy_j · x_j · t_j^-(β+1)
    for j in tl.static_range(-AFTER, BEFORE + 1):
        total = tl.zeros((PIXELS, CHANNELS), ACC)
        for i in tl.static_range(j - BEFORE, j + AFTER + 1):
            x = neighbour(x_ptr + row, channel, mask, group, channel_stride, None, bias_channels, i, False, ACC)
            total += x * x
        power, inverse = powers(K + SCALE * total, BETA)
        x = neighbour(x_ptr + row, channel, mask, group, channel_stride, None, bias_channels, j, False, ACC)
        dy = neighbour(dy_ptr + row, channel, mask, group, channel_stride, None, bias_channels, j, False, ACC)
        direct = dy * power
        inside = (channel + j >= first) & (channel + j < first + group)
        through += tl.where(inside, direct * x * inverse, 0.0)
        if j == 0:
            dx = direct
    x = neighbour(x_ptr + row, channel, mask, group, channel_stride, None, bias_channels, 0, False, ACC)
    if BETA != 0.0:  # with β = 0, y is x, and the sum may hold 0 / 0
        dx -= 2 * SCALE * BETA * x * through
    if RELU:
        dx = tl.where(x <= 0, 0.0, dx)
    tl.store(dx_ptr + row + channel.to(tl.int64) * channel_stride, dx, mask)
    if sum_ptr is not None:
        column = tl.sum(tl.where(mask, dx, 0.0), 0, keep_dims=True)
        tl.store(sum_ptr + tile_row.to(tl.int64) * channels + channel, column, channel < channels)


@triton.jit
def _backward_lines(
    dy_ptr,
    x_ptr,
    dx_ptr,
    sum_ptr,
    pixels,
    lines,
    group_lines,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
):
    tile_row, first, here, line, mask = lines_of(pixels, lines, PIXELS, LINES, VECTOR, INDEX)
    x_ptr += first
    dy_ptr += first
    x, dy = (), ()
    for j in tl.static_range(-1, 2):
        x += line_of(x_ptr, here, line, mask, group_lines, None, j, False, ACC, VECTOR)
        dy += line_of(dy_ptr, here, line, mask, group_lines, None, j, False, ACC, VECTOR)
    squares = squares_of(x)
    own = (line % group_lines * VECTOR).reshape(1, LINES)  # the line's first channel in its group
    direct, product = (), ()  # dy_j · t_j^-β, and that · x_j / t_j, of channels -AFTER … VECTOR - 1 + BEFORE
    for j in tl.static_range(VECTOR - AFTER, 2 * VECTOR + BEFORE):
        power, inverse = powers(K + SCALE * window_sum(squares, j - BEFORE, j + AFTER), BETA)
        value = dy[j] * power
        through = value * x[j] * inverse
        if j < VECTOR or j >= 2 * VECTOR:  # beyond the group's ends there is none: not even 0 / 0
            channel = own + (j - VECTOR)
            through = tl.where((channel >= 0) & (channel < group_lines * VECTOR), through, 0.0)
        direct += (value,)
        product += (through,)
    dx = ()
    for i in tl.static_range(VECTOR):
        value = direct[i + AFTER]
        if BETA != 0.0:  # with β = 0, y is x, and the sum may hold 0 / 0
            value -= 2 * SCALE * BETA * x[VECTOR + i] * window_sum(product, i, i + AFTER + BEFORE)
        if RELU:
            value = tl.where(x[VECTOR + i] <= 0, 0.0, value)
        dx += (value,)
    whole = together(dx, VECTOR)
    tl.store(dx_ptr + first + here, whole.to(dx_ptr.dtype.element_ty), mask)
    if sum_ptr is not None:
        column = tl.sum(tl.where(mask, whole, 0.0), 0, keep_dims=True)
        channel = line * VECTOR + tl.arange(0, VECTOR)[None, None, :]
        tl.store(sum_ptr + tile_row.to(tl.int64) * lines * VECTOR + channel, column, line < lines)


@triton.jit
def _backward_rows(
    dy_ptr,
    x_ptr,
    dx_ptr,
    sum_ptr,
    image_lines,
    channels,
    pixels,
    group,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    SCALE: tl.constexpr,
    BETA: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    PHASE: tl.constexpr,
):
    image, channel, line, left, here, mask = rows_of(image_lines, channels, pixels, ROWS, LINES, VECTOR)
    first = channel // group * group
    group_lines, inside_line = group * pixels // VECTOR, line - first * pixels // VECTOR
    x_ptr += image
    dy_ptr += image
    REACH: tl.constexpr = BEFORE + AFTER
    x, dy = (), ()  # of channels -REACH … REACH and -AFTER … BEFORE
    for j in tl.static_range(-REACH, REACH + 1):
        x += moved_line(x_ptr, line, inside_line, mask, group_lines, pixels, j, PHASE, VECTOR)
        if j >= -AFTER and j <= BEFORE:
            dy += moved_line(dy_ptr, line, inside_line, mask, group_lines, pixels, j, PHASE, VECTOR)
    dx = ()
    for i in tl.static_range(VECTOR):
        own = x[REACH * VECTOR + i].to(ACC)
        direct = own
        through = tl.zeros((ROWS, LINES), ACC)  # Σ dy_j · x_j · t_j^-(β+1)
        for j in tl.static_range(-AFTER, BEFORE + 1):
            total = tl.zeros((ROWS, LINES), ACC)
            for k in tl.static_range(j - BEFORE, j + AFTER + 1):
                value = x[(REACH + k) * VECTOR + i].to(ACC)
                total += value * value
            power, inverse = powers(K + SCALE * total, BETA)
            value = dy[(AFTER + j) * VECTOR + i].to(ACC) * power
            if j == 0:
                direct = value
            value = value * x[(REACH + j) * VECTOR + i].to(ACC) * inverse
            if K <= 0 or SCALE < 0:  # t may be 0: beyond the group's ends there is none, not even 0 / 0
                element = inside_line.reshape(ROWS, LINES) * VECTOR + i + j * pixels
                value = tl.where((element >= 0) & (element < group_lines * VECTOR), value, 0.0)
            through += value
        value = direct
        if BETA != 0.0:  # with β = 0, y is x, and the sum may hold 0 / 0
            value -= 2 * SCALE * BETA * own * through
        if RELU:
            value = tl.where(own <= 0, 0.0, value)
        dx += (value,)
    whole = together(dx, VECTOR)
    tl.store(dx_ptr + image + here, whole.to(dx_ptr.dtype.element_ty), mask)
    if sum_ptr is not None:
        spilled = tl.arange(0, VECTOR)[None, None, :] >= left
        sum_rows(sum_ptr, channel, channels, tl.where(mask, whole, 0.0), spilled)


def backward(
    dy: Tensor, x: Tensor, form: torch.memory_format, lrn: LRN, relu: bool = False, want_bias: bool = False
) -> tuple[Tensor, Tensor]:
    """(dx, db) for dense dy and x. With ``relu``, x is max(0, z + bias), dx is ∂L/∂z, and db, if wanted, ∂L/∂bias."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, dx.new_zeros(x.shape[1] if want_bias else 0)
    constants, rows = _constants(x, lrn), _rows(x, form, lrn)
    if rows is not None:
        grid, sizes, tile = rows
        sums = Planes.partial_sums(x, grid) if want_bias else None
        _backward_rows[grid](dy, x, dx, sums, *sizes, RELU=relu, **constants, **tile)
        return dx, dx.new_empty(0) if sums is None else add_up(sums, x)
    sheet = Sheet.of(x, form)
    sums = sheet.partial_sums(x) if want_bias else None
    tensors, lines = (dy, x, dx, sums), sheet.lines(x.shape[1] // lrn.groups)
    if lines is not None and constants["BEFORE"] + constants["AFTER"] <= sheet.vector:
        _backward_lines[sheet.grid](*tensors, *_lines(x, lrn, sheet), RELU=relu, **constants, **lines)
    else:
        _backward_kernel[sheet.grid](*tensors, *sheet.sizes, *_window(x, lrn), RELU=relu, **constants, **sheet.tile)
    return dx, dx.new_empty(0) if sums is None else add_up(sums, x)


def _window(x: Tensor, lrn: LRN) -> tuple[int, int]:
    return x.shape[1] // lrn.groups, x.shape[1]


def _lines(x: Tensor, lrn: LRN, sheet: Sheet) -> tuple[int, int, int]:
    return sheet.pixels, sheet.channels // sheet.vector, x.shape[1] // lrn.groups // sheet.vector


def _rows(x: Tensor, form: torch.memory_format, lrn: LRN) -> tuple[tuple, tuple, dict] | None:
    """Grid, sizes and constants of kernels over rows of lines; None where groups are not whole lines, or windows wider
    than WIDEST, of which a thread would hold too many lines."""
    planes, group = Planes.of(x, form), x.shape[1] // lrn.groups
    if planes is None or group * planes.pixels % planes.vector or min(lrn.size, 2 * group - 1) > WIDEST:
        return None
    tile = planes.tile(longest=HALO_LINES)
    return planes.grid(tile), (*planes.sizes, group), {**tile, "PHASE": planes.pixels % planes.vector}


def _constants(x: Tensor, lrn: LRN) -> dict:
    reach = x.shape[1] // lrn.groups - 1  # a window never sees more than its group
    return {
        "BEFORE": min(lrn.size // 2, reach),
        "AFTER": min((lrn.size - 1) // 2, reach),
        "SCALE": lrn.alpha / lrn.size,
        "BETA": lrn.beta,
        "K": lrn.k,
        "ACC": accumulator(x),
    }


# ---- Operators -------------------------------------------------------------------------------------------------------


@implements("lrn")
def _lrn(x: Tensor, *lrn) -> Tensor:
    form = memory_format(x)
    return forward(*dense(form, x), form, LRN(*lrn))[0]


@implements("lrn_backward")
def _lrn_backward(dy: Tensor, x: Tensor, *lrn) -> Tensor:
    form = memory_format(x)
    return backward(*dense(form, dy, x), form, LRN(*lrn))[0]
