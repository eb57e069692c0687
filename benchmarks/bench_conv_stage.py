"""Whole stages: the first two and the last of torchvision's net and of the 2012 net, whose first two have LRN."""

from __future__ import annotations

import pytest

from tests.ops.samples import OVERLAPPING, SMALL, conv_stage

from .cases import forms, passes, runs

SAMPLES = [
    conv_stage("conv1, pool", (1, 3, 224, 224), (64, 3, 11, 11), stride=4, padding=2, pool=OVERLAPPING),
    conv_stage("conv2, pool", (1, 64, 27, 27), (192, 64, 5, 5), padding=2, pool=OVERLAPPING),
    conv_stage("conv5, pool", (1, 256, 13, 13), (256, 256, 3, 3), padding=1, pool=OVERLAPPING),
    conv_stage("2012 conv1, LRN, pool", (1, 3, 227, 227), (96, 3, 11, 11), stride=4, lrn=SMALL, pool=OVERLAPPING),
    conv_stage(
        "2012 conv2, LRN, pool", (1, 96, 27, 27), (256, 48, 5, 5), padding=2, groups=2, lrn=SMALL, pool=OVERLAPPING
    ),
    conv_stage("2012 conv5, pool", (1, 384, 13, 13), (256, 192, 3, 3), padding=1, groups=2, pool=OVERLAPPING),
]


@runs
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_conv_stage(measure, sample, dtype, layout, training, backend, batch):
    measure(sample, dtype, layout, training, backend, batch)
