"""One look: whole nets against torch's own modules, on this machine, in a minute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Measurement, Timer

from alexnet_fast.models import AlexNet
from alexnet_fast.nn import pack
from alexnet_fast.ops import local_response_norm

TURNS = 3  # of each side in a case


class Seen(NamedTuple):
    """One case: medians in seconds, images/s of ours, and the ratio of the medians."""

    case: str
    dtype: str
    ours: float
    eager: float
    images_s: float

    @property
    def ratio(self) -> float:
        return self.eager / self.ours


def _race(ours: Callable[[], object], eager: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Medians of both, which take turns."""
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in (ours, eager)]
    turns = [[timer.blocked_autorange(min_run_time=seconds / 2 / TURNS) for timer in timers] for _ in range(TURNS)]
    first, second = (Measurement.merge(side)[0].median for side in zip(*turns, strict=True))
    return first, second


def look(device: str | None = None, batch: int | None = None, seconds: float = 4) -> list[Seen]:
    """Inference and a training step of the torchvision and Caffe variants, and LRN, against torch's modules.

    Each case takes about ``seconds``, and what warming up takes. Both sides are channels_last; in inference on a CPU
    ours is packed. Caffe's variant has LRN, which torch computes in float32 alone on CPUs. ``benchmarks/`` in the
    repository has more cases and peers, and checks every result.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batch = batch or {"cpu": 16, "cuda": 256}[device]
    torch.manual_seed(0)
    seen = []
    for variant, dtype in (("torchvision", torch.float32), ("torchvision", torch.bfloat16), ("caffe", torch.float32)):
        net = AlexNet(variant=variant).to(device, dtype).to(memory_format=torch.channels_last)
        other = copy.deepcopy(net)
        plain = nn.Sequential(*other.features, nn.Flatten(), *other.classifier)
        side = net.variant.image_size
        x = torch.randn(batch, 3, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        short = str(dtype).removeprefix("torch.")
        with torch.inference_mode():
            pack(net.eval()), plain.eval()
            times = _race(lambda n=net, x=x: n(x), lambda n=plain, x=x: n(x), seconds)
            seen.append(Seen(f"{variant}, inference, batch {batch}", short, *times, batch / times[0]))
        if variant == "caffe":
            net.train(), plain.train()
            steps = [lambda n=n, x=x: n(x).sum().backward() for n in (net, plain)]
            times = _race(*steps, seconds)
            seen.append(Seen(f"{variant}, forward and backward, batch {batch}", short, *times, batch / times[0]))
    x = torch.randn(batch, 96, 55, 55, device=device).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        norm = nn.LocalResponseNorm(5, k=2.0)
        times = _race(lambda: local_response_norm(x, 5, k=2.0), lambda: norm(x), seconds)
    seen.append(Seen(f"LRN after conv1, batch {batch}", "float32", *times, batch / times[0]))
    return seen
