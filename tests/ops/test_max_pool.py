"""Max-pooling: who wins, extreme values, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops

from .calls import Calls
from .compare import DTYPES, saved_bytes
from .layouts import relayout

NAN, INF = float("nan"), float("inf")
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 0), (3, 1, 1), (7, 3, 3)], ids=str)
@LAYOUTS
def test_ties_and_special_values_go_where_torch_sends_them(window, dtype, layout, backend, device):
    """Few values, so that most windows hold several of the greatest; outputs by bits, and gradients by place. Torch's
    winner is the first of equals in row order, but among NaNs the last."""
    values = [NAN, INF, -INF, 0.0, -0.0, 1.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).min]
    values = torch.tensor(values, dtype=torch.float64)
    if device == "cuda" and dtype == torch.float64:
        # There torch's own kernel runs. In channels_last it sends the gradient of a window that holds nothing but -inf
        # to the image's first pixel.
        values.clamp_(min=torch.finfo(dtype).min)
    rare = torch.tensor([1.0, 4, 40, 20, 20, 0, 20, 40])  # NaN and +inf would else win everywhere
    choice = rare.multinomial(3 * 10 * 12 * 14, replacement=True).view(3, 10, 12, 14)
    x = values[choice].to(dtype)
    leaf = relayout(x.to(device), layout).requires_grad_()
    y = ops.max_pool2d(leaf, *window, backend=backend)
    dy = torch.randint(1, 5, y.shape).to(dtype)
    (dx,) = torch.autograd.grad(y, leaf, dy.to(device))

    contiguous = x.clone().requires_grad_()
    expected = F.max_pool2d(contiguous, *window)
    (expected_dx,) = torch.autograd.grad(expected, contiguous, dy)
    assert torch.equal(y.cpu().nan_to_num(nan=-3.0), expected.nan_to_num(nan=-3.0))
    assert torch.equal(y.cpu().signbit()[expected == 0], expected.signbit()[expected == 0])
    assert torch.equal(dx.cpu(), expected_dx)


@LAYOUTS
def test_windows_of_minus_infinity(layout, backend, device):
    """The first element wins although nothing is greater than the padding: no gradient falls on the padding."""
    x = relayout(torch.full((1, 3, 5, 5), -INF, device=device), layout).requires_grad_()
    y = ops.max_pool2d(x, 3, 2, 1, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert (y == -INF).all()
    assert dx.sum() == y.numel()
    assert set(dx[0, 0].nonzero().flatten().tolist()) == {0, 1, 3}  # rows and columns where windows begin


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_gradients_keep_special_values(dtype, layout, backend, device):
    """An infinite or NaN gradient lands on its winner, and 0·inf does not make a NaN of its neighbours."""
    x = torch.arange(2 * 6 * 7.0).view(1, 2, 6, 7).to(device, dtype)
    x = relayout(x, layout).requires_grad_()
    y = ops.max_pool2d(x, 2, 2, backend=backend)
    dy = torch.tensor([INF, -INF, NAN]).repeat(6).view(1, 2, 3, 3).to(device, dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = torch.zeros(1, 2, 6, 7, dtype=dtype)
    expected[:, :, 1::2, 1::2] = dy.cpu()  # x grows along rows and columns
    torch.testing.assert_close(dx.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", [(15, 17), (1, 255), (255, 1)])
@LAYOUTS
def test_the_largest_window_a_code_can_name(kernel, layout, backend, device):
    """255 elements have places 0 to 254; the gradient of the last must come back."""
    x = torch.randn(1, 3, *kernel, device=device)
    x[0, 0, -1, -1] = x[0, 1, 0, 0] = 9
    x = relayout(x, layout).requires_grad_()
    (dx,) = torch.autograd.grad(ops.max_pool2d(x, kernel, backend=backend).sum(), x)
    assert torch.equal(dx, (x == x.amax((2, 3), keepdim=True)).float())


def test_larger_windows_run_on_the_reference():
    x = torch.randn(1, 2, 20, 20, requires_grad=True)
    y = ops.max_pool2d(x, 16)
    assert torch.equal(y, F.max_pool2d(x, 16))
    assert "alexnet_fast" not in y.grad_fn.name()


@pytest.mark.parametrize("stride", [2**31 - 1, (2**31 - 1, 1)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_the_longest_stride(stride, ceil_mode, backend, device):
    """Index arithmetic in 32 bits would wrap."""
    x = torch.randn(1, 2, 9, 9, device=device, requires_grad=True)
    y = ops.max_pool2d(x, 3, stride, 1, ceil_mode=ceil_mode, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = F.max_pool2d(x, 3, stride, 1, ceil_mode=ceil_mode)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_saves_one_byte_an_output(dtype, layout):
    """PyTorch's keeps its input and eight bytes an output."""
    x = relayout(torch.randn(2, 16, 13, 13, dtype=dtype), layout).requires_grad_()
    assert saved_bytes(lambda: ops.max_pool2d(x, 3, 2, backend="cpu")) == 2 * 16 * 6 * 6


def test_inference_writes_no_code():
    x = torch.randn(2, 4, 9, 9, requires_grad=True)
    with Calls() as mode, torch.no_grad():
        ops.max_pool2d(x, 3, 2, backend="cpu")
    ((operator, arguments),) = mode.calls
    assert arguments[-1] is False
    _y, code = operator(x.detach(), *arguments[1:])
    assert code.numel() == 0
    y, _code = operator(x, *arguments[1:])  # as a graph exported in inference, called with gradients
    expected = torch.autograd.grad(ops.max_pool2d(x, 3, 2, backend="cpu").sum(), x)
    assert torch.equal(*torch.autograd.grad(y.sum(), x), *expected)
