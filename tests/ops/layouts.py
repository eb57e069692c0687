"""The same values at other addresses."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "misaligned", "transposed", "sliced")


def relayout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of ``tensor`` in a layout. Where a layout leaves gaps, they hold NaN."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if layout == "misaligned":  # dense, but its first element lies between two multiples of 16 bytes
        buffer = tensor.new_full((tensor.numel() + 1,), torch.nan)
        return buffer[1:].view(tensor.shape).copy_(tensor)
    if layout == "sliced":
        buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan)
        return buffer[..., 1::2].copy_(tensor)
    return tensor.clone(memory_format=torch.contiguous_format)
