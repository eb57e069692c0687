"""What the pointwise kernels share: how they address a tensor, how large their tiles are, and bias + ReLU on load.

Both layouts are one matrix of pixels by channels, with one of the two strides 1:

    channels_last   N·H·W pixels x C channels,    strides (C, 1)
    NCHW            H·W pixels   x N·C channels,  strides (1, H·W)

A kernel that takes the strides covers both, and Triton, which knows an argument that is 1, orders a tile's elements for
whole-line loads in either. Indices of pixels are 32-bit where they fit, offsets in memory always 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels.launch import INTERPRETED

# In a tile: four for each thread of eight warps. The interpreter pays by the operation, whatever the tile.
ELEMENTS = 8192 if INTERPRETED else 1024


class Sheet(NamedTuple):
    """A dense 4-D tensor as a matrix of pixels by channels."""

    pixels: int
    channels: int
    pixel_stride: int
    channel_stride: int

    @classmethod
    def of(cls, x: Tensor, form: torch.memory_format) -> Sheet:
        batch, channels, height, width = x.shape
        pixels = height * width
        if form == torch.channels_last:
            return cls(batch * pixels, channels, channels, 1)
        return cls(pixels, batch * channels, 1, pixels)

    @property
    def tile(self) -> dict:
        """The launch's constants. Side by side in memory lie 32 channels, which divides all of AlexNet's channel
        counts, or 64 pixels, which cover 13 x 13 in three tiles."""
        side = min(64, triton.next_power_of_2(self.pixels))
        if self.channel_stride == 1:
            side = ELEMENTS // min(32, triton.next_power_of_2(self.channels))
        index = tl.int32 if self.pixels + ELEMENTS < 2**31 else tl.int64
        return {"PIXELS": side, "CHANNELS": ELEMENTS // side, "INDEX": index, "num_warps": 8}

    @property
    def grid(self) -> tuple[int]:
        tile = self.tile
        return (triton.cdiv(self.pixels, tile["PIXELS"]) * triton.cdiv(self.channels, tile["CHANNELS"]),)

    def partial_sums(self, like: Tensor) -> Tensor:
        """Room for one sum over each tile's pixels, for each channel, in the accumulation type."""
        rows = triton.cdiv(self.pixels, self.tile["PIXELS"])
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.empty(rows, self.channels, dtype=dtype, device=like.device)


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
def rectify(x, bias_ptr, channel, mask, bias_channels, ACC: tl.constexpr):
    """max(0, x + bias), rounded to x's dtype, in ACC: what the unfused layers would have stored. NaN stays."""
    shifted = x.to(ACC)
    if bias_ptr is not None:
        shifted += tl.load(bias_ptr + channel % bias_channels, mask, other=0).to(ACC)
    rounded = shifted.to(x.dtype).to(ACC)
    return tl.where(rounded <= 0, 0.0, rounded)


def add_up(partial: Tensor, like: Tensor) -> Tensor:
    """The bias gradient: rows of partial sums, and images where channels of all images stand side by side (NCHW)."""
    channels = like.shape[1]
    return partial.view(-1, channels).sum(0).to(like.dtype)
