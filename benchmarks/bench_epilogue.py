"""What follows a raw convolution output, in one pass: torchvision's stages have no LRN, the 2012 net's first two do."""

from __future__ import annotations

import pytest

from tests.ops.samples import OVERLAPPING, PAPER, epilogue

from .cases import forms, passes, runs

SAMPLES = [
    epilogue("bias, ReLU", (1, 384, 13, 13)),
    epilogue("bias, ReLU, pool", (1, 64, 55, 55), pool=OVERLAPPING),
    epilogue("bias, ReLU, LRN, pool", (1, 96, 55, 55), lrn=PAPER, pool=OVERLAPPING),
]


@runs
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_epilogue(measure, sample, dtype, layout, training, backend, batch):
    measure(sample, dtype, layout, training, backend, batch)
