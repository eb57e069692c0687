"""The classifier's fused layers: masks are those of the reference, and nets draw them from torch's generator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast import FusedSequential, backend, ops
from tests.ops.calls import Calls


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(3, 5), (40, 300)])
def test_one_seed_one_mask(shape, p, device):
    """At a tile's border too, and of a seed wider than 32 bits."""
    x, weight = torch.ones(shape[0], 1), torch.ones(shape[1], 1)
    seed = -(2**40) - 5
    expected = ops.linear_relu_dropout(x, weight, p=p, seed=seed, backend="reference")
    y = ops.linear_relu_dropout(x.to(device), weight.to(device), p=p, seed=seed, backend="triton")
    assert torch.equal(y.cpu(), expected)


def net(device: str) -> FusedSequential:
    return FusedSequential(
        *(nn.Dropout(), nn.Linear(6, 40), nn.ReLU(inplace=True)),
        *(nn.Dropout(0.25), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3)),
    ).to(device)


def test_a_classifier_is_fused(operators, device):
    """torchvision's: dropout before the first layer stays alone, and the last layer has no ReLU."""
    model, x = net(device), torch.randn(5, 6, device=device)
    with backend("triton"):
        assert operators(model, x) == ["linear_relu_dropout_triton"] * 2
    with backend("reference"):
        assert operators(model, x) == []


def test_a_hook_prevents_fusion(operators, device):
    """In the run's middle, and of the dropout alone; it sees what its module made."""
    model, x, seen = net(device).eval(), torch.randn(5, 6, device=device), []
    handle = model[1].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    with backend("triton"):
        assert operators(model, x) == ["linear_relu_dropout_triton"]
        handle.remove()
        handle = model[3].register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        assert operators(model, x) == ["linear_relu_dropout_triton"] * 2
        handle.remove()
        assert operators(model, x) == ["linear_relu_dropout_triton"] * 2
    z = nn.functional.linear(x, model[1].weight, model[1].bias)
    assert torch.equal(seen[0], z)
    torch.testing.assert_close(seen[1], z.relu())
    assert len(seen) == 2


def test_autocast(device):
    model, x = net(device).eval(), torch.randn(5, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        expected = nn.Sequential.forward(model, x)
        with backend("triton"):
            y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-7)  # the interpreter truncates to bfloat16


def test_a_classifier_computes_the_same(device):
    """In evaluation. In training, with every element kept or dropped as torch's generator says, and it alone."""
    model, x = net(device), torch.randn(5, 6, device=device)
    with backend("triton"):
        torch.testing.assert_close(model.eval()(x), nn.Sequential.forward(model, x))
        model.train()
        torch.manual_seed(3)
        first, second = model(x), model(x)
        torch.manual_seed(3)
        assert torch.equal(model(x), first)
        assert not torch.equal(first, second)


def test_gradients_of_a_classifier(device):
    """Without dropout they are those of the modules; the weights' are reached through the product."""
    model, x = net(device), torch.randn(5, 6, device=device)
    for module in model:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = torch.autograd.grad(nn.Sequential.forward(model, x).square().sum(), list(model.parameters()))
    with backend("triton"), Calls() as mode:
        actual = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert len(mode.calls) == 4
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", [None, 5])
def test_replays_of_a_cuda_graph(seed, device):
    """Each replay drops other elements, or with a seed the same."""
    x, weight = torch.ones(64, 8, device=device), torch.ones(256, 8, device=device)
    number = None if seed is None else torch.tensor([seed], device=device)
    ops.linear_relu_dropout(x, weight, seed=number, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear_relu_dropout(x, weight, seed=number, backend="triton")
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(y, first) == (seed is not None)
