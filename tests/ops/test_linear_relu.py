"""A linear layer and its ReLU: gradients, special values, what is saved and what refused, beside what samples test."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import ops

from .compare import saved_bytes


def data(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Input, weight, bias."""
    generator = torch.Generator().manual_seed(rows + inputs)
    sizes = (rows, inputs), (outputs, inputs), (outputs,)
    return [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]


@pytest.mark.parametrize("relu", [True, False])
def test_special_values(relu, backend, device):
    """NaN stays through ReLU, and in its row."""
    x, weight, bias = data(4, 24, 6, device=device)
    x[0, 23], x[1, 0], x[2, 1] = nan, inf, -inf
    y = ops.linear_relu(x, weight, bias, relu, backend=backend)
    wanted = F.linear(x, weight, bias)
    torch.testing.assert_close(y, wanted.relu() if relu else wanted, equal_nan=True)
    assert y[0].isnan().all()
    assert y[3].isfinite().all()


def test_layouts(backend, device):
    """Strided input, weight and bias."""
    tensors = data(6, 40, 10, device=device)
    expected = ops.linear_relu(*tensors, backend=backend)
    strided = [t.mT.contiguous().mT for t in tensors[:2]] + [tensors[2].repeat_interleave(2)[::2]]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(ops.linear_relu(*strided, backend=backend), expected)


@pytest.mark.parametrize("relu", [True, False])
def test_gradcheck(relu):
    leaves = [t.requires_grad_() for t in data(3, 9, 5, torch.float64)]
    for backend in ("cpu", "reference"):
        call = lambda *t, backend=backend: ops.linear_relu(*t, relu, backend=backend)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("relu", [True, False])
def test_a_gradient_alone(wanted, relu, backend, device):
    """By the operator itself too, which modes and autocast see."""
    tensors = data(3, 16, 5, device=device)
    dy = torch.rand(3, 5, device=device)
    name = "linear_relu_cuda" if backend == "cuda" else "linear_relu"
    found = []
    for call in (
        lambda *t: ops.linear_relu(*t, relu, backend=backend),
        lambda *t: getattr(torch.ops.alexnet_fast, name)(*t, relu),
        lambda *t: F.linear(*t).relu() if relu else F.linear(*t),
    ):
        leaves = [t.clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        call(*leaves).backward(dy)
        assert [t.grad is not None for t in leaves] == list(wanted)
        found.append(leaves[wanted.index(True)].grad)
    for one in found[:2]:
        torch.testing.assert_close(one, found[2])


@pytest.mark.parametrize("relu", [True, False])
def test_saves_input_weight_and_mask(relu):
    x, weight, bias = data(64, 20, 6)
    saved = saved_bytes(lambda: ops.linear_relu(x, weight.requires_grad_(), bias, relu, backend="cpu"))
    assert saved <= 4 * (x.numel() + weight.numel() + relu * 64 * 6)


def test_opcheck_without_relu():
    for bias in (data(3, 20, 6)[2], None):
        arguments = [t.requires_grad_() for t in data(3, 20, 6)[:2]]
        torch.library.opcheck(torch.ops.alexnet_fast.linear_relu.default, (*arguments, bias, False))


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"input": [1]}, TypeError, ["input", "Tensor", "list"]),
        ({"input": torch.ones(1, 2, 8)}, ValueError, ["input", "1 or 2 dimensions", "got 3"]),
        ({"input": torch.ones(2, 7)}, ValueError, ["weight", "takes 8", "got 7"]),
        ({"weight": torch.ones(4, 8).half()}, TypeError, ["weight", "torch.float16", "torch.float32"]),
        ({"bias": torch.ones(3)}, ValueError, ["bias", "4 channels", "got 3"]),
        ({"relu": "no"}, TypeError, ["relu", "True or False", "'no'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, exception, pieces):
    good = {"input": torch.ones(2, 8), "weight": torch.ones(4, 8)}
    with pytest.raises(exception) as caught:
        ops.linear_relu(**{**good, **arguments})
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def past_the_function() -> None:
    """The kernel's operator itself keeps it from reading foreign memory: for tests/cuda/check_bindings.py."""
    x, weight, bias = data(2, 8, 4)
    call = torch.ops.alexnet_fast.linear_relu_cuda
    for wrong in (
        [x[:, :7], weight, bias],
        [x, weight, bias[:3]],
        [x, weight.half(), bias],
        [x, weight, bias.half()],
        [x[0], weight, bias],
    ):
        with pytest.raises(RuntimeError, match="linear_relu: "):
            call(*wrong, True)
