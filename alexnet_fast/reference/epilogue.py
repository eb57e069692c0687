from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.reference.lrn import local_response_norm, lrn_backward, widened
from alexnet_fast.reference.max_pool import max_pool2d, max_pool_backward


def epilogue(input: Tensor, bias: Tensor | None = None, *, lrn=None, pool=None) -> Tensor:
    """pool(lrn(relu(z + bias))): what follows a raw convolution z. lrn: ops.LRN or None; pool: ops.Pool or None."""
    shifted = input if bias is None else input + bias.to(input.dtype).view(-1, 1, 1)
    y = F.relu(shifted)
    if lrn is not None:
        batch = y if y.dim() == 4 else y.unsqueeze(0)
        y = local_response_norm(batch, lrn.size, lrn.alpha, lrn.beta, lrn.k, groups=lrn.groups).view_as(y)
    if pool is not None:
        y = max_pool2d(y, pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)
    return y


def epilogue_backward(
    dy: Tensor,
    code: Tensor,
    r: Tensor,
    height: int,
    width: int,
    want_bias: bool,
    lrn_size: int,
    alpha: float,
    beta: float,
    k: float,
    lrn_groups: int,
    pool_kernel: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> tuple[Tensor, Tensor | None]:
    """∂L/∂z, and ∂L/∂bias if wanted, of what ops/epilogue.py keeps."""
    g, pools = widened(dy), pool_kernel[0] != 0
    if pools:
        g = g if lrn_size else g.masked_fill(code == 255, 0)
        g = max_pool_backward(g, code, height, width, pool_kernel, pool_stride, pool_padding)
    if lrn_size:
        g = lrn_backward(g, r.to(g.dtype), lrn_size, alpha, beta, k, lrn_groups)
    if lrn_size or not pools:
        g = torch.ops.aten.threshold_backward(g, r.to(g.dtype), 0)
    return g.to(dy.dtype), g.sum((0, 2, 3)).to(dy.dtype) if want_bias else None
