"""Convolution and ReLU: torchvision's conv3, conv4 and conv5."""

from __future__ import annotations

import pytest

from tests.ops.samples import conv_relu

from .cases import backends, forms, passes

SAMPLES = [
    conv_relu("conv3", (16, 192, 13, 13), (384, 192, 3, 3), padding=1),
    conv_relu("conv4", (16, 384, 13, 13), (256, 384, 3, 3), padding=1),
]


@backends
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_conv_relu(measure, sample, dtype, layout, training, backend):
    measure(sample, dtype, layout, training, backend)
