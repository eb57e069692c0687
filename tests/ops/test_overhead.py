"""How much Python a call of one operator is: calls are counted, which no noise of the machine changes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bench_overhead import SAMPLES, calls_of
from tests.nn.test_host import python_calls

# Functions entered beyond those of torch's own, whose numbers differ between versions of torch: in inference, and
# forward and backward.
MOST_MORE = {False: 4, True: 18}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_python_calls_do_not_creep_back(sample, training):
    calls = calls_of(sample, training)
    with torch.inference_mode(not training):
        for call in calls.values():  # the first one plans, and the second one which gradients there are
            call(), call()
        counts = {name: python_calls(call) for name, call in calls.items()}
    assert counts["ours"] <= counts["eager"] + MOST_MORE[training]
