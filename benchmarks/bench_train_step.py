"""A training step: forward, cross entropy, backward and SGD with momentum; its time, its peak and its saved bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import peers
from .bench_alexnet import net_bytes_and_flops, net_of
from .cases import devices
from .memory import peak_bytes, saved_activations
from .timing import row_of, short

BATCH = {"cpu": 8, "cuda": 128}


def step_of(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, classes: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> Tensor:
        loss = F.cross_entropy(call(x).float(), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@devices
@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_train_step(benchmark, keep, missing, variant, device, dtype):
    last, batch = torch.channels_last, BATCH[device]
    ours = copy.deepcopy(net_of(variant)).to(device, dtype).to(memory_format=last)
    for module in ours.classifier:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the sides' losses can be compared
    theirs, other = (copy.deepcopy(ours) for _ in range(2))
    plain, twin = peers.plain(theirs), peers.plain(other)
    side = ours.variant.image_size
    x = torch.randn(batch, 3, side, side, device=device).to(dtype).contiguous(memory_format=last)
    classes = torch.randint(0, 1000, (batch,), device=device)
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
    labels = {
        "bench": "train_step",
        "case": f"{variant}, batch {batch}",
        "dtype": short(dtype),
        "layout": "channels_last",
        "pass": "forward+backward",
        "backend": "auto",
    }
    row = row_of(benchmark, sides, labels, device, seconds=1.5, least=4)
    if row is None:
        return
    bytes_moved, flops = net_bytes_and_flops(ours, x)
    # Weights are read twice, gradients written and read once, the momentum and the weights read and written by SGD.
    parameters = sum(p.numel() for p in ours.parameters()) * x.itemsize
    row |= {"bytes": bytes_moved + 7 * parameters, "flops": 3 * flops}
    row["peak"] = {name: peak_bytes(sides[name], device) for name in ("ours", "eager channels_last")}
    row["saved"] = {
        "ours": saved_activations(lambda: ours(x), ours),
        "eager channels_last": saved_activations(lambda: plain(x), plain),
    }
    keep(row)
