"""Local response normalization where the 2012 net has it. PyTorch's has no bfloat16 on CPUs: its side then works in
float32 and converts."""

from __future__ import annotations

import pytest

from tests.ops.samples import lrn

from .cases import forms, passes, runs

SAMPLES = [
    lrn("after conv1", (1, 96, 55, 55), 5, alpha=5e-4, k=2.0),
    lrn("after conv2", (1, 256, 27, 27), 5, alpha=5e-4, k=2.0),
]


@runs
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_lrn(measure, sample, dtype, layout, training, backend, batch):
    measure(sample, dtype, layout, training, backend, batch)
