"""What a net costs on the host: a call of a tiny one, less the convolutions and products that it has to make.

Those are the ones that nn.Sequential makes, called bare in the same rounds, on one thread. On a GPU the times are up to
the return of a call, with a queue that is not full: what keeps the host busy.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import pytest
import torch

from .cases import devices
from .host import CHANNELS, SIDE, bare, call_of, nets, products
from .results import timed

CALLS_A_ROUND = 20
ROUNDS = 40


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    for _ in range(CALLS_A_ROUND):
        call()
    return (perf_counter() - start) / CALLS_A_ROUND


@devices
@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
def test_host(benchmark, keep, one_thread, training, device):
    x = torch.randn(1, 3, SIDE, SIDE, device=device)
    sides = {name: net.to(device) for name, net in nets().items()}
    calls = {name: call_of(net, x, training) for name, net in sides.items()}
    torch.testing.assert_close(calls["ours"](), calls["eager"]())
    calls["bare"] = bare(products(sides["eager"], x, training))
    times: dict[str, list[float]] = {name: [] for name in calls}

    def round_of_each() -> None:
        for name, call in calls.items():
            times[name].append(seconds(call, device))

    labels = {
        "bench": "host",
        "case": f"{CHANNELS} channels, {SIDE}x{SIDE}, batch 1",
        "dtype": "float32",
        "layout": "contiguous",
        "pass": "forward+backward" if training else "forward",
        "backend": device,
    }
    benchmark.group = f"host-{labels['pass']}-{device}"
    benchmark.pedantic(round_of_each, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.disabled:
        return
    times = {name: taken[-ROUNDS:] for name, taken in times.items()}
    least = times.pop("bare")
    host = {
        name: median(whole - part for whole, part in zip(taken, least, strict=True)) for name, taken in times.items()
    }
    row = labels | timed(times)
    row |= {"bare_us": float(f"{1e6 * median(least):.4g}")}
    row |= {"host_us": {name: float(f"{1e6 * taken:.4g}") for name, taken in host.items()}}
    benchmark.extra_info |= row
    keep(row)
