"""Convolution and ReLU, where nothing follows: conv3 and conv4 of torchvision's net and of the 2012 net."""

from __future__ import annotations

import pytest

from tests.ops.samples import conv_relu

from .cases import forms, passes, runs

SAMPLES = [
    conv_relu("conv3", (1, 192, 13, 13), (384, 192, 3, 3), padding=1),
    conv_relu("conv4", (1, 384, 13, 13), (256, 384, 3, 3), padding=1),
    conv_relu("2012 conv3", (1, 256, 13, 13), (384, 256, 3, 3), padding=1),
    conv_relu("2012 conv4", (1, 384, 13, 13), (384, 192, 3, 3), padding=1, groups=2),
]


@runs
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_conv_relu(measure, sample, dtype, layout, training, backend, batch):
    measure(sample, dtype, layout, training, backend, batch)
