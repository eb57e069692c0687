"""A step of SGD with momentum for all of AlexNet's 61 million parameters: ours, torch's default, and its fused one."""

from __future__ import annotations

import torch

from alexnet_fast import AlexNet
from alexnet_fast.optim import SGD

from .cases import devices
from .timing import row_of

OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
SIDES = {
    "ours": lambda parameters: SGD(parameters, **OPTIONS),
    "eager": lambda parameters: torch.optim.SGD(parameters, **OPTIONS),
    "eager fused": lambda parameters: torch.optim.SGD(parameters, **OPTIONS, fused=True),
}


@devices
def test_sgd(benchmark, keep, device):
    torch.manual_seed(0)
    start = AlexNet().to(device)
    gradients = [torch.randn_like(parameter) for parameter in start.parameters()]
    steps, ends = {}, {}
    for name, make in SIDES.items():
        parameters = [parameter.detach().clone().requires_grad_() for parameter in start.parameters()]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer = make(parameters)
        steps[name], ends[name] = optimizer.step, parameters
        for _ in range(2):
            optimizer.step()
    for name, parameters in ends.items():
        for mine, theirs in zip(ends["ours"], parameters, strict=True):
            torch.testing.assert_close(mine, theirs, msg=lambda text, name=name: f"{name}: {text}")
    count = sum(gradient.numel() for gradient in gradients)
    labels = {"bench": "sgd", "case": f"{count / 1e6:.0f} million parameters", "dtype": "float32"}
    labels |= {"layout": "contiguous", "pass": "step", "backend": "cpu" if device == "cpu" else "triton"}
    row = row_of(benchmark, steps, labels, device, seconds=0.5)
    keep(row and row | {"bytes": 5 * 4 * count, "flops": 0})  # reads weights, gradients, momentum; writes two of them
