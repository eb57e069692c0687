"""What a call costs before any work: PyTorch's function, the bare operator, and our function around the operator."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest
import torch

from tests.ops.calls import Calls
from tests.ops.samples import OVERLAPPING, PAPER, conv_relu, conv_stage, epilogue, lrn, max_pool

from .results import timed

CALLS_A_ROUND = 100
SAMPLES = [
    lrn("", (1, 8, 1, 1), 5),
    max_pool("", (1, 8, 3, 3), 3, 2),
    epilogue("", (1, 8, 3, 3), lrn=PAPER, pool=OVERLAPPING),
    conv_relu("", (1, 8, 1, 1), (8, 8, 1, 1)),
    conv_stage("", (1, 8, 3, 3), (8, 8, 1, 1), lrn=PAPER, pool=OVERLAPPING),
]


def seconds(call) -> float:
    start = perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return (perf_counter() - start) / CALLS_A_ROUND


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
@torch.inference_mode()
def test_overhead(benchmark, keep, sample):
    data = sample.data(torch.float32)
    with Calls() as mode:
        sample.ours(data, "cpu")
    operator, arguments = mode.calls[0]
    calls = {
        "ours": lambda: sample.ours(data, "cpu"),
        "operator": lambda: operator(*arguments),
        "eager": lambda: sample.torch(data),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}

    def round_of_each() -> None:
        for name, call in calls.items():
            times[name].append(seconds(call))

    benchmark.group = f"overhead-{sample.stem}"
    benchmark.pedantic(round_of_each, rounds=20, warmup_rounds=2)
    if benchmark.disabled:
        return
    times = {name: taken[-20:] for name, taken in times.items()}
    above = [ours - operator for ours, operator in zip(times["ours"], times.pop("operator"), strict=True)]
    labels = {"bench": "overhead", "case": sample.stem, "dtype": "float32", "layout": "contiguous", "pass": "forward"}
    row = labels | timed(times) | {"backend": "cpu", "above_operator_us": float(f"{1e6 * median(above):.4g}")}
    benchmark.extra_info |= row
    keep(row)
