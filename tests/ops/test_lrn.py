"""Local response normalization: windows, extreme values, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops

from .compare import DTYPES, saved_bytes
from .layouts import relayout
from .samples import torch_lrn

NAN, INF = float("nan"), float("inf")
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("size", range(1, 8))
@LAYOUTS
def test_impulses_are_exact(size, beta, dtype, layout, backend, device):
    """One ±1 in each 2·size channels: t is 1 or 16, 16^-beta is 1/4, 1/8 or 1/16, and nothing rounds in any dtype. So a
    window that reaches one channel too far, or not far enough, shows as a wrong number."""
    channels = 40
    x = torch.zeros(2, channels, 3, 4)
    for pixel in range(12):
        x[:, pixel % size :: 2 * size, pixel // 4, pixel % 4] = (-1) ** pixel
    dy = torch.randint(1, 4, x.shape).float()
    x, dy = (relayout(t.to(device, dtype), layout).requires_grad_(t is x) for t in (x, dy))
    y = ops.local_response_norm(x, size, 15.0 * size, beta, 1.0, backend=backend)
    (dx,) = torch.autograd.grad(y, x, dy)

    wide = x.detach().double().cpu().requires_grad_()
    exact = F.local_response_norm(wide, size, 15.0 * size, beta, 1.0)
    (exact_dx,) = torch.autograd.grad(exact, wide, dy.double().cpu())
    assert torch.equal(y.double().cpu(), exact)
    torch.testing.assert_close(exact_dx * 1024, (exact_dx * 1024).round(), rtol=0, atol=1e-9)  # multiples of 2^-10
    assert torch.equal(dx.double().cpu(), (exact_dx * 1024).round() / 1024)


@pytest.mark.parametrize(
    ("dtype", "magnitude"), [(torch.float16, 300.0), (torch.float16, 60000.0), (torch.bfloat16, 300.0)]
)
@LAYOUTS
def test_squares_do_not_overflow(dtype, magnitude, layout, backend, device):
    """300² is past float16's 65504: in float16 arithmetic every y here would be 0."""
    x = relayout((magnitude * torch.randn(2, 16, 3, 5).sign()).to(device, dtype), layout).requires_grad_()
    y = ops.local_response_norm(x, 5, 5e-4, 0.75, 2.0, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    wide = x.detach().double().cpu().requires_grad_()
    exact = F.local_response_norm(wide, 5, 5e-4, 0.75, 2.0)
    (exact_dx,) = torch.autograd.grad(exact, wide, torch.ones_like(exact))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double().cpu(), exact, rtol=eps, atol=0)
    torch.testing.assert_close(dx.double().cpu(), exact_dx, rtol=eps, atol=eps * exact_dx.abs().max().item())


@LAYOUTS
def test_denominator_keeps_its_digits_in_bfloat16(layout, backend, device):
    """With a standard deviation of 10, t is 2.05 or so: rounded to bfloat16 it is mostly 2, a constant."""
    x = relayout((10 * torch.randn(4, 32, 7, 7)).to(device, torch.bfloat16), layout)
    y = ops.local_response_norm(x, 5, 5e-4, 0.75, 2.0, backend=backend).double().cpu()
    exact = F.local_response_norm(x.double().cpu(), 5, 5e-4, 0.75, 2.0)
    torch.testing.assert_close(y, exact, rtol=2**-8, atol=0)  # half a unit in the last of 8 bits is 2^-9
    identity = x.double().cpu() * 2**-0.75
    assert (exact - identity).abs().max() > 10 * (y - exact).abs().max()


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_special_values_stay_within_their_windows(special, dtype, layout, backend, device):
    """A running sum over channels would carry NaN and infinity on for ever."""
    x = torch.randn(1, 24, 2, 3).to(device, dtype)
    clean = relayout(x, layout).requires_grad_()
    x[0, 10, 1, 1] = special
    dirty = relayout(x, layout).requires_grad_()
    size = 4  # the window of c is c-2 … c+1, so 10 is in those of 9 … 12, and their gradients reach 7 … 13
    y, clean_y = (ops.local_response_norm(t, size, 0.1, backend=backend) for t in (dirty, clean))
    dx, clean_dx = (torch.autograd.grad(out, t, torch.ones_like(out))[0] for out, t in ((y, dirty), (clean_y, clean)))
    torch.testing.assert_close(y.cpu(), torch_lrn(x.cpu(), size, 0.1), equal_nan=True)
    near_y, near_dx = torch.zeros(2, *x.shape, dtype=torch.bool)
    near_y[0, 9:13, 1, 1] = True
    near_dx[0, 7:14, 1, 1] = True
    assert torch.equal(y.cpu()[~near_y], clean_y.cpu()[~near_y])
    assert torch.equal(dx.cpu()[~near_dx], clean_dx.cpu()[~near_dx])


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_zeros_and_subnormals_pass(dtype, layout, backend, device):
    """With k = 1 they are their own results, sign and last bit included: nothing is flushed."""
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([0.0, -0.0, tiny / 2, -tiny / 4, tiny * torch.finfo(dtype).eps], dtype=dtype)
    x = relayout(x.repeat(4).view(1, 20, 1, 1).expand(2, 20, 3, 3).to(device), layout)
    assert x[0, 4, 0, 0] > 0, "torch flushed it"
    y = ops.local_response_norm(x, 5, backend=backend)
    assert torch.equal(y, x)
    assert torch.equal(y.signbit(), x.signbit())


@pytest.mark.parametrize(
    ("beta", "k"), [(0.75, 0.0), (0.5, 0.0), (1.0, 0.0), (0.6, 0.0), (0.75, -1.0), (-0.5, 1.0), (2, 3)]
)
def test_unusual_parameters_follow_the_formula(beta, k, backend, device):
    """k = 0 makes 0/0 of a window of zeros, a negative t a NaN, a negative beta a product. In quarters, with
    alpha / size = 1/2, every sum is exact: else the order of additions would show where a negative k leaves little of
    t."""
    x = torch.randint(-8, 9, (2, 12, 2, 2)) / 4
    x[:, 3:9, 0] = 0
    y = ops.local_response_norm(x.to(device), 4, 2.0, beta, k, backend=backend)
    torch.testing.assert_close(y.cpu(), F.local_response_norm(x, 4, 2.0, beta, k), equal_nan=True)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31 - 2])
def test_the_widest_window(size):
    """Channel c's window reaches past 2^31 channels beyond c: a sum in 32-bit integers would wrap."""
    x = torch.randn(2, 9, 2, 3)
    y = ops.local_response_norm(x, size, 0.5 * size, backend="cpu")
    torch.testing.assert_close(y, x * (1 + 0.5 * x.square().sum(1, keepdim=True)) ** -0.75)


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_saves_its_input_and_nothing_else(dtype, layout):
    """PyTorch's keeps about four tensors of the input's size."""
    x = relayout(torch.randn(2, 16, 6, 6, dtype=dtype), layout).requires_grad_()
    assert saved_bytes(lambda: ops.local_response_norm(x, 5, backend="cpu")) == x.numel() * x.itemsize


@pytest.mark.parametrize(
    "options", [(3, 1.0, 0.0, 0.0), (3, 0.0, 0.0, 0.0), (4, 1.0, 0.0, 1.0), (3, 0.0, 0.75, 1.0)], ids=str
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_at_zero_as_torch(options, layout, dtype, backend, device):
    """With beta = 0, y is x and its gradient 1, though t may be 0; alone and behind a ReLU in an epilogue."""
    x = torch.zeros(1, 6, 3, 5, dtype=dtype, device=device).to(memory_format=layout)
    x[:, 3] = 2  # some of the windows are not empty
    leaves = [x.clone().requires_grad_() for _ in range(3)]
    ops.local_response_norm(leaves[0], *options, backend=backend).sum().backward()
    ops.epilogue(leaves[1], lrn=ops.LRN(*options), backend=backend).sum().backward()
    F.local_response_norm(leaves[2].float(), *options).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[2].grad)
    torch.testing.assert_close(leaves[1].grad, torch.where(x > 0, leaves[2].grad, 0))
