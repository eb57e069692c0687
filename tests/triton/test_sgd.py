"""The optimizer's one launch for a whole net, against PyTorch's plain steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast import backend
from alexnet_fast.optim import SGD
from alexnet_fast.triton_kernels import sgd
from tests.test_optim import OPTIONS, parameters, run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*OPTIONS, {"momentum": 0.9, "weight_decay": 5e-4, "rule": "2012"}], ids=str)
def test_as_the_plain_steps(options, dtype, monkeypatch, device):
    """Within rounding: a GPU multiplies and adds in one, the interpreter in two, and it truncates to bfloat16."""
    monkeypatch.setattr(sgd, "ELEMENTS", 16384)  # the interpreter's own tile would hold each parameter
    ours, theirs = ([nn.Parameter(p.to(device)) for p in parameters(dtype)] for _ in range(2))
    optimizer, plain = SGD(ours, lr=0.1, **options), SGD(theirs, lr=0.1, **options)
    with backend("triton"):
        run(optimizer)
    with backend("reference"):
        run(plain)
    for a, b in zip(ours, theirs, strict=True):
        for name in optimizer.state[a]:
            torch.testing.assert_close(optimizer.state[a][name], plain.state[b][name], rtol=1e-5, atol=2e-6)
        tolerance = {"rtol": 2**-7, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
        torch.testing.assert_close(a, b, **tolerance)


def test_one_launch_steps_all(monkeypatch, device):
    """Vectors, kernels in channels_last, a scalar: all in tiles of one table, also at addresses without alignment."""
    launched = []

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    kernel = sgd._kernel
    monkeypatch.setattr(sgd, "_kernel", Counting())
    ours = [nn.Parameter(p.to(device)) for p in parameters()]
    buffer = torch.randn(100, device=device)
    ours.append(nn.Parameter(buffer[1:]))
    expected = [p.detach() - 0.5 for p in ours]
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    with backend("triton"):
        SGD(ours, lr=0.5).step()
    assert len(launched) == 1
    for parameter, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value)
