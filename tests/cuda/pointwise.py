"""Samples of the pointwise operators, and of LPIPS's layers, as cases of their launchers, and what must come out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.ops import LRN, Pool

from ..ops.compare import as_exact, double, error, output_gradient, results
from ..ops.samples import SAMPLES, Sample, epilogue, lpips_layer, lrn, max_pool, torch_lrn
from .host_build import Case, Result
from .params import DTYPES, EpilogueParams, LpipsParams, LrnParams, LrnWindow, PoolParams, Window

HALF_TYPES = (torch.float16, torch.bfloat16)
CLOSED = 255  # kClosed
FORMATS = {False: torch.contiguous_format, True: torch.channels_last}


@dataclass(frozen=True)
class Task:
    """One launch on a sample's data, with ``exact`` results in float64 and PyTorch's own in the same dtype."""

    name: str
    case: Case
    exact: dict[str, Tensor]
    peer: dict[str, Tensor]
    equal: dict[str, Tensor]  # outputs that must agree to the last bit

    def check(self, result: Result) -> None:
        assert result.error == 0, f"{self.name}: cudaError {result.error}"
        for key, exact in self.exact.items():
            actual = result.outputs[key]
            assert as_exact(actual, self.peer[key], exact), (
                f"{self.name}: {key} errs by {error(actual, exact):.3g}, PyTorch by {error(self.peer[key], exact):.3g}"
            )
        for key, expected in self.equal.items():
            assert torch.equal(result.outputs[key], expected), f"{self.name}: {key}"


# ---- Params ----------------------------------------------------------------------------------------------------------


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def lrn_window(size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1) -> LrnWindow:
    return LrnWindow(size=size, groups=groups, alpha=alpha, beta=beta, k=k)


def window(kernel_size, stride=None, padding=0, ceil_mode=False) -> Window:
    return Window(*pair(kernel_size), *pair(kernel_size if stride is None else stride), *pair(padding))


def image_fields(x: Tensor, y: Tensor, channels_last: bool) -> dict:
    names = ("batch", "channels", "height", "width", "out_height", "out_width")
    sizes = dict(zip(names, (*x.shape, *y.shape[2:]), strict=True))
    return {"dtype": DTYPES[x.dtype], "channels_last": channels_last, **sizes}


def codes(x: Tensor, kernel_size, stride=None, padding=0, ceil_mode=False) -> Tensor:
    """PyTorch's winners as places in the uncut window."""
    k = window(kernel_size, stride, padding)
    # Its indices are right in float64 alone beyond 2**24, and 16-bit pooling is not everywhere; values do not change.
    _, index = F.max_pool2d(x.double(), kernel_size, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    row, column = index // x.shape[3], index % x.shape[3]
    top = torch.arange(index.shape[2])[:, None] * k.stride_h - k.pad_h
    left = torch.arange(index.shape[3]) * k.stride_w - k.pad_w
    return (k.kernel_w * (row - top) + column - left).to(torch.uint8)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


def lrn_tasks(sample: Sample, dtype: torch.dtype, channels_last: bool, name: str) -> Iterator[Task]:
    data, dy, peer, exact, put = prepare(sample, dtype, channels_last)
    n, c, *pixels = data["input"].shape
    fields = {"dtype": DTYPES[dtype], "channels_last": channels_last, "batch": n, "channels": c}
    params = LrnParams(**fields, pixels=torch.Size(pixels).numel(), lrn=lrn_window(**sample.arguments))
    x = put(data["input"])
    yield Task(name, Case("lrn_fwd", params, {"x": x}, {"y": x}), {"y": exact["output"]}, {"y": peer["output"]}, {})
    backward = Case("lrn_bwd", params, {"x": x, "dy": put(dy)}, {"dx": x})
    yield Task(name, backward, {"dx": exact["input"]}, {"dx": peer["input"]}, {})


def max_pool_tasks(sample: Sample, dtype: torch.dtype, channels_last: bool, name: str) -> Iterator[Task]:
    data, dy, peer, exact, put = prepare(sample, dtype, channels_last)
    x, y = put(data["input"]), put(peer["output"])
    params = PoolParams(**image_fields(x, y, channels_last), window=window(**sample.arguments))
    code = put(codes(x, **sample.arguments))
    yield Task(name, Case("max_pool_fwd", params, {"x": x}, {"y": y, "code": code}), {}, {}, {"y": y, "code": code})
    yield Task(f"{name}, inference", Case("max_pool_fwd", params, {"x": x}, {"y": y}), {}, {}, {"y": y})
    backward = Case("max_pool_bwd", params, {"dy": put(dy), "code": code}, {"dx": x})
    yield Task(name, backward, {"dx": exact["input"]}, {"dx": peer["input"]}, {})


def epilogue_tasks(sample: Sample, dtype: torch.dtype, channels_last: bool, name: str) -> Iterator[Task]:
    data, dy, peer, exact, put = prepare(sample, dtype, channels_last)
    lrn, pool = sample.arguments.get("lrn"), sample.arguments.get("pool")
    z, y = put(data["input"]), put(peer["output"])
    params = EpilogueParams(
        **image_fields(z, y, channels_last),
        lrn=lrn_window(*lrn) if lrn else LrnWindow(),
        window=window(*pool) if pool else Window(),
    )
    bias = {"bias": data["bias"]} if "bias" in data else {}
    r = put(F.relu(z + data["bias"][:, None, None] if bias else z))
    forward, equal, saved = {"y": y}, {}, {}
    if pool:
        normalized = torch_lrn(r, *lrn) if lrn else r
        code = codes(normalized, *pool)
        if not lrn:
            code = torch.where(peer["output"] <= 0, CLOSED, code).to(torch.uint8)
        equal["code"] = saved["code"] = put(code)
    if lrn:
        equal["r"] = r
    if lrn or not pool:
        saved["r"] = r
    exact_y, peer_y = {"y": exact["output"]}, {"y": peer["output"]}
    yield Task(name, Case("epilogue_fwd", params, {"z": z, **bias}, forward | equal), exact_y, peer_y, equal)
    yield Task(f"{name}, inference", Case("epilogue_fwd", params, {"z": z, **bias}, forward), exact_y, peer_y, {})
    inputs = {"dy": put(dy), **saved}
    exact_dz, peer_dz = {"dz": exact["input"]}, {"dz": peer["input"]}
    if bias:
        case = Case("epilogue_bwd", params, inputs, {"dz": z, "db": data["bias"]}, workspace="db_partial")
        yield Task(name, case, exact_dz | {"db": exact["bias"]}, peer_dz | {"db": peer["bias"]}, {})
    yield Task(f"{name}, no db", Case("epilogue_bwd", params, inputs, {"dz": z}), exact_dz, peer_dz, {})


def lpips_layer_tasks(sample: Sample, dtype: torch.dtype, channels_last: bool, name: str) -> Iterator[Task]:
    data, dy, peer, exact, put = prepare(sample, dtype, channels_last)
    x, weight, dy = put(data["input"]), data["weight"].float(), dy.float()
    images, channels, *pixels = x.shape
    spatial = sample.arguments.get("spatial", False)
    sizes = {"pairs": images // 2, "channels": channels, "pixels": torch.Size(pixels).numel()}
    params = LpipsParams(dtype=DTYPES[dtype], channels_last=channels_last, spatial=spatial, **sizes)
    inputs = {"x": x, "weight": weight}
    forward = Case("lpips_layer_fwd", params, inputs, {"y": dy}, workspace=None if spatial else "partial")
    yield Task(name, forward, {"y": exact["output"]}, {"y": peer["output"]}, {})
    inputs = {**inputs, "dy": dy}
    exact_dx, peer_dx = {"dx": exact["input"]}, {"dx": peer["input"]}
    yield Task(f"{name}, no dweight", Case("lpips_layer_bwd", params, inputs, {"dx": x}), exact_dx, peer_dx, {})
    # The weight's gradient is float32 whatever x is.
    wide = results(sample.torch, {key: tensor.float() for key, tensor in data.items()}, dy)
    backward = Case("lpips_layer_bwd", params, inputs, {"dx": x, "dweight": weight}, workspace="partial")
    exact_both, peer_both = exact_dx | {"dweight": exact["weight"]}, peer_dx | {"dweight": wide["weight"]}
    yield Task(name, backward, exact_both, peer_both, {})


def prepare(sample: Sample, dtype: torch.dtype, channels_last: bool):
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())

    def put(tensor: Tensor) -> Tensor:
        """A dense copy in the layout."""
        if tensor.dim() == 4:
            return tensor.clone(memory_format=FORMATS[channels_last])
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()

    return data, dy, peer, exact, put


# ---- Samples ---------------------------------------------------------------------------------------------------------


def listed(stem: str) -> list[Sample]:
    """The operator's own samples, but for those that Python code reshapes before a launcher sees them."""
    return [
        s for s in SAMPLES if s.stem == stem and len(s.input) >= 3 and 0 not in s.input and "(C, H, W)" not in s.reason
    ]


def random_lrn(chance: random.Random) -> Sample:
    groups = chance.choice((1, 1, 1, 2, 3))
    channels = groups * chance.choice((1, 2, 5, 8, 8, 12, 16, 24, 32, 40, 67))
    shape = (chance.randint(1, 3), channels, chance.randint(1, 6), chance.choice((1, 2, 3, 5, 8)))
    beta = chance.choice((0.75, 0.75, 0.75, 0.5, 1.0, 0.6))
    k = chance.choice((1.0, 2.0, 0.5))
    return lrn("random", shape, chance.randint(1, 16), alpha=0.02, beta=beta, k=k, groups=groups)


def random_window(chance: random.Random, height: int, width: int) -> dict:
    """AlexNet's window, or any that PyTorch accepts: padding at most half of it."""
    if chance.random() < 0.4:
        return {"kernel_size": 3, "stride": 2, "padding": chance.choice((0, 0, 1)), "ceil_mode": chance.random() < 0.3}
    kernel = (chance.randint(1, 7), chance.randint(1, 7))
    padding = tuple(chance.randint(0, k // 2) for k in kernel)
    fitting = tuple(min(k, side + 2 * p) for k, side, p in zip(kernel, (height, width), padding, strict=True))
    padding = tuple(min(p, k // 2) for p, k in zip(padding, fitting, strict=True))
    stride = (chance.randint(1, 4), chance.randint(1, 4))
    return {"kernel_size": fitting, "stride": stride, "padding": padding, "ceil_mode": chance.random() < 0.3}


def random_image(chance: random.Random) -> tuple[int, int, int, int]:
    channels = chance.choice((1, 2, 3, 5, 8, 8, 12, 16, 24))
    return (chance.randint(1, 3), channels, chance.randint(3, 11), chance.randint(3, 11))


def random_max_pool(chance: random.Random) -> Sample:
    shape = random_image(chance)
    return max_pool("random", shape, **random_window(chance, *shape[2:]))


def random_epilogue(chance: random.Random) -> Sample:
    shape = random_image(chance)
    arguments = {}
    if chance.random() < 0.6:
        groups = chance.choice([g for g in (1, 1, 2, 3) if shape[1] % g == 0])
        arguments["lrn"] = LRN(chance.randint(1, 16), 1e-3, chance.choice((0.75, 0.75, 0.5, 1.0, 0.6)), 1.0, groups)
    if chance.random() < 0.7:
        arguments["pool"] = Pool(**random_window(chance, *shape[2:]))
    return epilogue("random", shape, bias=chance.random() < 0.8, **arguments)


def random_lpips_layer(chance: random.Random) -> Sample:
    # Of two channels a gradient, and of a pixel or two a mean, is a rounding or so off where PyTorch's luck is none.
    channels = chance.choice((5, 8, 8, 12, 16, 24, 40, 67, 136, 264))
    shape = (2 * chance.randint(1, 3), channels, chance.randint(3, 11), chance.randint(3, 11))
    return lpips_layer("random", shape, spatial=chance.random() < 0.5)


TASKS: dict[str, Callable[..., Iterator[Task]]] = {
    "lrn": lrn_tasks,
    "max_pool": max_pool_tasks,
    "epilogue": epilogue_tasks,
    "lpips_layer": lpips_layer_tasks,
}
RANDOM: dict[str, Callable[[random.Random], Sample]] = {
    "lrn": random_lrn,
    "max_pool": random_max_pool,
    "epilogue": random_epilogue,
    "lpips_layer": random_lpips_layer,
}


def tasks(stem: str, count: int, seed: int = 0) -> list[Task]:
    """All of the operator's listed samples, and random ones up to ``count``, in both layouts, dtypes in turn."""
    chance = random.Random(seed)
    samples = listed(stem)
    samples += [RANDOM[stem](chance) for _ in range(count - len(samples))]
    found = []
    for number, sample in enumerate(samples):
        for channels_last in (False, True):
            dtype = (torch.float32, torch.float16, torch.bfloat16)[(number + channels_last) % 3]
            name = f"{sample} {sample.input} {sample.arguments} {dtype} {'NHWC' if channels_last else 'NCHW'}"
            found += TASKS[stem](sample, dtype, channels_last, name)
    return found
