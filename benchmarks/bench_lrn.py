"""Local response normalization where the 2012 net has it. PyTorch's has no bfloat16 on CPUs: its side then works in
float32 and converts."""

from __future__ import annotations

import pytest

from tests.ops.samples import lrn

from .cases import backends, forms, passes

SAMPLES = [
    lrn("after conv1", (32, 96, 55, 55), 5, alpha=5e-4, k=2.0),
    lrn("after conv2", (32, 256, 27, 27), 5, alpha=5e-4, k=2.0),
]


@backends
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_lrn(measure, sample, dtype, layout, training, backend):
    measure(sample, dtype, layout, training, backend)
