"""What the pointwise kernels share: how they address a tensor, how large their tiles are, and bias + ReLU on load.

Both layouts are one matrix of pixels by channels, with one of the two strides 1:

    channels_last   N·H·W pixels x C channels,    strides (C, 1)
    NCHW            H·W pixels   x N·C channels,  strides (1, H·W)

A kernel that takes the strides covers both, and Triton, which knows an argument that is 1, orders a tile's elements for
whole-line loads in either. Indices of pixels are 32-bit where they fit, offsets in memory always 64-bit.

A thread has 16 bytes of neighbours in memory, and moves them at once, where Triton can prove that they begin at a
multiple of 16 bytes: over channels_last where channels are a multiple of 16. Kernels that need a pixel's neighbouring
channels too (lrn.py) cut channels_last tensors into lines of 16 bytes, and take a line's elements apart in a thread's
registers.

In NCHW a plane of AlexNet's (55 x 55, 27 x 27 or 13 x 13 pixels) begins anywhere within 16 bytes. But planes follow
each other without gaps, so where an image is a whole number of lines, kernels take it as rows of lines, a plane a row:
a line belongs to the plane that its first element lies in, and its last ones may be the next plane's (``spilled``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels.launch import INTERPRETED

# In a tile, of four bytes: four for each thread of eight warps. The interpreter pays by the operation, not by the tile.
ELEMENTS = 8192 if INTERPRETED else 1024


class Sheet(NamedTuple):
    """A dense 4-D tensor as a matrix of pixels by channels."""

    pixels: int
    channels: int
    pixel_stride: int
    channel_stride: int
    vector: int  # elements of 16 bytes

    @classmethod
    def of(cls, x: Tensor, form: torch.memory_format) -> Sheet:
        batch, channels, height, width = x.shape
        pixels, vector = height * width, 16 // x.element_size()
        if form == torch.channels_last:
            return cls(batch * pixels, channels, channels, 1, vector)
        return cls(pixels, batch * channels, 1, pixels, vector)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """What a kernel is told of it."""
        return self[:4]

    @property
    def tile(self) -> dict:
        """The launch's constants. Side by side in memory lie as many channels as divide all there are, 32 to 128 (64
        bytes to 512), or 64 pixels, which cover 13 x 13 in three tiles."""
        elements = ELEMENTS * self.vector // 4
        side = min(64, triton.next_power_of_2(self.pixels))
        if self.channel_stride == 1:
            dividing = self.channels & -self.channels
            side = elements // min(max(32, min(dividing, 128)), triton.next_power_of_2(self.channels))
        index = tl.int32 if self.pixels + elements < 2**31 else tl.int64
        return {"PIXELS": side, "CHANNELS": elements // side, "INDEX": index, "num_warps": 8}

    def lines(self, group: int) -> dict | None:
        """The constants of kernels over lines of ``vector`` channels; None where ``group`` channels are no whole number
        of lines, or pixels are not that."""
        if self.channel_stride != 1 or self.pixel_stride != self.channels or group % self.vector or self.vector < 4:
            return None
        tile = self.tile
        return {
            "PIXELS": tile["PIXELS"],
            "LINES": max(1, tile["CHANNELS"] // self.vector),
            "VECTOR": self.vector,
            "INDEX": tile["INDEX"],
            "num_warps": 8,
        }

    @property
    def grid(self) -> tuple[int]:
        tile = self.tile
        return (triton.cdiv(self.pixels, tile["PIXELS"]) * triton.cdiv(self.channels, tile["CHANNELS"]),)

    def partial_sums(self, like: Tensor) -> Tensor:
        """Room for one sum over each tile's pixels, for each channel, in the accumulation type."""
        rows = triton.cdiv(self.pixels, self.tile["PIXELS"])
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.empty(rows, self.channels, dtype=dtype, device=like.device)


class Planes(NamedTuple):
    """A dense tensor in NCHW whose images are whole lines of 16 bytes."""

    images: int
    channels: int
    pixels: int
    vector: int  # elements of a line

    @classmethod
    def of(cls, x: Tensor, form: torch.memory_format) -> Planes | None:
        """None where images are not whole lines, or a line could hold pixels of more than two planes."""
        batch, channels, height, width = x.shape
        pixels, vector = height * width, 16 // x.element_size()
        fits = vector >= 4 and pixels >= vector and channels * pixels % vector == 0
        # Indices in an image have 32 bits, a grid's second side (32 pixels or more each) and third side 16.
        fits &= channels * pixels < 2**30 and pixels < 2**20 and batch < 2**16
        return cls(batch, channels, pixels, vector) if form == torch.contiguous_format and fits else None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What a kernel is told of it: lines of an image, channels and pixels."""
        return self.channels * self.pixels // self.vector, self.channels, self.pixels

    def tile(self, longest: int = ELEMENTS // 4) -> dict:
        """The launch's constants: a line for each thread, as many of a plane side by side as leave few threads without
        one, ``longest`` at most."""
        lines, most = triton.cdiv(self.pixels, self.vector), triton.next_power_of_2(longest)
        sides = [2**i for i in range(3, most.bit_length())]
        side = min(sides, key=lambda side: (triton.cdiv(lines, side) * (side + 2), -side))
        return {"ROWS": max(1, ELEMENTS // 4 // side), "LINES": side, "VECTOR": self.vector, "num_warps": 8}

    def tile_over_runs(self, run: Callable[[int], int]) -> dict | None:
        """The same with RUN, the room that each row of a tile needs for what it reads: ``run``(elements of a row). None
        where no tile of 4096 elements has it."""
        sides = []
        for side in (2**i for i in range(3, 9)):
            elements, room = side * self.vector, triton.next_power_of_2(run(side * self.vector))
            if room <= 4096:
                sides.append((self.stretches({"LINES": side}) * (4 * elements + room), -side, room))
        if not sides:
            return None
        _, side, room = min(sides)
        side, warps = -side, max(4, -side // 32)
        rows = max(1, (ELEMENTS // 4 if INTERPRETED else 32 * warps) // side)
        # With fewer lines than threads, Triton would part them.
        room = max(room, 32 * warps * self.vector // rows)
        return {"ROWS": rows, "LINES": side, "VECTOR": self.vector, "RUN": room, "num_warps": warps}

    def grid(self, tile: dict) -> tuple[int, int, int]:
        return triton.cdiv(self.channels, tile["ROWS"]), self.stretches(tile), self.images

    def stretches(self, tile: dict) -> int:
        """Tiles along a plane."""
        return triton.cdiv(triton.cdiv(self.pixels, self.vector), tile["LINES"])

    @staticmethod
    def partial_sums(like: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Room for two sums for each channel over a tile's lines: of the elements in it, and of those spilled to it."""
        return torch.empty(grid[1] * grid[2], 2, like.shape[1], dtype=torch.float32, device=like.device)


@triton.jit
def tile_of(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, INDEX: tl.constexpr):
    """This program's row of tiles, its pixels (a column), its channels (a row), and which of their pairs exist.

    Programs side by side take neighbouring channels, whose halos they find in each other's cache.
    """
    across = tl.cdiv(channels, CHANNELS)
    row = tl.program_id(0).to(INDEX) // across
    column = tl.program_id(0).to(INDEX) % across
    pixel = (row * PIXELS + tl.arange(0, PIXELS))[:, None]
    channel = (column * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return row, pixel, channel, (pixel < pixels) & (channel < channels)


@triton.jit
def lines_of(
    pixels,
    lines,
    PIXELS: tl.constexpr,
    LINES: tl.constexpr,
    VECTOR: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Of a program over (pixels, lines, VECTOR): its row of tiles, the offset of its first pixel in memory, from there
    the offsets of its elements, the number of their lines among a pixel's, and which of those exist."""
    across = tl.cdiv(lines, LINES)
    row = tl.program_id(0).to(INDEX) // across
    pixel = tl.arange(0, PIXELS)[:, None, None]
    line = (tl.program_id(0).to(INDEX) % across).to(tl.int32) * LINES + tl.arange(0, LINES)[None, :, None]
    first = row.to(tl.int64) * PIXELS * lines * VECTOR
    here = (pixel * lines + line) * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return row, first, here, line, (row * PIXELS + pixel < pixels) & (line < lines)


@triton.jit
def rows_of(image_lines, channels, pixels, ROWS: tl.constexpr, LINES: tl.constexpr, VECTOR: tl.constexpr):
    """Of a program over (planes, lines, VECTOR): the offset of its image in memory, its channels, the numbers of its
    lines in the image, how many elements of a plane are left where a line begins, from the image on the offsets of
    elements, and which lines exist.

    Programs side by side take neighbouring channels, whose halos they find in each other's cache.
    """
    image = tl.program_id(2).to(tl.int64) * image_lines * VECTOR
    channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]
    plane = channel * pixels
    line = tl.cdiv(plane, VECTOR) + tl.program_id(1) * LINES + tl.arange(0, LINES)[None, :, None]
    left = plane + pixels - line * VECTOR
    here = line * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    return image, channel, line, left, here, (channel < channels) & (left > 0)


@triton.jit
def run_of(image_ptr, image_lines, begin, end, ROWS: tl.constexpr, RUN: tl.constexpr, VECTOR: tl.constexpr):
    """Elements begin … end of an image for each of ROWS rows, in the order of memory, RUN places a row, for
    :func:`tl.gather`; and the offset of each row's first place in the image."""
    first = begin // VECTOR
    line = first + tl.arange(0, RUN // VECTOR)[None, :, None]
    element = line * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    x = tl.load(image_ptr + element, (line * VECTOR < end) & (line < image_lines), other=0)
    return x.reshape(ROWS * RUN), first * VECTOR


@triton.jit
def bias_of_rows(bias_ptr, channel, channels, spilled, ACC: tl.constexpr):
    """The bias of each element of a tile's lines; 0 without one."""
    bias = 0.0
    if bias_ptr is not None:
        row = channel.reshape(channel.shape[0])
        own = tl.load(bias_ptr + row, row < channels, other=0)[:, None, None]
        after = tl.load(bias_ptr + row + 1, row + 1 < channels, other=0)[:, None, None]
        bias = tl.where(spilled, after, own).to(ACC)
    return bias


@triton.jit
def sum_rows(sum_ptr, channel, channels, values, spilled):
    """Stores the sums of a tile's values (0 where no line is) in the planes of their lines, and in the planes after."""
    sum_ptr += (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 2 * channels
    own = tl.sum(tl.sum(tl.where(spilled, 0.0, values), 2), 1)
    after = tl.sum(tl.sum(tl.where(spilled, values, 0.0), 2), 1)
    row = channel.reshape(channel.shape[0])
    tl.store(sum_ptr + row, own, row < channels)
    # An image ends with a line: the last channel spills nothing.
    tl.store(sum_ptr + channels + (row + 1) % channels, after, row < channels)


@triton.jit
def apart(x, VECTOR: tl.constexpr):
    """The VECTOR elements of each line, (pixels, lines) each: no more than names for a thread's registers."""
    P: tl.constexpr = x.shape[0]
    L: tl.constexpr = x.shape[1]
    if VECTOR == 4:
        even, odd = tl.split(x.reshape(P, L, 2, 2))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        parts = (v0, v1, v2, v3)
    else:
        tl.static_assert(VECTOR == 8)
        even, odd = tl.split(x.reshape(P, L, 4, 2))
        v0, v2, v4, v6 = apart(even, 4)
        v1, v3, v5, v7 = apart(odd, 4)
        parts = (v0, v1, v2, v3, v4, v5, v6, v7)
    return parts


@triton.jit
def together(v, VECTOR: tl.constexpr):
    """The reverse of :func:`apart`."""
    P: tl.constexpr = v[0].shape[0]
    L: tl.constexpr = v[0].shape[1]
    if VECTOR == 4:
        even = tl.join(v[0], v[2])
        odd = tl.join(v[1], v[3])
    else:
        even = together((v[0], v[2], v[4], v[6]), 4)
        odd = together((v[1], v[3], v[5], v[7]), 4)
    return tl.join(even, odd).reshape(P, L, VECTOR)


@triton.jit
def bias_of(bias_ptr, channel, mask, bias_channels, ACC: tl.constexpr):
    """The bias of each channel, of which a sheet in NCHW has those of all images; 0 without one."""
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel % bias_channels, mask, other=0).to(ACC)
    return bias


@triton.jit
def rectify(x, bias, ACC: tl.constexpr):
    """max(0, x + bias), rounded to x's dtype, in ACC: what the unfused layers would have stored. NaN stays."""
    rounded = (x.to(ACC) + bias).to(x.dtype).to(ACC)
    return tl.where(rounded <= 0, 0.0, rounded)


def add_up(partial: Tensor, like: Tensor) -> Tensor:
    """The bias gradient: rows of partial sums, and images where channels of all images stand side by side (NCHW)."""
    channels = like.shape[1]
    return partial.view(-1, channels).sum(0).to(like.dtype)
