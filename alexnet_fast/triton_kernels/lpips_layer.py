"""How far two images' features in a layer are from each other, as LPIPS measures it.

    d_p = Σ_c w_c · (a_cp s_p − b_cp t_p)²,    s = 1 / (|a| + ε), t = 1 / (|b| + ε), 0 where the length is

Tile: a stretch of one pair's pixels by 32 channels, through which a program walks: once for lengths, once for
differences, and backward once more to write. What it reads again comes from L1 or L2.
In NCHW elements are loaded and stored one by one: a pixel's channels lie at other places within 16 bytes.
Bytes: forward reads x, backward reads x and writes dx, each once from memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import memory_format
from alexnet_fast.triton_kernels.launch import accumulator, dense, implements
from alexnet_fast.triton_kernels.tiles import ELEMENTS

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


def _launch(x: Tensor, form: torch.memory_format, spatial: bool) -> tuple[int, tuple, dict]:
    """Programs, the arguments that address x, and the constants."""
    pairs, channels, pixels = x.shape[0] // 2, x.shape[1], x.shape[2] * x.shape[3]
    wide = min(32, triton.next_power_of_2(channels))
    high = min(ELEMENTS // wide, triton.next_power_of_2(pixels))
    strides = (channels, 1) if form == torch.channels_last else (1, pixels)
    constants = {"SPATIAL": spatial, "EPSILON": EPSILON, "ACC": accumulator(x), "PIXELS": high, "CHANNELS": wide}
    return pairs * triton.cdiv(pixels, high), (pairs * channels * pixels, pixels, channels, *strides), constants


@implements("lpips_layer")
def _lpips_layer(x: Tensor, weight: Tensor, spatial: bool) -> Tensor:
    form = memory_format(x)
    (x,) = dense(form, x)
    pairs, sides = x.shape[0] // 2, x.shape[2:]
    y = weight.new_empty((pairs, 1, *(sides if spatial else (1, 1))))
    if not pairs:
        return y
    programs, places, constants = _launch(x, form, spatial)
    made = y if spatial else weight.new_empty(pairs, programs // pairs)
    _forward_kernel[(programs,)](x, weight.contiguous(), made, *places, **constants)
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
    programs, places, constants = _launch(x, form, spatial)
    sums = weight.new_empty(programs, x.shape[1]) if want_weight else None
    _backward_kernel[(programs,)](dy.contiguous(), x, weight.contiguous(), dx, sums, *places, **constants)
    return dx, weight.new_empty(0) if sums is None else sums.sum(0)
