"""Arguments as large as an int allows, on the CPU: UndefinedBehaviorSanitizer sees what overflows."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast.ops import Pool

from ..ops.samples import epilogue, max_pool
from .conv import BF16, F32, Shape, backward, forward
from .test_conv_relu import check
from .test_pointwise import of, run_and_check

INT_MAX = 2**31 - 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_pooling_with_the_longest_stride(channels_last):
    """One window an image, or one a row."""
    window = (3, INT_MAX, 1)
    some = of(max_pool("", (2, 8, 5, 7), *window), torch.float32, channels_last)
    some += of(max_pool("", (2, 5, 5, 7), (2, 3), (INT_MAX, 1)), torch.bfloat16, channels_last)
    some += of(epilogue("", (2, 8, 5, 7), pool=Pool(*window)), torch.bfloat16, channels_last)
    run_and_check("address", some)


@pytest.mark.parametrize(
    "shape",
    [
        Shape("stride", 2, 8, 5, 7, 8, (3, 3), (INT_MAX, INT_MAX), (1, 1)),
        Shape("stride, few channels", 2, 3, 5, 7, 8, (3, 3), (INT_MAX, INT_MAX)),
        Shape("stride of one axis, few channels", 2, 3, 5, 7, 8, (3, 3), (1, INT_MAX)),
        Shape("dilation of a single tap", 1, 8, 5, 7, 8, (1, 3), dilation=(INT_MAX, 1)),
    ],
    ids=str,
)
def test_convolutions(shape):
    check("address", [cases(shape, mode) for mode in (BF16, F32) for cases in (forward, backward)])
