from __future__ import annotations

import torch
from torch import Tensor

from alexnet_fast.reference.lrn import widened

EPSILON = 1e-10  # as lpips has it


def squared_differences(input: Tensor) -> Tensor:
    """(u_c − v_c)² of the unit vectors u = a / (|a| + 1e-10) and v of a pixel's features in image n and in image n + N,
    in float32 for 16 bits. A pixel without features has u = 0, and gradient 0."""
    x = widened(input)
    square = x.square().sum(1, keepdim=True)
    empty = square == 0  # the root has no derivative there
    unit = torch.where(empty, 0, x / (torch.where(empty, 1, square).sqrt() + EPSILON))
    pairs = len(x) // 2
    return (unit[:pairs] - unit[pairs:]).square()


def lpips_layer(input: Tensor, weight: Tensor, spatial: bool = False) -> Tensor:
    """Σ_c weight_c · (u_c − v_c)² of each pixel, averaged over pixels unless ``spatial``."""
    difference = squared_differences(input)
    distance = (difference * weight.to(difference.dtype).view(-1, 1, 1)).sum(1, keepdim=True)
    return distance if spatial else distance.mean((2, 3), keepdim=True)


def lpips_layer_backward(
    dy: Tensor, x: Tensor, weight: Tensor, spatial: bool, want_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """∂L/∂x, and ∂L/∂weight if wanted, by the formulas of ops/lpips_layer.py."""
    wide, pairs = widened(x), len(x) // 2
    square = wide.square().sum(1, keepdim=True)
    norm = torch.where(square == 0, 1, square).sqrt()
    scale = torch.where(square == 0, 0, 1 / (norm + EPSILON))
    unit = scale * wide
    difference = unit[:pairs] - unit[pairs:]
    g = dy if spatial else dy / x.shape[2:].numel()
    h = 2 * g * weight.view(-1, 1, 1) * difference
    h = torch.cat([h, -h])
    dx = scale * h - wide * scale.square() / norm * (h * wide).sum(1, keepdim=True)
    return dx.to(x.dtype), (g * difference.square()).sum((0, 2, 3)) if want_weight else None
