"""A whole stage: convolution, bias, ReLU, and optionally LRN and max-pooling.

    y = pool(lrn(max(0, w * x + b)))

Two kernels, or three with both LRN and pooling: conv_relu's with bias and ReLU inside, then lrn's and max_pool's on
what it wrote. Overlapping windows reach over the border of any tile of pixels, so that pooling inside the convolution
would compute a halo of the convolution, the dearest part, again.
Bytes: x and w once, r = max(0, w * x + b) written and read once, y (and code) written once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alexnet_fast.geometry import LRN, Geometry, Window, memory_format
from alexnet_fast.triton_kernels import conv_relu, lrn, max_pool
from alexnet_fast.triton_kernels.launch import implements


@implements("conv_stage")
def _conv_stage(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor]:
    geometry, norm, window, training = Geometry(*rest[:4]), LRN(*rest[4:9]), Window(*rest[9:13]), rest[13]
    y = conv_relu.forward(x, weight, bias, geometry)
    code, r, form = y.new_empty(0, dtype=torch.uint8), y.new_empty(0), memory_format(y)
    if norm.size:
        r = y if training else r
        y, _ = lrn.forward(y, form, norm)
    if window.kernel[0] != 0:
        y, code = max_pool.forward(y, form, window, training, relu=not norm.size)
    return y, code, r
