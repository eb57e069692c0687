"""Times sides against each other in one run, and makes of them the rows that are written and printed.

Believable: random data; each result first checked against the reference, in memory that was filled with NaN; the sides
alternate, A B C A B C, so that a slower moment of the machine meets all; medians, with quartiles beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter, sleep

import torch
from torch import Tensor

from tests.ops.compare import error, results, saved_bytes
from tests.ops.layouts import relayout
from tests.ops.samples import Sample

from . import gpu, peers
from .memory import peak_bytes
from .results import timed

# Allowed difference to the reference, relative to the largest element: sums of 10^5 terms in float32, and results that
# are rounded twice in 16 bits.
TOLERANCE = {torch.float32: 2**-13, torch.bfloat16: 2**-6}
# OpenMP's and TBB's idle threads spin for some milliseconds: each side begins when those of the one before are asleep.
REST = 0.005
GPU_BATCH = 128


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interleave(
    benchmark, sides: dict[str, Callable[[], object]], device: str, seconds: float, least: int
) -> dict[str, list[float]]:
    """Seconds of each side, one list entry a round; "ours" comes first and is the one that pytest-benchmark sees.

    On a GPU these are wall times of one call and a synchronize, for pytest-benchmark's own table alone.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        else:
            sleep(REST)

    def measured(name: str, call: Callable[[], object]) -> None:
        wait()
        start = perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times[name].append(perf_counter() - start)

    def others() -> None:
        for name, call in sides.items():
            if name != "ours":
                measured(name, call)
        wait()

    def ours() -> None:
        start = perf_counter()
        sides["ours"]()
        if device == "cuda":
            torch.cuda.synchronize()
        times["ours"].append(perf_counter() - start)

    if benchmark.disabled:
        rounds = 1
    else:
        start = perf_counter()
        others()
        ours()
        rounds = max(least, min(25, int(seconds / (perf_counter() - start))))
    benchmark.pedantic(ours, setup=others, rounds=rounds, warmup_rounds=0 if benchmark.disabled else 1)
    return {name: taken[-rounds:] for name, taken in times.items()}


def row_of(
    benchmark,
    sides: dict[str, Callable[[], object]],
    labels: dict[str, str],
    device: str,
    seconds: float,
    least: int = 5,
) -> dict | None:
    """The sides' row; None under --benchmark-disable, where each has run once."""
    benchmark.group = "-".join([labels["bench"], labels["dtype"], labels["layout"], labels["pass"]])
    times = interleave(benchmark, sides, device, seconds, least)
    if benchmark.disabled:
        return None
    if device == "cuda":
        row = labels | gpu.event_times(sides, seconds) | {"wall": timed(times)}
    else:
        row = labels | timed(times)
    benchmark.extra_info |= row
    return row


def check(sample: Sample, data: dict[str, Tensor], dy: Tensor, training: bool, backend: str) -> None:
    def computed(backend: str) -> dict[str, Tensor]:
        if training:
            return results(lambda leaves: sample.ours(leaves, backend), data, dy)
        with torch.inference_mode():
            return {"output": sample.ours(data, backend)}

    expected = computed("reference")
    poison = [torch.full_like(tensor, torch.nan) for tensor in expected.values()]
    del poison  # what the kernels get from the allocator now is NaN
    actual = computed(backend)
    for name, value in expected.items():
        allowed = TOLERANCE[value.dtype] * value.abs().max().item()
        assert error(actual[name], value.double()) <= allowed, f"{sample}: wrong {name}"


def agreed(made: dict[str, peers.Peer], truth: Tensor, missing: dict[str, str]) -> dict[str, Callable[[], object]]:
    """The peers that are here and give ``truth``; why others are not goes to ``missing``."""
    sides = {}
    for name, peer in made.items():
        if isinstance(peer, str):
            missing[name] = peer
            continue
        assert peers.agrees(peer(), truth, 2 * TOLERANCE[truth.dtype]), f"{name} gives another result"
        sides[name] = peer
    return sides


def race(
    benchmark, missing: dict[str, str], sample: Sample, dtype: torch.dtype, layout: str, training: bool, backend: str
) -> dict | None:
    """The row of ``sample``: ours against PyTorch's functions, and in inference against compilers and runtimes."""
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    if device == "cuda":
        sample = replace(sample, input=(GPU_BATCH, *sample.input[1:]))
    data = {name: relayout(tensor.to(device), layout) for name, tensor in sample.data(dtype).items()}
    with torch.no_grad():
        dy = torch.rand_like(sample.torch(data)) + 0.5
    check(sample, data, dy, training, backend)

    def side(call: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[], object]:
        if training:
            return lambda: results(call, data, dy)
        return torch.inference_mode()(lambda: call(data))

    sides = {"ours": side(lambda leaves: sample.ours(leaves, backend)), "eager": side(sample.torch)}
    if not training:
        x, modules = data["input"], peers.modules_of(sample, data)
        made = {"compile": peers.compiled(modules, x)} if _compiles(sample.stem, device, dtype, layout) else {}
        if device == "cuda":
            made |= {"JAX": peers.jax_compiled(modules, x)}
            made |= {"cuDNN": peers.conv_relu_cudnn(modules, x)} if sample.weight is not None else {}
            made |= {"cuDNN": peers.lrn_cudnn(modules, x)} if sample.stem == "lrn" else {}
        elif (dtype, layout) == (torch.float32, "contiguous"):
            made |= {"ONNX Runtime": peers.onnxruntime(modules, x), "OpenVINO": peers.openvino(modules, x)}
        with torch.inference_mode():
            sides |= agreed(made, sides["eager"](), missing)
            sides = {name: torch.inference_mode()(call) for name, call in sides.items()}
    labels = {
        "bench": sample.stem,
        "case": f"{sample.reason}, {'x'.join(map(str, sample.input))}",
        "dtype": short(dtype),
        "layout": layout,
        "pass": "forward+backward" if training else "forward",
        "backend": backend,
    }
    row = row_of(benchmark, sides, labels, device, seconds=0.25, least=4)
    if row is None:
        return None
    row |= {"bytes": least_bytes(sample, data, dy, training), "flops": flops(sample, dy, training)}
    if training:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in data.items()}
        calls = {"ours": lambda t: sample.ours(t, backend), "eager": sample.torch}
        row["saved"] = {name: saved_bytes(lambda c=call: c(leaves)) for name, call in calls.items()}
        row["peak"] = {name: peak_bytes(sides[name], device) for name in calls}
    return row


def _compiles(stem: str, device: str, dtype: torch.dtype, layout: str) -> bool:
    """Compiling takes seconds a case: one form stands for all, and whole stages for their epilogue and pooling."""
    form = (dtype, layout) == (torch.bfloat16, "channels_last")
    return form and (device == "cuda" or stem in ("conv_relu", "conv_stage", "lrn"))


def flops(sample: Sample, y: Tensor, training: bool) -> int:
    """Of the convolution, a multiply-add counted as two; its backward pass is two more of its size."""
    if sample.weight is None:
        return 0
    geometry = {name: sample.arguments.get(name, default) for name, default in GEOMETRY.items()}
    with torch.device("meta"):
        shapes = torch.empty(sample.input), torch.empty(sample.weight)
        pixels = torch.nn.functional.conv2d(*shapes, **geometry)
    return 2 * pixels.numel() * shapes[1][0].numel() * (3 if training else 1)


GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}


def least_bytes(sample: Sample, data: dict[str, Tensor], dy: Tensor, training: bool) -> int:
    """Each operator's inputs once and its outputs once, what is kept for backward among them."""
    x, y = (t.numel() * t.itemsize for t in (data["input"], dy))
    weights = sum(t.numel() * t.itemsize for name, t in data.items() if name != "input")
    if not training:
        return x + y + weights
    fused = sample.stem in ("epilogue", "conv_stage", "conv_relu")
    norm = sample.stem == "lrn" or "lrn" in sample.arguments
    code = dy.numel() if sample.stem == "max_pool" or "pool" in sample.arguments else 0
    z = x if sample.weight is None else flops(sample, dy, False) // 2 // (data["weight"][0].numel()) * dy.itemsize
    written = code + (z if fused and norm else 0)
    read = code + (z if norm else 0) + (y if fused and not norm and not code else 0)
    again = 0 if sample.weight is None else x + weights  # a convolution's gradients read its input and weight
    return (x + y + weights + written) + (y + read + again + x + weights)
