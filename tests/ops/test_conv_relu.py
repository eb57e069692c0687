"""Convolution and ReLU: layouts, autocast, what is kept for backward, and what only the reference covers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import BackendError, ops

from .compare import saved_bytes
from .layouts import relayout


@pytest.mark.parametrize("input_layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_layout_is_torchs(input_layout, weight_layout, backend, device):
    """channels_last if input or weight is: a model converted by ``to(memory_format=...)`` stays so."""
    x = relayout(torch.randn(2, 5, 7, 7, device=device), input_layout).requires_grad_()
    weight = relayout(torch.randn(6, 5, 3, 3, device=device), weight_layout).requires_grad_()
    y = ops.conv_relu(x, weight, backend=backend)
    assert y.stride() == F.conv2d(x, weight).stride()


def test_keeps_input_weight_and_output():
    """The convolution's raw output is not kept: the ReLU's mask is read off y."""
    x, weight = torch.randn(2, 5, 7, 7, requires_grad=True), torch.randn(6, 5, 3, 3, requires_grad=True)
    saved = saved_bytes(lambda: ops.conv_relu(x, weight, torch.zeros(6), backend="cpu"))
    assert saved == 4 * (x.numel() + weight.numel() + 2 * 6 * 5 * 5)


@pytest.mark.parametrize("padding", ["same"])
def test_even_kernel_with_padding_same(padding):
    """One side gets more padding than the other, which oneDNN's operator cannot say."""
    x, weight = torch.randn(1, 3, 6, 6), torch.randn(4, 3, 2, 4)
    torch.testing.assert_close(ops.conv_relu(x, weight, padding=padding), F.relu(F.conv2d(x, weight, padding=padding)))
    with pytest.raises(
        BackendError, match="conv_relu: backend 'cpu' does not cover padding='same' with an even kernel"
    ):
        ops.conv_relu(x, weight, padding=padding, backend="cpu")


def test_without_onednn():
    """With torch's switch for oneDNN off, and on processors and with dtypes that oneDNN leaves out."""
    x, weight, bias = torch.randn(2, 5, 7, 7), torch.randn(6, 5, 3, 3), torch.randn(6)
    with torch.backends.mkldnn.flags(enabled=False):
        y = ops.conv_relu(x, weight, bias, backend="cpu")
    torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, bias)))


def test_nan_passes(backend, device):
    """max(0, NaN) is NaN, and so are the gradients that go through it."""
    x, weight = torch.randn(1, 3, 5, 5, device=device), torch.randn(4, 3, 3, 3, device=device)
    x[0, 1, 0, 0] = float("nan")
    x.requires_grad_()
    y = ops.conv_relu(x, weight, backend=backend)
    expected = F.relu(F.conv2d(x, weight))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.isnan().any()
    grads = (torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected))
    torch.testing.assert_close(*grads, equal_nan=True)
