"""AlexNet's three overlapping max-pools, at the channels of the 2012 net."""

from __future__ import annotations

import pytest

from tests.ops.samples import max_pool

from .cases import forms, passes, runs

SAMPLES = [
    max_pool("after conv1", (1, 96, 55, 55), 3, 2),
    max_pool("after conv2", (1, 256, 27, 27), 3, 2),
    max_pool("after conv5", (1, 256, 13, 13), 3, 2),
]


@runs
@passes
@forms
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_max_pool(measure, sample, dtype, layout, training, backend, batch):
    measure(sample, dtype, layout, training, backend, batch)
