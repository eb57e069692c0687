"""Derivatives are true: the first, by kernels, and those of derivatives, by torch's operators."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.ops import LRN, Pool

from .compare import output_gradient
from .samples import SAMPLES, lrn

FILLED = [s for s in SAMPLES if 0 not in s.input]
samples = pytest.mark.parametrize("sample", FILLED, ids=str)
# Of formulas, which know no pieces, and take seconds where there are many elements.
few_pieces = pytest.mark.parametrize("sample", [s for s in FILLED if "several pieces" not in s.reason], ids=str)


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


@few_pieces
def test_second_derivative(sample):
    """Of the gradients by the tensors and by the output's gradient, against finite differences."""
    data = {name: tensor.requires_grad_() for name, tensor in sample.data(torch.float64).items()}

    def call(*leaves):
        return sample.ours(dict(zip(data, leaves, strict=True)), "cpu")

    assert torch.autograd.gradgradcheck(call, tuple(data.values()), fast_mode=True, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@few_pieces
def test_a_gradient_with_a_graph_is_the_same(sample, dtype):
    """create_graph=True has torch's operators compute what kernels compute otherwise."""
    data = {name: tensor.requires_grad_() for name, tensor in sample.data(dtype).items()}
    y = sample.ours(data, "cpu")
    dy = output_gradient(sample, y.dtype)
    grads, graphed = (
        torch.autograd.grad(y, list(data.values()), dy, retain_graph=True, create_graph=graph)
        for graph in (False, True)
    )
    for ours, theirs in zip(grads, graphed, strict=True):
        assert ours.dtype == theirs.dtype
        largest = ours.abs().max().item()
        torch.testing.assert_close(theirs, ours, rtol=0, atol=4 * torch.finfo(dtype).eps * max(1, largest))


def test_third_derivative():
    """Each backward pass leaves a graph for the next."""
    x = torch.rand(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    thirds = []
    for backend in ("cpu", "reference"):
        derivative = ops.epilogue(x, lrn=LRN(3, 0.5), pool=Pool(2), backend=backend).square().sum()
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        thirds.append(derivative)
    assert thirds[1].any()
    torch.testing.assert_close(*thirds)


def test_a_backward_operator_called_by_itself_has_no_gradient():
    """The error names the operator and the way out; a silent zero would be wrong."""
    x = torch.ones(1, 3, 2, 2, requires_grad=True)
    dx = torch.ops.alexnet_fast.lrn_backward(x, x, 3, 1.0, 0.75, 1.0, 1)
    with pytest.raises(RuntimeError, match=r"lrn_backward is not differentiable: call alexnet_fast.reference.lrn_back"):
        dx.sum().backward()


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.reason in ("batch 0", "(C, H, W)")], ids=str)
def test_gradient_shapes(sample, backend, device):
    """Of an empty batch, and where the operator works on a view of the input."""
    data = {name: tensor.to(device).requires_grad_() for name, tensor in sample.data(torch.float32).items()}
    sample.ours(data, backend).sum().backward()
    for name, tensor in data.items():
        assert tensor.grad.shape == tensor.shape, name
        assert 0 not in sample.input or not tensor.grad.any(), name
