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
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    if torch.onnx.is_in_onnx_export():
        y = onnx.local_response_norm(x, size, alpha, beta, k, groups)
        return y if y.dtype == input.dtype else y.to(input.dtype)
    square = x.square().unflatten(1, (groups, -1)).flatten(3)  # N, group, channel, pixel
    padded = F.pad(square, (0, 0, size // 2, (size - 1) // 2))
    total = padded.unfold(2, size, 1).sum(-1).reshape(x.shape)
    y = x * (k + alpha / size * total).pow(-beta)
    # Under autocast torch's own ends in float32 too.
    device = input.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return y if autocast else y.to(input.dtype)
