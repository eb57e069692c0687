"""Times an operator against PyTorch in one run, and keeps the rows that are printed at the end.

Believable: random data; each case first checked against the reference; the two sides alternate, A B A B, so that a
slower moment of the machine meets both; medians, with quartiles beside them; results in memory the process holds.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter

import torch
from torch import Tensor

from tests.ops.compare import error, output_gradient, results, saved_bytes
from tests.ops.layouts import relayout
from tests.ops.samples import Sample

# Allowed difference to the reference, relative to the largest element: sums of 10^5 terms in float32, and results that
# are rounded twice in 16 bits.
TOLERANCE = {torch.float32: 2**-13, torch.bfloat16: 2**-6}


def keep_memory() -> bool:
    """Has malloc keep what is freed, as allocators made for training do; False where malloc is not glibc's.

    By default glibc maps every tensor of 32 MiB or more anew. Its pages then fault one by one at their first touch,
    which at 9,000 pages takes several times as long as the operators themselves, and as long for PyTorch's as for ours.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 2**26))


@dataclass(frozen=True)
class Row:
    """One comparison. Times in milliseconds; saved: bytes kept for backward over bytes of the input."""

    name: str
    dtype: str
    layout: str
    passes: str
    backend: str
    ours: list[float]
    torch: list[float]
    gigabytes_per_s: float | None
    saved: tuple[float, float] | None

    @property
    def ratio(self) -> float:
        return median(self.torch) / median(self.ours)


def check(sample: Sample, data: dict[str, Tensor], dy: Tensor, backend: str) -> None:
    actual = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    for name, expected in results(lambda leaves: sample.ours(leaves, "reference"), data, dy).items():
        allowed = TOLERANCE[expected.dtype] * expected.abs().max().item()
        assert error(actual[name], expected.double()) <= allowed, f"{sample}: wrong {name}"


def race(benchmark, sample: Sample, dtype: torch.dtype, layout: str, training: bool, backend: str) -> Row | None:
    """Measures ``sample`` with pytest-benchmark, PyTorch's time taken between its rounds."""
    data = {name: relayout(tensor, layout) for name, tensor in sample.data(dtype).items()}
    dy = relayout(output_gradient(sample, dtype), layout)
    check(sample, data, dy, backend)

    def side(call: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], object]:
        if training:
            return lambda: results(call, data, dy)
        return torch.inference_mode()(lambda: call(data))

    torch_times: list[float] = []
    ours, theirs = side(lambda leaves: sample.ours(leaves, backend)), side(sample.torch)

    def time_torch() -> None:
        start = perf_counter()
        theirs()
        torch_times.append(perf_counter() - start)

    time_torch()
    rounds = max(5, min(25, int(0.7 / torch_times[0])))
    short, passes = str(dtype).removeprefix("torch."), "forward+backward" if training else "forward"
    benchmark.group = f"{sample.stem}-{short}-{layout}-{passes}"
    benchmark.pedantic(ours, setup=time_torch, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return None

    saved = None
    if training:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in data.items()}
        size = data["input"].numel() * data["input"].itemsize
        saved = tuple(
            saved_bytes(lambda c=c: c(leaves)) / size for c in (lambda t: sample.ours(t, backend), sample.torch)
        )
    ours_times = [1e3 * t for t in benchmark.stats.stats.data]
    moved = least_bytes(sample, data, dy, training)
    row = Row(
        f"{sample.stem} {'x'.join(map(str, sample.input))} {sample.reason}",
        *(short, layout, passes, backend, ours_times, [1e3 * t for t in torch_times[-rounds:]]),
        moved / median(ours_times) / 1e6 if moved else None,
        saved,
    )
    benchmark.extra_info |= {"torch_ms": row.torch, "ratio": row.ratio, "gigabytes_per_s": row.gigabytes_per_s}
    return row


def least_bytes(sample: Sample, data: dict[str, Tensor], dy: Tensor, training: bool) -> int | None:
    """Each operator's inputs once and its outputs once, what is kept for backward among them. None for convolutions,
    which arithmetic bounds."""
    if sample.weight is not None:
        return None
    x, y = (t.numel() * t.itemsize for t in (data["input"], dy))
    if not training:
        return x + y
    fused, norm = sample.stem == "epilogue", sample.stem == "lrn" or "lrn" in sample.arguments
    code = dy.numel() if sample.stem == "max_pool" or "pool" in sample.arguments else 0
    written = code + (x if fused and norm else 0)
    read = code + (x if norm else 0) + (y if fused and not norm and not code else 0)
    return (x + y + written) + (y + read + x)


def spread(times: list[float]) -> str:
    low, _, high = quantiles(times, n=4)
    return f"{median(times):8.2f} [{low:7.2f} {high:7.2f}]"
