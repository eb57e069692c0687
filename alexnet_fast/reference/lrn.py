from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.onnx
from torch import Tensor

from alexnet_fast.reference import onnx


def local_response_norm(
    input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, *, groups: int = 1
) -> Tensor:
    """y = x · t^-beta with t = k + alpha/size · Σ x² over a window of channels.

    The window of channel c reaches from c - size//2 to c + (size-1)//2, cut off at the ends of c's group, as in
    :func:`torch.nn.functional.local_response_norm`. float16 and bfloat16 are computed in float32 and rounded once.
    """
    if input.shape[1] == 0:
        return input.clone()
    x = widened(input)
    if torch.onnx.is_in_onnx_export():
        y = onnx.local_response_norm(x, size, alpha, beta, k, groups)
        return y if y.dtype == input.dtype else y.to(input.dtype)
    y = x * (k + alpha / size * window_sums(x.square(), size // 2, (size - 1) // 2, groups)).pow(-beta)
    # Under autocast torch's own ends in float32 too.
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return y if autocast else y.to(input.dtype)


def lrn_backward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """∂L/∂x, by the formula of ops/lrn.py."""
    if x.shape[1] == 0:
        return dy.clone()
    g, wide, before, after = widened(dy), widened(x), size // 2, (size - 1) // 2
    t = k + alpha / size * window_sums(wide.square(), before, after, groups)
    # Channel i is in the window of j where j is in i's turned round.
    seen = window_sums(g * wide * t.pow(-beta - 1), after, before, groups)
    return (g * t.pow(-beta) - 2 * alpha * beta / size * wide * seen).to(dy.dtype)


def window_sums(x: Tensor, before: int, after: int, groups: int) -> Tensor:
    """Sums over each channel, ``before`` of those ahead of it and ``after`` of those behind, within its group."""
    parts = x.unflatten(1, (groups, -1)).flatten(3)  # N, group, channel, pixel
    return F.pad(parts, (0, 0, before, after)).unfold(2, before + after + 1, 1).sum(-1).reshape(x.shape)


def widened(x: Tensor) -> Tensor:
    """``x`` in the dtype that 16 bits are computed in, float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
