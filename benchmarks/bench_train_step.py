"""A training step: forward, cross entropy, backward and SGD with momentum; its time, its peak and its saved bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast import AlexNet

from . import peers
from .bench_alexnet import labels_of, net_bytes_and_flops, net_of
from .cases import devices
from .memory import peak_bytes, saved_activations
from .timing import row_of, short

BATCH = {"cpu": 8, "cuda": 128}
LABELS = {"bench": "train_step", "pass": "forward+backward"}


def step_of(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, classes: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> Tensor:
        loss = F.cross_entropy(call(x).float(), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def net_and_batch(variant: str, device: str, dtype: torch.dtype, batch: int) -> tuple[AlexNet, Tensor, Tensor]:
    """A net whose steps can be compared with another's, as it drops nothing; images and classes."""
    net = copy.deepcopy(net_of(variant)).to(device, dtype).to(memory_format=torch.channels_last)
    for module in net.classifier:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    side = net.variant.image_size
    x = torch.randn(batch, 3, side, side, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
    return net, x, torch.randint(0, 1000, (batch,), device=device)


def step_bytes_and_flops(net: AlexNet, x: Tensor) -> tuple[int, int]:
    """Weights are read twice, gradients written and read once, the momentum and the weights read and written by SGD."""
    bytes_moved, flops = net_bytes_and_flops(net, x)
    parameters = sum(p.numel() for p in net.parameters()) * x.itemsize
    return bytes_moved + 7 * parameters, 3 * flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@devices
@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_train_step(benchmark, keep, missing, variant, device, dtype):
    batch = BATCH[device]
    ours, x, classes = net_and_batch(variant, device, dtype, batch)
    theirs, other = (copy.deepcopy(ours) for _ in range(2))
    plain, twin = peers.plain(theirs), peers.plain(other)
    torch.backends.cudnn.benchmark = True
    torch._dynamo.reset()
    mode = "max-autotune-no-cudagraphs" if device == "cuda" else None
    sides = {
        "ours": step_of(ours, ours, x, classes),
        "eager channels_last": step_of(plain, plain, x, classes),
    }
    if device == "cuda" or (variant, dtype) == ("torchvision", torch.bfloat16):  # on CPUs it takes a while
        sides["compile"] = step_of(twin, torch.compile(twin, mode=mode), x, classes)
    losses = {}
    for name in list(sides):
        try:
            losses[name] = [sides[name]().item() for _ in range(2)]
        except Exception as error:  # Inductor without a compiler
            if name != "compile":
                raise
            missing["compile (training)"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            del sides[name]
    for name, values in losses.items():
        assert values == pytest.approx(losses["ours"], rel=2e-3 if dtype == torch.float32 else 2e-2), name
    labels = labels_of(variant, batch, dtype) | LABELS
    row = row_of(benchmark, sides, labels, device, seconds=1.5, least=4)
    if row is None:
        return
    row["bytes"], row["flops"] = step_bytes_and_flops(ours, x)
    row["peak"] = {name: peak_bytes(sides[name], device) for name in ("ours", "eager channels_last")}
    row["saved"] = {
        "ours": saved_activations(lambda: ours(x), ours),
        "eager channels_last": saved_activations(lambda: plain(x), plain),
    }
    keep(row)
