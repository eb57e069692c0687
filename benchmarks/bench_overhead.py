"""What a call costs before any work: PyTorch's function, the bare operator, and our function around the operator; and a
call with its gradient, PyTorch's and ours."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import pytest
import torch

from tests.ops.calls import Calls
from tests.ops.samples import OVERLAPPING, PAPER, Sample, conv_relu, conv_stage, epilogue, lrn, max_pool

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


def calls_of(sample: Sample, training: bool) -> dict[str, Callable[[], object]]:
    """The sample in inference, or forward and backward for the gradients of all its tensors, by side."""
    data = {name: tensor.requires_grad_(training) for name, tensor in sample.data(torch.float32).items()}
    sides: dict[str, Callable] = {"ours": lambda: sample.ours(data, "cpu"), "eager": lambda: sample.torch(data)}
    if not training:
        return sides
    leaves, dy = list(data.values()), torch.ones_like(sample.torch(data))
    return {name: lambda call=call: torch.autograd.grad(call(), leaves, dy) for name, call in sides.items()}


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
def test_overhead(benchmark, keep, sample, training):
    calls = calls_of(sample, training)
    if not training:
        with Calls() as mode:
            calls["ours"]()
        operator, arguments = mode.calls[0]
        calls["operator"] = lambda: operator(*arguments)
    times: dict[str, list[float]] = {name: [] for name in calls}

    @torch.inference_mode(not training)
    def round_of_each() -> None:
        for name, call in calls.items():
            times[name].append(seconds(call))

    labels = {"bench": "overhead", "case": sample.stem, "dtype": "float32", "layout": "contiguous"}
    labels["pass"] = "forward+backward" if training else "forward"
    benchmark.group = f"overhead-{sample.stem}-{labels['pass']}"
    benchmark.pedantic(round_of_each, rounds=20, warmup_rounds=2)
    if benchmark.disabled:
        return
    times = {name: taken[-20:] for name, taken in times.items()}
    bare = times.pop("operator", None)
    row = labels | timed(times) | {"backend": "cpu"}
    if bare is not None:
        above = [ours - operator for ours, operator in zip(times["ours"], bare, strict=True)]
        row["above_operator_us"] = float(f"{1e6 * median(above):.4g}")
    benchmark.extra_info |= row
    keep(row)
