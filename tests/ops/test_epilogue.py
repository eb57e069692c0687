"""Bias, ReLU, LRN and pooling in one pass: ReLU's corner, extreme values, and what is kept for backward."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.ops import LRN, Pool

from .calls import Calls
from .compare import DTYPES, saved_bytes
from .layouts import relayout
from .samples import torch_epilogue

NAN, INF = float("nan"), float("inf")
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
STAGES = pytest.mark.parametrize(
    "stage",
    [{}, {"pool": Pool(3, 2)}, {"lrn": LRN(5)}, {"lrn": LRN(5), "pool": Pool(3, 2)}],
    ids=["ReLU", "pool", "LRN", "LRN and pool"],
)


@pytest.mark.parametrize("dtype", DTYPES)
@STAGES
@LAYOUTS
def test_closed_windows_pass_no_gradient(stage, dtype, layout, backend, device):
    """Where z + bias is 0 or less everywhere the output is 0, and so is each gradient, the bias's too."""
    z = relayout((-torch.rand(2, 8, 7, 7)).to(device, dtype), layout)
    z[:, 1] = 0
    z, bias = z.requires_grad_(), torch.zeros(8, dtype=dtype, device=device, requires_grad=True)
    y = ops.epilogue(z, bias, **stage, backend=backend)
    dz, db = torch.autograd.grad(y, (z, bias), torch.ones_like(y))
    assert not y.any()
    assert not dz.any()
    assert not db.any()


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES)
@STAGES
@LAYOUTS
def test_special_values_go_where_torch_sends_them(special, stage, dtype, layout, backend, device):
    z = torch.randint(-9, 9, (1, 8, 9, 9)).to(dtype)
    z[0, 2, 4, 4] = z[0, 6, 0, 8] = special
    dy = torch.randint(1, 4, torch_epilogue(z, **stage).shape).to(dtype)

    leaf = relayout(z.to(device), layout).requires_grad_()
    y = ops.epilogue(leaf, **stage, backend=backend)
    (dz,) = torch.autograd.grad(y, leaf, dy.to(device))
    wide = z.double().requires_grad_()
    exact = torch_epilogue(wide, **stage)
    (exact_dz,) = torch.autograd.grad(exact, wide, dy.double())
    tolerance = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps, "equal_nan": True}
    torch.testing.assert_close(y.double().cpu(), exact, **tolerance)
    if "lrn" not in stage:  # with LRN 0·inf makes NaNs, not in the same places in every arrangement of the formula
        torch.testing.assert_close(dz.double().cpu(), exact_dz, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@LAYOUTS
def test_keeps_what_the_page_says(dtype, layout):
    """One byte an output with a pool alone; z's size once in every other case, and the code with LRN and pool."""
    z = relayout(torch.randn(2, 8, 9, 9, dtype=dtype), layout).requires_grad_()
    whole, code = z.numel() * z.itemsize, 2 * 8 * 4 * 4
    for stage, expected in [
        ({"pool": Pool(3, 2)}, code),
        ({}, whole),
        ({"lrn": LRN(5)}, whole),
        ({"lrn": LRN(5), "pool": Pool(3, 2)}, whole + code),
    ]:
        bias = torch.zeros(8, dtype=dtype)
        assert saved_bytes(lambda: ops.epilogue(z, bias, **stage, backend="cpu")) == expected, stage  # noqa: B023


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 41])
def test_every_bit_pattern_is_pooled_as_a_number(channels, dtype, backend, device):
    """Without a bias and a code, CPU kernels compare bits: of all 16-bit numbers here, and of as many others, NaNs of
    either sign, infinities and zeros among them, in windows that the border cuts too."""
    numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    lowest, highest = torch.iinfo(numbers).min, torch.iinfo(numbers).max
    torch.manual_seed(0)
    bits = torch.randint(lowest, highest, (channels * 40 * 40,), dtype=numbers)
    if numbers == torch.int16:
        bits[: 2**16] = torch.randperm(2**16).to(torch.int16)
    special = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0], dtype=dtype).view(numbers)
    bits[torch.randperm(len(bits))[:600]] = special.repeat(100)
    z = bits.view(dtype).reshape(1, 40, 40, channels).permute(0, 3, 1, 2)
    with torch.inference_mode():
        y = ops.epilogue(z.to(device), pool=Pool(3, 2, 1), backend=backend).cpu()
        expected = torch_epilogue(z, pool=Pool(3, 2, 1))
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


def test_inference_keeps_nothing():
    z = torch.randn(2, 8, 9, 9, requires_grad=True)
    with Calls() as mode, torch.no_grad():
        ops.epilogue(z, lrn=LRN(5), pool=Pool(3, 2), backend="cpu")
    ((operator, arguments),) = mode.calls
    assert arguments[-1] is False
    _y, code, r = operator(z.detach(), *arguments[1:])
    assert code.numel() == r.numel() == 0
    y, _code, _r = operator(z, *arguments[1:])  # as a graph exported in inference, called with gradients
    expected = torch.autograd.grad(ops.epilogue(z, lrn=LRN(5), pool=Pool(3, 2), backend="cpu").sum(), z)
    assert torch.equal(*torch.autograd.grad(y.sum(), z), *expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_gradient_of_many_pixels(dtype, backend, device):
    """A sum of 40,000 ones: kept in 16 bits it would stop at 2048 or 256."""
    z = torch.ones(1, 3, 200, 200, dtype=dtype, device=device)
    bias = torch.zeros(3, dtype=dtype, device=device, requires_grad=True)
    (db,) = torch.autograd.grad(ops.epilogue(z, bias, backend=backend).sum(), bias)
    assert torch.equal(db.cpu(), torch.full((3,), 40000.0, dtype=dtype))


@LAYOUTS
@pytest.mark.parametrize("stage", [{}, {"pool": Pool(3, 2)}], ids=["ReLU", "pool"])
def test_bias_gradient_of_a_large_plane(stage, layout, backend, device):
    """Tenths, of which one accumulator a vector's lane would lose digits: 4 in 100,000 with sixteen lanes."""
    z = relayout(torch.ones(1, 2, 1000, 1000, device=device), layout)
    bias = torch.zeros(2, device=device, requires_grad=True)
    y = ops.epilogue(z, bias, **stage, backend=backend)
    dy = torch.full_like(y, 0.1)
    (db,) = torch.autograd.grad(y, bias, dy)
    torch.testing.assert_close(db.double(), dy.double().sum((0, 2, 3)), rtol=1e-5, atol=0)
