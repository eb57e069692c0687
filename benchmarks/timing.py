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
# A call that takes less is timed anew after one from rest, which finds clocks, caches and threads asleep: that costs a
# call some tenths of a millisecond that none pays in a loop. Both are kept.
SHORT = 0.02
MEMORY_BATCH = {"cpu": 32, "cuda": 128}  # bytes go with the batch: once is enough
CHECKED = 8
DRAWN = 32  # images that are drawn; of a larger batch they are the parts


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interleave(
    benchmark, sides: dict[str, Callable[[], object]], device: str, seconds: float, least: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each side, one list entry a round: of a call, and of the one from rest before it, which is the same
    call where it is not SHORT. "ours" comes last in a round and is the one that pytest-benchmark sees.

    On a GPU these are wall times of one call and a synchronize, for pytest-benchmark's own table alone.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    rested: dict[str, list[float]] = {name: [] for name in sides}

    def taken(call: Callable[[], object]) -> float:
        start = perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    def from_rest(name: str) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        else:
            sleep(REST)
        rested[name].append(taken(sides[name]))
        return rested[name][-1]

    def others() -> None:
        for name, call in sides.items():
            if name != "ours":
                first = from_rest(name)
                times[name].append(taken(call) if first < SHORT else first)

    def before_ours() -> None:
        others()
        if repeats:
            from_rest("ours")
        else:
            sleep(REST)

    def ours() -> None:
        times["ours"].append(taken(sides["ours"]))
        if not repeats:
            rested["ours"].append(times["ours"][-1])

    start = perf_counter()
    others()
    repeats = from_rest("ours") < SHORT
    rounds = 1 if benchmark.disabled else max(least, min(25, int(seconds / (perf_counter() - start))))
    benchmark.pedantic(ours, setup=before_ours, rounds=rounds)
    return tuple({name: entries[-rounds:] for name, entries in each.items()} for each in (times, rested))


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
    times, rested = interleave(benchmark, sides, device, seconds, least)
    if benchmark.disabled:
        return None
    if device == "cuda":
        row = labels | gpu.event_times(sides, seconds) | {"wall": timed(times)}
    else:
        row = labels | timed(times) | {"rested": {name: timed(rested)["ms"][name][1] for name in sides}}
    benchmark.extra_info |= row
    return row


def check(sample: Sample, data: dict[str, Tensor], dy: Tensor, training: bool, backend: str) -> None:
    """Of up to ``CHECKED`` images: tests are what finds faults that depend on the batch."""
    data, dy = data | {"input": data["input"][:CHECKED]}, dy[:CHECKED]

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


def drawn(sample: Sample, dtype: torch.dtype, layout: str, device: str) -> dict[str, Tensor]:
    """The tensor arguments; of more than ``DRAWN`` images, so many and their repetitions."""
    batch, *image = sample.input
    data = replace(sample, input=(min(batch, DRAWN), *image)).data(dtype)
    return formed({name: tensor.to(device) for name, tensor in data.items()}, batch, dtype, layout)


def formed(data: dict[str, Tensor], batch: int, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """``data`` with its images repeated up to ``batch``, in another dtype and layout."""
    images = data["input"]
    data = data | {"input": images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]}
    return {name: relayout(tensor.to(dtype), layout) for name, tensor in data.items()}


def race(
    benchmark,
    missing: dict[str, str],
    sample: Sample,
    dtype: torch.dtype,
    layout: str,
    training: bool,
    backend: str,
    batch: int,
) -> dict | None:
    """The row of ``sample`` at ``batch`` images: ours against PyTorch's functions, and in inference against compilers
    and runtimes."""
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    sample = replace(sample, input=(batch, *sample.input[1:]))
    data = drawn(sample, dtype, layout, device)
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
        made = {"compile": peers.compiled(modules, x)} if _compiles(sample, device, dtype, layout) else {}
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
        "case": f"{sample.reason}, {'x'.join(map(str, sample.input[1:]))}, batch {batch}",
        "dtype": short(dtype),
        "layout": layout,
        "pass": "forward+backward" if training else "forward",
        "backend": backend,
    }
    row = row_of(benchmark, sides, labels, device, seconds=0.2, least=4)
    if row is None:
        return None
    row |= {"bytes": least_bytes(sample, data, dy, training), "flops": flops(sample, dy, training)}
    if training and batch == MEMORY_BATCH[device]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in data.items()}
        calls = {"ours": lambda t: sample.ours(t, backend), "eager": sample.torch}
        row["saved"] = {name: saved_bytes(lambda c=call: c(leaves)) for name, call in calls.items()}
        row["peak"] = {name: peak_bytes(sides[name], device) for name in calls}
    return row


def _compiles(sample: Sample, device: str, dtype: torch.dtype, layout: str) -> bool:
    """Compiling takes seconds a case: one form stands for all, and on CPUs whole stages for their parts, and nets for
    batches of one."""
    if (dtype, layout) != (torch.bfloat16, "channels_last"):
        return False
    return device == "cuda" or (sample.input[0] > 1 and sample.stem in ("conv_stage", "lrn"))


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
