from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.reference.epilogue import epilogue
from alexnet_fast.reference.max_pool import IntPair


def conv_stage(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    lrn=None,
    pool=None,
) -> Tensor:
    """pool(lrn(relu(convolution + bias))), the last two optional."""
    z = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return epilogue(z, lrn=lrn, pool=pool)
