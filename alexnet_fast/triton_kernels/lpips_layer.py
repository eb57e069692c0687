"""How far two images' features in a layer are from each other, as LPIPS measures it.

    d_p = Σ_c w_c · (a_cp s_p − b_cp t_p)²,    s = 1 / (|a| + ε), t = 1 / (|b| + ε), 0 where the length is

Tile: a stretch of one pair's pixels by 32 channels, through which a program walks: once for lengths, once for
differences, and backward once more to write. What it reads again comes from L1 or L2.

In NCHW a pixel's channels lie at any place within 16 bytes, but those a line's elements apart (4 or 8) at the same one.
So a program's rows are a multiple of that many channels: on its walk an element of its lines remains one pixel, whose
sum grows in a register. Only the sums of all rows are brought to their pixels, through shared memory (tl.gather), and
what pixels need to the lines. Lines that reach out of a stretch are loaded whole, and stored by single elements. Where
images are no whole lines, elements are loaded and stored one by one.
Instructions an element of x, NCHW, 96 channels, bfloat16 (float32): forward 11 (10), before 28 (26); backward 29 (27),
before 56 (51).
Bytes: forward reads x, backward reads x and writes dx, each once from memory.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import memory_format
from alexnet_fast.triton_kernels.launch import accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import ELEMENTS, Planes

EPSILON = 1e-10  # csrc/params.h's kLpipsEpsilon


@triton.jit
def place(pixels, channels, pixel_stride, PIXELS: tl.constexpr):
    """This program's pair and pixels (a column), where in memory the first image's are, and which of them exist."""
    across = tl.cdiv(pixels, PIXELS)
    pair = (tl.program_id(0) // across).to(tl.int64)
    pixel = (tl.program_id(0) % across * PIXELS + tl.arange(0, PIXELS))[:, None]
    return pair, pixel, pair * pixels * channels + pixel.to(tl.int64) * pixel_stride, pixel < pixels


@triton.jit
def features(row_ptr, first, channels, channel_stride, exists, ACC: tl.constexpr, CHANNELS: tl.constexpr):
    """Of the next channels: their numbers (a row), which pairs of pixel and channel exist, and x."""
    channel = (first + tl.arange(0, CHANNELS))[None, :]
    mask = exists & (channel < channels)
    return channel, mask, tl.load(row_ptr + channel.to(tl.int64) * channel_stride, mask, other=0).to(ACC)


@triton.jit
def lengths(
    row_ptr, second, channels, channel_stride, exists, ACC: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Σ a² and Σ b² of each pixel."""
    aa = tl.zeros((PIXELS, CHANNELS), ACC)
    bb = tl.zeros((PIXELS, CHANNELS), ACC)
    for first in range(0, channels, CHANNELS):
        _, _, a = features(row_ptr, first, channels, channel_stride, exists, ACC, CHANNELS)
        _, _, b = features(row_ptr + second, first, channels, channel_stride, exists, ACC, CHANNELS)
        aa += a * a
        bb += b * b
    return tl.sum(aa, 1, keep_dims=True), tl.sum(bb, 1, keep_dims=True)


@triton.jit
def inverse(square, EPSILON: tl.constexpr):
    return tl.where(square == 0, 0.0, 1.0 / (tl.sqrt(square) + EPSILON))


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    second,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    SPATIAL: tl.constexpr,
    EPSILON: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pair, pixel, offset, exists = place(pixels, channels, pixel_stride, PIXELS)
    row = x_ptr + offset
    aa, bb = lengths(row, second, channels, channel_stride, exists, ACC, PIXELS, CHANNELS)
    s, t = inverse(aa, EPSILON), inverse(bb, EPSILON)
    total = tl.zeros((PIXELS, CHANNELS), ACC)
    for first in range(0, channels, CHANNELS):
        channel, _, a = features(row, first, channels, channel_stride, exists, ACC, CHANNELS)
        _, _, b = features(row + second, first, channels, channel_stride, exists, ACC, CHANNELS)
        difference = a * s - b * t
        total += tl.load(weight_ptr + channel, channel < channels, other=0) * difference * difference
    distance = tl.sum(total, 1, keep_dims=True)
    if SPATIAL:
        tl.store(y_ptr + pair * pixels + pixel, distance, exists)
    else:
        tl.store(y_ptr + tl.program_id(0), tl.sum(tl.where(exists, distance, 0.0)))


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    sum_ptr,
    second,
    pixels,
    channels,
    pixel_stride,
    channel_stride,
    SPATIAL: tl.constexpr,
    EPSILON: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    pair, pixel, offset, exists = place(pixels, channels, pixel_stride, PIXELS)
    row = x_ptr + offset
    aa, bb = lengths(row, second, channels, channel_stride, exists, ACC, PIXELS, CHANNELS)
    s, t = inverse(aa, EPSILON), inverse(bb, EPSILON)
    ha = tl.zeros((PIXELS, CHANNELS), ACC)
    hb = tl.zeros((PIXELS, CHANNELS), ACC)
    for first in range(0, channels, CHANNELS):
        channel, mask, a = features(row, first, channels, channel_stride, exists, ACC, CHANNELS)
        _, _, b = features(row + second, first, channels, channel_stride, exists, ACC, CHANNELS)
        h = tl.load(weight_ptr + channel, channel < channels, other=0) * (a * s - b * t)
        ha += h * a
        hb += h * b
    if SPATIAL:
        g = tl.load(dy_ptr + pair * pixels + pixel, exists, other=0)
    else:
        g = tl.where(exists, tl.load(dy_ptr + pair) / pixels, 0.0)
    along_a = tl.where(aa == 0, 0.0, 2 * g * tl.sum(ha, 1, keep_dims=True) * s * s / tl.sqrt(aa))
    along_b = tl.where(bb == 0, 0.0, 2 * g * tl.sum(hb, 1, keep_dims=True) * t * t / tl.sqrt(bb))
    for first in range(0, channels, CHANNELS):
        channel, mask, a = features(row, first, channels, channel_stride, exists, ACC, CHANNELS)
        _, _, b = features(row + second, first, channels, channel_stride, exists, ACC, CHANNELS)
        difference = a * s - b * t
        h = 2 * g * tl.load(weight_ptr + channel, channel < channels, other=0) * difference
        here = dx_ptr + offset + channel.to(tl.int64) * channel_stride
        tl.store(here, h * s - a * along_a, mask)
        tl.store(here + second, b * along_b - h * t, mask)
        if sum_ptr is not None:
            sums = tl.sum(g * difference * difference, 0, keep_dims=True)
            tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * channels + channel, sums, channel < channels)


# ---- NCHW, by lines --------------------------------------------------------------------------------------------------


@triton.jit
def stretch_of(pixels, stretch, ROWS: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """This program's stretch of a plane: its first pixel, how many there are, the offsets of its lines' elements in the
    image, for the first ROWS channels, at which pixels the lines begin, counted from the first one, and where among the
    elements of a tile the stretch's pixels are in each row."""
    first = tl.program_id(0) * stretch
    plane = tl.arange(0, ROWS) * pixels + first
    begin = plane[:, None, None]
    line = begin // VECTOR + tl.arange(0, LINES)[None, :, None]
    element = line * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    row = tl.arange(0, LINES * VECTOR)[None, :] + (plane % VECTOR)[:, None]
    places = tl.arange(0, ROWS)[:, None] * (LINES * VECTOR) + tl.minimum(row, LINES * VECTOR - 1)
    return (
        first,
        tl.minimum(stretch, pixels - first),
        element,
        line * VECTOR - begin,
        places.reshape(ROWS * LINES * VECTOR),
    )


@triton.jit
def sum_of_pixels(x, places, exists, ROWS: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """The sum of each pixel's elements in a tile, 0 beyond the stretch."""
    moved = tl.gather(x.reshape(ROWS * LINES * VECTOR), places, 0).reshape(ROWS, LINES * VECTOR)
    return tl.where(exists, tl.sum(moved, 0), 0.0)


@triton.jit
def of_elements(numbers, pixel, ROWS: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """Each element's pixel's number; any number for elements of others."""
    place = tl.minimum(tl.maximum(pixel, 0), LINES * VECTOR - 1).reshape(ROWS * LINES * VECTOR)
    return tl.gather(numbers, place, 0).reshape(ROWS, LINES, VECTOR)


@triton.jit
def pair_of(x_ptr, second, element, mask, ACC: tl.constexpr):
    """a and b."""
    a = tl.load(x_ptr + element, mask, other=0).to(ACC)
    return a, tl.load(x_ptr + second + element, mask, other=0).to(ACC)


@triton.jit
def weight_of_rows(weight_ptr, start, channels, ROWS: tl.constexpr):
    channel = start + tl.arange(0, ROWS)
    return tl.load(weight_ptr + channel, channel < channels, other=0)[:, None, None]


@triton.jit
def lengths_of_pixels(
    x_ptr,
    second,
    pixels,
    channels,
    element,
    there,
    places,
    exists,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Σ a² and Σ b² of each pixel of the stretch."""
    aa = tl.zeros((ROWS, LINES, VECTOR), ACC)
    bb = tl.zeros((ROWS, LINES, VECTOR), ACC)
    for first in range(0, channels, ROWS):
        mask = there & (first + tl.arange(0, ROWS)[:, None, None] < channels)
        a, b = pair_of(x_ptr, second, element, mask, ACC)
        aa += a * a
        bb += b * b
        element += ROWS // VECTOR * pixels * VECTOR
    aa = sum_of_pixels(aa, places, exists, ROWS, LINES, VECTOR)
    return aa, sum_of_pixels(bb, places, exists, ROWS, LINES, VECTOR)


@triton.jit
def _forward_rows(
    x_ptr,
    weight_ptr,
    y_ptr,
    image_lines,
    channels,
    pixels,
    stretch,
    SPATIAL: tl.constexpr,
    EPSILON: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    first, count, element, at, places = stretch_of(pixels, stretch, ROWS, LINES, VECTOR)
    pair = tl.program_id(1).to(tl.int64)
    x_ptr += pair * image_lines * VECTOR
    second = tl.num_programs(1).to(tl.int64) * image_lines * VECTOR
    own = tl.arange(0, LINES * VECTOR)
    pixel, there = at + tl.arange(0, VECTOR)[None, None, :], at < count
    aa, bb = lengths_of_pixels(
        x_ptr, second, pixels, channels, element, there, places, own < count, ACC, ROWS, LINES, VECTOR
    )
    s = of_elements(inverse(aa, EPSILON), pixel, ROWS, LINES, VECTOR)
    t = of_elements(inverse(bb, EPSILON), pixel, ROWS, LINES, VECTOR)
    total = tl.zeros((ROWS, LINES, VECTOR), ACC)
    for start in range(0, channels, ROWS):
        channel = start + tl.arange(0, ROWS)[:, None, None]
        a, b = pair_of(x_ptr, second, element, there & (channel < channels), ACC)
        difference = a * s - b * t
        total += weight_of_rows(weight_ptr, start, channels, ROWS) * difference * difference
        element += ROWS // VECTOR * pixels * VECTOR
    distance = sum_of_pixels(total, places, own < count, ROWS, LINES, VECTOR)
    if SPATIAL:
        tl.store(y_ptr + pair * pixels + first + own, distance, own < count)
    else:
        tl.store(y_ptr + pair * tl.num_programs(0) + tl.program_id(0), tl.sum(distance))


@triton.jit
def _backward_rows(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    sum_ptr,
    image_lines,
    channels,
    pixels,
    stretch,
    SPATIAL: tl.constexpr,
    EPSILON: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    first, count, element, at, places = stretch_of(pixels, stretch, ROWS, LINES, VECTOR)
    pair = tl.program_id(1).to(tl.int64)
    x_ptr += pair * image_lines * VECTOR
    dx_ptr += pair * image_lines * VECTOR
    second = tl.num_programs(1).to(tl.int64) * image_lines * VECTOR
    own = tl.arange(0, LINES * VECTOR)
    pixel, there = at + tl.arange(0, VECTOR)[None, None, :], at < count
    whole, inside = (at >= 0) & (at + VECTOR <= count), (pixel >= 0) & (pixel < count)
    aa, bb = lengths_of_pixels(
        x_ptr, second, pixels, channels, element, there, places, own < count, ACC, ROWS, LINES, VECTOR
    )
    own_s, own_t = inverse(aa, EPSILON), inverse(bb, EPSILON)
    s = of_elements(own_s, pixel, ROWS, LINES, VECTOR)
    t = of_elements(own_t, pixel, ROWS, LINES, VECTOR)
    ha = tl.zeros((ROWS, LINES, VECTOR), ACC)
    hb = tl.zeros((ROWS, LINES, VECTOR), ACC)
    again = element
    for start in range(0, channels, ROWS):
        channel = start + tl.arange(0, ROWS)[:, None, None]
        a, b = pair_of(x_ptr, second, again, there & (channel < channels), ACC)
        h = weight_of_rows(weight_ptr, start, channels, ROWS) * (a * s - b * t)
        ha += h * a
        hb += h * b
        again += ROWS // VECTOR * pixels * VECTOR
    if SPATIAL:
        own_g = tl.load(dy_ptr + pair * pixels + first + own, own < count, other=0)
        g = of_elements(own_g, pixel, ROWS, LINES, VECTOR)
    else:
        own_g = tl.load(dy_ptr + pair) / pixels
        g = own_g
    ha = sum_of_pixels(ha, places, own < count, ROWS, LINES, VECTOR)
    hb = sum_of_pixels(hb, places, own < count, ROWS, LINES, VECTOR)
    own_a = tl.where(aa == 0, 0.0, 2 * own_g * ha * own_s * own_s / tl.sqrt(aa))
    own_b = tl.where(bb == 0, 0.0, 2 * own_g * hb * own_t * own_t / tl.sqrt(bb))
    along_a = of_elements(own_a, pixel, ROWS, LINES, VECTOR)
    along_b = of_elements(own_b, pixel, ROWS, LINES, VECTOR)
    for start in range(0, channels, ROWS):
        channel = start + tl.arange(0, ROWS)[:, None, None]
        exists = channel < channels
        a, b = pair_of(x_ptr, second, element, there & exists, ACC)
        difference = a * s - b * t
        h = 2 * g * weight_of_rows(weight_ptr, start, channels, ROWS) * difference
        da = (h * s - a * along_a).to(dx_ptr.dtype.element_ty)
        db = (b * along_b - h * t).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + element, da, whole & exists)
        tl.store(dx_ptr + second + element, db, whole & exists)
        tl.store(dx_ptr + element, da, inside & exists & (whole == 0))
        tl.store(dx_ptr + second + element, db, inside & exists & (whole == 0))
        if sum_ptr is not None:
            sums = tl.sum(tl.sum(tl.where(inside, g * difference * difference, 0.0), 2), 1)
            row = start + tl.arange(0, ROWS)
            program = pair * tl.num_programs(0) + tl.program_id(0)
            tl.store(sum_ptr + program * channels + row, sums, row < channels)
        element += ROWS // VECTOR * pixels * VECTOR


def _stretches(planes: Planes) -> tuple[int, dict]:
    """Pixels of a stretch, and the launch's constants: a line for each of 128 threads, as many of a plane side by side
    as leave few without one. As stretches begin anywhere in a line, VECTOR - 1 of its lines' elements are others'."""
    vector, threads = planes.vector, ELEMENTS // 8

    def pixels(side: int) -> int:
        return triton.cdiv(planes.pixels, triton.cdiv(planes.pixels, side * vector - vector + 1))

    sides = [2**i for i in range(3, (threads // vector).bit_length())]
    side = min(sides, key=lambda side: (triton.cdiv(planes.pixels, pixels(side)) * side, -side))
    return pixels(side), {"ROWS": threads // side, "LINES": side, "VECTOR": vector, "num_warps": 4}


# ---- Operators -------------------------------------------------------------------------------------------------------


def _launch(x: Tensor, form: torch.memory_format, spatial: bool) -> tuple[bool, tuple[int, ...], tuple, dict]:
    """Whether by lines, the grid, the arguments that address x, and the constants."""
    pairs, channels, pixels = x.shape[0] // 2, x.shape[1], x.shape[2] * x.shape[3]
    constants = {"SPATIAL": spatial, "EPSILON": EPSILON, "ACC": accumulator(x)}
    if planes := Planes.of(x, form):
        stretch, tile = _stretches(planes)
        return True, (triton.cdiv(pixels, stretch), pairs), (*planes.sizes, stretch), constants | tile
    wide = min(32, triton.next_power_of_2(channels))
    high = min(ELEMENTS // wide, triton.next_power_of_2(pixels))
    strides = (channels, 1) if form == torch.channels_last else (1, pixels)
    places = (pairs * channels * pixels, pixels, channels, *strides)
    return False, (pairs * triton.cdiv(pixels, high),), places, constants | {"PIXELS": high, "CHANNELS": wide}


@implements("lpips_layer")
def _lpips_layer(x: Tensor, weight: Tensor, spatial: bool) -> Tensor:
    form = memory_format(x)
    (x,) = dense(form, x)
    pairs, sides = x.shape[0] // 2, x.shape[2:]
    y = weight.new_empty((pairs, 1, *(sides if spatial else (1, 1))))
    if not pairs:
        return y
    by_lines, grid, places, constants = _launch(x, form, spatial)
    made = y if spatial else weight.new_empty(pairs, prod(grid) // pairs)
    (_forward_rows if by_lines else _forward_kernel)[grid](x, weight.contiguous(), made, *places, **constants)
    return y if spatial else (made.sum(1) / sides.numel()).view_as(y)


@implements("lpips_layer_backward")
def _lpips_layer_backward(
    dy: Tensor, x: Tensor, weight: Tensor, spatial: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    form = memory_format(x)
    (x,) = dense(form, x)
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, weight.new_zeros(x.shape[1] if want_weight else 0)
    by_lines, grid, places, constants = _launch(x, form, spatial)
    sums = weight.new_empty(prod(grid), x.shape[1]) if want_weight else None
    kernel = _backward_rows if by_lines else _backward_kernel
    kernel[grid](dy.contiguous(), x, weight.contiguous(), dx, sums, *places, **constants)
    return dx, weight.new_empty(0) if sums is None else sums.sum(0)
