"""First derivatives are true; second ones are refused by kernels and true on the reference."""

from __future__ import annotations

import pytest
import torch

from .samples import SAMPLES, lrn

samples = pytest.mark.parametrize("sample", [s for s in SAMPLES if 0 not in s.input], ids=str)


@samples
def test_gradcheck(sample, backend, device):
    """Finite differences, in float64. A step of 1e-6 changes no winner: ``untied`` data are 1/16 apart."""
    data = {name: tensor.to(device).requires_grad_() for name, tensor in sample.data(torch.float64).items()}

    def call(*leaves):
        return sample.ours(dict(zip(data, leaves, strict=True)), backend)

    assert torch.autograd.gradcheck(call, tuple(data.values()), fast_mode=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "sample",
    [
        lrn("even window, groups", (1, 6, 1, 2), 4, alpha=0.5, k=0.7, groups=2),
        lrn("beta without a short cut", (1, 5, 1, 2), 3, alpha=0.5, beta=0.6),
    ],
    ids=str,
)
def test_gradcheck_of_every_element(sample, backend, device):
    """Fast mode checks one random combination of the Jacobian's elements; on LRN's, all of them."""
    x = (sample.data(torch.float64)["input"] / 10).to(device).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sample.ours({"input": x}, backend), x)


@samples
def test_second_derivative_is_refused(sample):
    """By name, and with the way out; a silent zero would be wrong. Max-pooling's is zero indeed wherever it is defined,
    but the derivative by the output's gradient is not."""
    data = {name: tensor.requires_grad_() for name, tensor in sample.data(torch.float64).items()}
    y = sample.ours(data, "cpu")
    dy = torch.ones_like(y, requires_grad=True)
    grads = torch.autograd.grad(y, list(data.values()), dy, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"alexnet_fast::\w+_backward is not differentiable: use backend='reference'"
    ):
        sum(grad.sum() for grad in grads).backward()


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.stem == "lrn" and s.input[0] and len(s.input) == 4], ids=str
)
def test_second_derivative_of_the_reference(sample):
    x = sample.data(torch.float64)["input"][:1, :, :1, :1].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: sample.ours({"input": x}, "reference"), x, fast_mode=True)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.reason in ("batch 0", "(C, H, W)")], ids=str)
def test_gradient_shapes(sample, backend, device):
    """Of an empty batch, and where the operator works on a view of the input."""
    data = {name: tensor.to(device).requires_grad_() for name, tensor in sample.data(torch.float32).items()}
    sample.ours(data, backend).sum().backward()
    for name, tensor in data.items():
        assert tensor.grad.shape == tensor.shape, name
        assert 0 not in sample.input or not tensor.grad.any(), name
