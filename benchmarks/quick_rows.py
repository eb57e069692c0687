"""How benchmarks.quick measures one case: a pointwise kernel, a layer, a net, a training step, a call on the host."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import AlexNet, backend, pack
from alexnet_fast.ops.conv_relu import FORWARDS, INPUT_GRADIENTS, WEIGHT_GRADIENTS
from alexnet_fast.ops.conv_stage import FORWARDS as STAGE_FORWARDS
from alexnet_fast.ops.linear_relu import FORWARDS as LINEAR_FORWARDS
from alexnet_fast.ops.registry import family
from tests.ops.calls import Calls, calls_of
from tests.ops.compare import results as gradients_of
from tests.ops.samples import Sample

from . import host as tiny
from . import peers
from .bench_alexnet import GPU_BATCHES, labels_of, net_bytes_and_flops, on_device
from .bench_linear_int8 import LAYERS
from .bench_train_step import LABELS, net_and_batch, step_bytes_and_flops, step_of
from .cases import BATCHES, FORMS
from .gpu import Clock, rounds_of
from .memory import peak_bytes
from .timing import CHECKED, DRAWN, TOLERANCE, check, flops, formed, short

SECONDS = 0.1  # that the rounds of one case take together
ROUNDS = (5, 12)  # how many rounds, at least and at most
REPLAYS = 7  # of a CUDA graph; as often the host's time is taken
CALLS = 20  # of which each of the host's times is the mean
HALF, LAST = FORMS[-1]  # bfloat16, channels_last: what nets are measured in

Call = Callable[[], Any]
Row = dict[str, Any]

GRADIENTS = {"conv_backward_input": INPUT_GRADIENTS, "conv_backward_weight": WEIGHT_GRADIENTS}
CANDIDATES = {"conv_relu": FORWARDS, "conv_stage": STAGE_FORWARDS, **GRADIENTS}


@dataclass
class Place:
    """Where cases run, and at what sizes."""

    clock: Clock
    device: str = "cuda"
    own: str = "cuda"  # the backend of this package's pointwise kernels
    batches: tuple[int, ...] = BATCHES["cuda"]
    net_batches: tuple[int, ...] = GPU_BATCHES
    drawn: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    options: dict[str, tuple] = field(default_factory=dict)

    def data(self, sample: Sample, batch: int, dtype: torch.dtype = HALF, layout: str = LAST) -> dict[str, Tensor]:
        """The sample's tensors, drawn once for all its forms."""
        if str(sample) not in self.drawn:
            few = replace(sample, input=(min(DRAWN, max(self.batches)), *sample.input[1:]))
            self.drawn[str(sample)] = {name: t.to(self.device) for name, t in few.data(torch.float32).items()}
        return formed(self.drawn[str(sample)], batch, dtype, layout)

    def rest(self, sample: Sample) -> tuple:
        """The operator's arguments after its tensors, for inference: those of one small call on the CPU."""
        if str(sample) not in self.options:
            _, arguments = calls_of(replace(sample, input=(1, *sample.input[1:])), LAST)[0]
            self.options[str(sample)] = (*arguments[3:-1], False) if sample.stem == "conv_stage" else arguments[3:]
        return self.options[str(sample)]


def labels(bench: str, sample: Sample, batch: int, what: str, dtype: torch.dtype = HALF, layout: str = LAST) -> Row:
    case = f"{sample.reason}, {'x'.join(map(str, sample.input[1:]))}, batch {batch}"
    return {"bench": bench, "case": case, "dtype": short(dtype), "layout": layout, "pass": what, "backend": "cuda"}


# ---- Timing ----------------------------------------------------------------------------------------------------------


def alone(clock: Clock, calls: list[Call], graph: bool = True) -> float:
    """Microseconds of one of ``calls``, run one after the other, their results kept so that each has its own memory."""

    def run() -> list:
        return [call() for call in calls]

    run = (clock.captured(run) if graph else None) or run
    return rounded(1e6 * median(clock.warm(run) for _ in range(REPLAYS)) / len(calls))


def rounded(us: float) -> float:
    return float(f"{us:.4g}")


def agrees(result: object, truth: Tensor) -> bool:
    """Of ``truth``'s images, or of all where it is no batch of images."""
    few = result[: len(truth)] if truth.dim() == 4 and result.shape[0] > len(truth) else result
    return peers.agrees(few, truth, 2 * TOLERANCE[truth.dtype])


def raced(clock: Clock, sides: dict[str, Call], unchecked: tuple[str, ...] = ()) -> Row:
    """``us`` of each side, cold and interleaved, and why one ``failed``. The first side's result is the truth."""
    truth, sound, failed = None, {}, {}
    for name, call in sides.items():
        try:
            result = call()
            if truth is None:
                truth = result[:CHECKED].clone() if result.dim() == 4 else result.clone()
            elif name not in unchecked and not agrees(result, truth):
                failed[name] = "gives another result"
                continue
            del result
            for _ in range(2):
                call()
            clock.synchronize()
            sound[name] = call
        except Exception as error:
            failed[name] = said(error)
    times = rounds_of(clock.cold, sound, SECONDS, *ROUNDS) if sound else {}
    us = {name: rounded(1e6 * median(seconds)) for name, seconds in times.items()}
    return {"us": us} | ({"failed": failed} if failed else {})


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# ---- Pointwise kernels -----------------------------------------------------------------------------------------------


def operators(sample: Sample, data: dict[str, Tensor], dy: Tensor, own: str) -> dict[str, tuple[Callable, tuple]]:
    """What the public function calls, by pass: operator and arguments. A training forward that is inference's over
    again is left out."""
    with torch.inference_mode(), Calls() as inference:
        sample.ours(data, own)
    with Calls() as training:
        gradients_of(lambda leaves: sample.ours(leaves, own), data, dy)
    (forward,), (kept, backward) = ([detached(*call) for call in seen.calls] for seen in (inference, training))
    found = {"forward": forward, "forward, training": kept, "backward": backward}
    if options(forward[1]) == options(kept[1]):
        del found["forward, training"]
    return found


def detached(operator: Callable, arguments: tuple) -> tuple[Callable, tuple]:
    return operator, tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)


def options(arguments: tuple) -> list:
    return [value for value in arguments if not isinstance(value, Tensor)]


def tensor_bytes(*values: object) -> int:
    return sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))


def rotating(operator: Callable, arguments: tuple, clock: Clock) -> tuple[list[Call], int]:
    """Calls of ``operator`` on copies of its tensors, and the bytes that one reads and writes."""
    results = operator(*arguments)
    moved = tensor_bytes(*arguments, *(results if isinstance(results, tuple) else [results]))
    sets = [arguments]
    while len(sets) < max(2, min(16, ceil(clock.rotation / moved))):
        sets.append(tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments))
    return [partial(operator, *each) for each in sets], moved


def copy_us(place: Place, size: int) -> float:
    """Of as many bytes, half of them read and half written."""
    source = torch.randint(255, (max(1, size // 2),), dtype=torch.uint8, device=place.device)

    def copied(into: Tensor, out: Tensor) -> None:
        into.copy_(out)

    calls, _ = rotating(copied, (torch.empty_like(source), source), place.clock)
    return alone(place.clock, calls)


def eager_us(place: Place, sample: Sample, data: dict[str, Tensor], dy: Tensor, what: str, count: int) -> float:
    """Of PyTorch's functions. Their backward runs on the streams of their forward, which a graph cannot capture."""
    copies = [{name: tensor.clone() for name, tensor in data.items()} for _ in range(count)]
    if what == "forward":
        return alone(place.clock, [torch.inference_mode()(partial(sample.torch, each)) for each in copies])
    calls = []
    for each in copies:
        leaves = {name: tensor.requires_grad_() for name, tensor in each.items()}
        calls.append(partial(torch.autograd.grad, sample.torch(leaves), [*leaves.values()], dy, retain_graph=True))
    return alone(place.clock, calls, graph=False)


@torch.no_grad()
def gradient_of_output(sample: Sample, data: dict[str, Tensor]) -> Tensor:
    return torch.rand_like(sample.torch(data)) + 0.5


def pointwise_rows(place: Place, sample: Sample, batch: int, dtype: torch.dtype, layout: str) -> Iterator[Row]:
    data = place.data(sample, batch, dtype, layout)
    dy = gradient_of_output(sample, data)
    check(sample, data, dy, True, place.own)
    for what, (operator, arguments) in operators(sample, data, dy, place.own).items():
        calls, moved = rotating(operator, arguments, place.clock)
        us = {place.own: alone(place.clock, calls), "copy": copy_us(place, moved)}
        if batch == min(place.batches) and what != "forward, training":
            us["eager"] = eager_us(place, sample, data, dy, what, len(calls))
        yield labels(sample.stem, sample, batch, what, dtype, layout) | {"bytes": moved, "us": us}


def triton_rows(place: Place, sample: Sample, batch: int) -> Iterator[Row]:
    data = place.data(sample, batch)
    for what, (operator, arguments) in operators(sample, data, gradient_of_output(sample, data), place.own).items():
        twin = getattr(family("triton"), operator._opname)
        results = [op(*arguments) for op in (operator, twin)]
        for mine, theirs in zip(*(r if isinstance(r, tuple) else [r] for r in results), strict=True):
            if mine.numel() and mine.is_floating_point() and not agrees(theirs, mine):
                raise AssertionError(f"{twin}: gives another result")
        calls, moved = rotating(twin, arguments, place.clock)
        yield labels(sample.stem, sample, batch, what) | {"bytes": moved, "us": {"triton": alone(place.clock, calls)}}


# ---- Layers ----------------------------------------------------------------------------------------------------------


def geometry(sample: Sample, batch: int) -> Row:
    """What names a layer in layers.json."""
    arguments = {"stride": 1, "padding": 0, "groups": 1} | sample.arguments
    (filters, _, kernel, _), (channels, height, width) = sample.weight, sample.input[1:]
    lrn, pool = arguments.get("lrn"), arguments.get("pool")
    found = {"batch": batch, "channels": channels, "height": height, "width": width, "filters": filters}
    found |= {"kernel": kernel, **{name: arguments[name] for name in ("stride", "padding", "groups")}}
    return found | {"lrn": lrn.size if lrn else 0, "pool": pool.kernel_size if pool else 0}


def chosen(sides: dict[str, Call], only: str) -> dict[str, Call]:
    """The first, which has the truth, and ``only``; without one, all but what has a section of its own or, as kernels
    with each of their tiles, none."""
    truth = next(iter(sides))
    later = {name for name in sides if name == "triton" or "sm90" in name or ":" in name}
    return {name: call for name, call in sides.items() if name in (truth, only) or (not only and name not in later)}


def layer_row(place: Place, sample: Sample, batch: int, only: str = "") -> Iterator[Row]:
    """Of a convolution with ReLU, or a stage, what auto chooses from, torch's functions, and the convolution alone."""
    data, rest = place.data(sample, batch), place.rest(sample)
    tensors = x, weight, _ = data["input"], data["weight"], data["bias"]
    sides: dict[str, Call] = {"eager": lambda: sample.torch(data)}
    sides |= {name: partial(first_of, call, *tensors, *rest) for name, call in CANDIDATES[sample.stem].items()}
    if sample.stem == "conv_relu":
        sides["cudnn"] = partial(F.conv2d, x, weight, None, *rest)
    with torch.inference_mode():
        found = raced(place.clock, chosen(sides, only), unchecked=("cudnn",))
    yield finished(found, labels(sample.stem, sample, batch, "forward"), sample, batch, only)


def gradient_row(place: Place, sample: Sample, batch: int, bench: str, only: str = "") -> Iterator[Row]:
    """Of what is masked already; cuDNN's is the truth."""
    data, rest = place.data(sample, batch), place.rest(sample)
    x, weight = data["input"], data["weight"]
    dy = torch.randn_like(F.conv2d(x, weight, None, *rest))
    sides = {name: partial(call, dy, x, weight, *rest) for name, call in CANDIDATES[bench].items()}
    found = raced(place.clock, chosen(sides, only))
    yield finished(found, labels(bench, sample, batch, "backward"), sample, batch, only)


def linear_row(place: Place, name: str, rows: int) -> Iterator[Row]:
    """Of fc6, fc7 or fc8 what auto chooses from, and torch's functions. fc8 has no ReLU."""
    (inputs, outputs), relu = LAYERS[name], name != "fc8"
    sizes = (rows, inputs), (outputs, inputs), (outputs,)
    x, weight, bias = (torch.randn(size, device=place.device, dtype=HALF) for size in sizes)
    sides: dict[str, Call] = {"eager": lambda: F.relu(F.linear(x, weight, bias)) if relu else F.linear(x, weight, bias)}
    sides |= {name: partial(call, x, weight, bias, relu) for name, call in LINEAR_FORWARDS.items()}
    case = f"{name} {inputs} to {outputs}, {rows} rows"
    named = {"bench": "linear_relu", "case": case, "dtype": short(HALF), "layout": "contiguous", "pass": "forward"}
    with torch.inference_mode():
        found = raced(place.clock, sides)
    yield (
        named | {"backend": "cuda", "bytes": HALF.itemsize * weight.numel(), "flops": 2 * rows * weight.numel()} | found
    )


def first_of(call: Callable[..., Any], *arguments: Any) -> Tensor:
    result = call(*arguments)
    return result if isinstance(result, Tensor) else result[0]


def finished(found: Row, named: Row, sample: Sample, batch: int, only: str) -> Row:
    if only:  # the truth's time is another row's
        found["us"] = {name: us for name, us in found["us"].items() if name == only}
    images = replace(sample, input=(batch, *sample.input[1:]))
    return named | {"layer": geometry(sample, batch), "flops": flops(images, torch.empty(0), False)} | found


# ---- Nets ------------------------------------------------------------------------------------------------------------


def net_row(
    place: Place, variant: str, batch: int, more: Callable[..., dict[str, Call]] | None = None
) -> Iterator[Row]:
    """``more``: sides in place of the named backend's and of graphs, from the peer and its images."""
    net = on_device(variant, place.device, HALF)
    plain, x = peers.plain(net), images_of(place, net, batch)
    row = labels_of(variant, batch, HALF)

    def named() -> Tensor:
        with backend(place.own):
            return net(x)

    with torch.inference_mode():
        sides = {"eager": lambda: plain(x), "auto": lambda: net(x)}
        if more:
            row |= {"missing": {}}
            sides |= usable(more(plain, x), row["missing"])
        pack(net)
        if not more:
            sides[place.own] = named
            for name in list(sides):
                if replay := graph_of(place.clock, sides[name]):
                    sides[f"{name}, graph"] = replay
        unchecked = tuple(name for name in sides if name.endswith("graph"))
        row |= raced(place.clock, sides, unchecked)
        row["peak"] = {name: peak_bytes(sides[name], place.device) for name in ("auto", "eager") if name in row["us"]}
    row["bytes"], row["flops"] = net_bytes_and_flops(net, x)
    yield row


def images_of(place: Place, net: AlexNet, batch: int) -> Tensor:
    shape = (batch, 3, net.variant.image_size, net.variant.image_size)
    return torch.randn(shape, device=place.device).to(HALF).contiguous(memory_format=torch.channels_last)


def graph_of(clock: Clock, call: Call) -> Call | None:
    """Replays; None where the call fails, which its own side says."""
    try:
        return clock.captured(call)
    except Exception:
        return None


def usable(made: dict[str, peers.Peer], missing: dict[str, str]) -> dict[str, Call]:
    missing |= {name: peer for name, peer in made.items() if isinstance(peer, str)}
    return {name: peer for name, peer in made.items() if not isinstance(peer, str)}


def training_row(place: Place, variant: str, batch: int, compiled: bool = False) -> Iterator[Row]:
    ours, x, classes = net_and_batch(variant, place.device, HALF, batch)
    plain = peers.plain(copy.deepcopy(ours))
    sides = {"eager": step_of(plain, plain, x, classes), "auto": step_of(ours, ours, x, classes)}
    if compiled:
        torch._dynamo.reset()
        twin = peers.plain(copy.deepcopy(ours))
        call = torch.compile(twin, mode="max-autotune-no-cudagraphs")
        sides["compile"] = step_of(twin, call, x, classes)
    row = labels_of(variant, batch, HALF) | LABELS | raced(place.clock, sides)
    row["peak"] = {name: peak_bytes(sides[name], place.device) for name in ("auto", "eager") if name in row["us"]}
    row["bytes"], row["flops"] = step_bytes_and_flops(ours, x)
    yield row


# ---- Host ------------------------------------------------------------------------------------------------------------


def host_row(place: Place, case: str, what: str, make: Callable[[], dict[str, Call]]) -> Iterator[Row]:
    calls = make()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(5):
            call()
    for _ in range(REPLAYS):
        for name, call in calls.items():
            place.clock.synchronize()
            begin = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - begin) / CALLS)
    us = {name: rounded(1e6 * median(taken)) for name, taken in times.items()}
    yield {"bench": "host", "case": case, "pass": what, "us": us}


def function_calls(place: Place, sample: Sample) -> dict[str, Call]:
    data = {name: tensor.to(place.device) for name, tensor in sample.data(torch.float32).items()}
    calls = {"eager": partial(sample.torch, data), "auto": partial(sample.ours, data)}
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


def net_calls(place: Place) -> dict[str, Call]:
    net = on_device("torchvision", place.device, HALF)
    calls = {"eager": partial(peers.plain(net), images_of(place, net, 1))}
    calls["auto"] = partial(net, *calls["eager"].args)
    return {name: torch.inference_mode()(call) for name, call in calls.items()}


def tiny_net_calls(place: Place, training: bool) -> dict[str, Call]:
    x = torch.randn(1, 3, tiny.SIDE, tiny.SIDE, device=place.device)
    nets = tiny.nets()
    return {
        side: tiny.call_of(nets[name].to(place.device), x, training)
        for side, name in (("eager", "eager"), ("auto", "ours"))
    }
