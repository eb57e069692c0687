from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.reference.lrn import local_response_norm
from alexnet_fast.reference.max_pool import max_pool2d


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
