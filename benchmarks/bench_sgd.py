"""A step of SGD for all of AlexNet's 61 million parameters: ours, torch's fused one, and torch's default."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import AlexNet
from alexnet_fast.optim import SGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
SIDES = {
    "ours": lambda parameters: SGD(parameters, **OPTIONS),
    "torch fused": lambda parameters: torch.optim.SGD(parameters, **OPTIONS, fused=True),
    "torch": lambda parameters: torch.optim.SGD(parameters, **OPTIONS),
}


@pytest.mark.parametrize("side", SIDES)
def test_sgd(benchmark, side):
    net = AlexNet().to(DEVICE)
    optimizer = SIDES[side](net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)

    def step() -> None:
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "sgd"
    benchmark.pedantic(step, rounds=20, warmup_rounds=3)
