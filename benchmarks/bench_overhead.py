"""What a call costs before any work: PyTorch's function, the bare operator, and our function around the operator."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest
import torch

from tests.ops.calls import Calls
from tests.ops.samples import OVERLAPPING, PAPER, conv_relu, conv_stage, epilogue, lrn, max_pool

from .conftest import OVERHEADS

CALLS_A_ROUND = 100
SAMPLES = [
    lrn("", (1, 8, 1, 1), 5),
    max_pool("", (1, 8, 3, 3), 3, 2),
    epilogue("", (1, 8, 3, 3), lrn=PAPER, pool=OVERLAPPING),
    conv_relu("", (1, 8, 1, 1), (8, 8, 1, 1)),
    conv_stage("", (1, 8, 3, 3), (8, 8, 1, 1), lrn=PAPER, pool=OVERLAPPING),
]


def microseconds(call) -> float:
    start = perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return 1e6 * (perf_counter() - start) / CALLS_A_ROUND


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.stem)
@torch.inference_mode()
def test_overhead(benchmark, pytestconfig, sample):
    data = sample.data(torch.float32)
    with Calls() as mode:
        sample.ours(data, "cpu")
    operator, arguments = mode.calls[0]
    torch_times, operator_times, function_times = [], [], []

    def round_of_each() -> None:
        torch_times.append(microseconds(lambda: sample.torch(data)))
        operator_times.append(microseconds(lambda: operator(*arguments)))
        function_times.append(microseconds(lambda: sample.ours(data, "cpu")))

    benchmark.group = f"overhead-{sample.stem}"
    benchmark.pedantic(round_of_each, rounds=20, warmup_rounds=2)
    if not benchmark.disabled:
        medians = [median(times[-20:]) for times in (torch_times, operator_times, function_times)]
        pytestconfig.stash[OVERHEADS].append((sample.stem, *medians))
        benchmark.extra_info |= dict(zip(("torch_us", "operator_us", "function_us"), medians, strict=True))
