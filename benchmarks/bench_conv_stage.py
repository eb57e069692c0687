"""Whole stages: the first two of torchvision's net, and the first of the 2012 net with its LRN."""

from __future__ import annotations

import pytest

from tests.ops.samples import OVERLAPPING, SMALL, conv_stage

from .cases import backends, forms, passes

SAMPLES = [
    conv_stage("conv1, pool", (16, 3, 224, 224), (64, 3, 11, 11), stride=4, padding=2, pool=OVERLAPPING),
    conv_stage("conv2, pool", (16, 64, 27, 27), (192, 64, 5, 5), padding=2, pool=OVERLAPPING),
    conv_stage("conv1, LRN, pool", (16, 3, 227, 227), (96, 3, 11, 11), stride=4, lrn=SMALL, pool=OVERLAPPING),
]


@backends
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_conv_stage(measure, sample, dtype, layout, training, backend):
    measure(sample, dtype, layout, training, backend)
