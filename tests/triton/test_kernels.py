"""Cases that the samples do not reach: several tiles of every kind, split sums, folded layers, memory never written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.triton_kernels import conv_relu, tiles
from tests.ops.compare import as_exact, double, error, output_gradient, results
from tests.ops.layouts import relayout
from tests.ops.samples import OVERLAPPING, SAMPLES, SMALL, Sample, epilogue, lrn, max_pool
from tests.ops.samples import conv_relu as conv


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's tiles hold whole samples; these cut them along every axis."""
    monkeypatch.setattr(tiles, "ELEMENTS", 256)
    monkeypatch.setattr(conv_relu.CONV, "first", conv_relu.configuration(16, 16, 64, 4, 1).all_kwargs())
    monkeypatch.setattr(conv_relu.WEIGHT, "first", conv_relu.configuration(16, 16, 64, 4, 1).all_kwargs())
    monkeypatch.setattr(conv_relu, "PIXELS_EACH", 16)
    monkeypatch.setenv("ALEXNET_FAST_TUNE", "0")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, and with 255 where that is no number."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(sample: Sample, device: str, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> None:
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
    leaves = {name: relayout(tensor.to(device), layout) for name, tensor in data.items()}
    made = results(lambda leaves: sample.ours(leaves, "triton"), leaves, relayout(dy.to(device), layout))
    for name, value in made.items():
        assert as_exact(value.cpu(), peer[name], exact[name]), f"{name}: error {error(value.cpu(), exact[name]):.3g}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "sample",
    [
        lrn("a halo on both sides, a group's border inside a tile", (2, 36, 3, 5), 5, alpha=0.02, groups=2),
        max_pool("windows over the borders of tiles", (2, 36, 7, 9), 3, 2, 1),
        epilogue("several stretches of a plane, LRN", (1, 8, 17, 17), lrn=SMALL),
        epilogue("several stretches of a plane", (2, 8, 17, 17)),
        epilogue("bias gradients of several tiles", (2, 36, 5, 5), lrn=SMALL, pool=OVERLAPPING),
        epilogue("bias gradients of several tiles, no pool", (2, 36, 5, 5)),
        conv("tiles of every axis", (2, 20, 6, 5), (40, 10, 3, 3), padding=1, groups=2),
        conv("one tap a step of the depth", (2, 32, 5, 4), (17, 32, 3, 3), padding=1),
    ],
    ids=str,
)
def test_many_tiles(sample, layout, small_tiles, poison, device):
    check(sample, device, layout)


def test_several_runs_of_a_plane(device):
    check(max_pool("planes that are too large for one", (1, 8, 75, 73), 3, 2), device, dtype=torch.float16)


@pytest.mark.parametrize(
    "sample",
    [
        conv("ResNet's first", (2, 3, 13, 14), (5, 3, 7, 7), stride=2, padding=3),
        conv("folded, pixels that no window sees", (2, 3, 12, 15), (5, 3, 4, 5), stride=4),
        conv("folded, stride wider than the window", (2, 2, 9, 10), (4, 2, 2, 2), stride=3),
        conv("folded, padding wider than the stride", (1, 2, 6, 6), (4, 2, 3, 3), stride=2, padding=3),
        conv("folded, 1x1", (2, 4, 6, 5), (4, 4, 1, 1), stride=2),
        conv("too many channels to fold", (1, 70, 7, 8), (3, 70, 3, 3), stride=2, padding=1),
        conv("strides that differ", (2, 3, 9, 8), (4, 3, 3, 3), stride=(3, 2), padding=1),
        conv("strided and dilated", (2, 3, 11, 9), (4, 3, 3, 3), stride=2, dilation=2),
        conv("strided towers", (2, 6, 9, 9), (4, 3, 3, 3), stride=2, padding=1, groups=2),
    ],
    ids=str,
)
def test_strides(sample, poison, device):
    check(sample, device)
    check(sample, device, "channels_last", torch.bfloat16)


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if "pieces" not in s.reason and "batch" not in s.reason], ids=str
)
def test_every_element_is_written(sample, poison, device):
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    dy = output_gradient(sample, torch.float32).to(device)
    for name, value in results(lambda leaves: sample.ours(leaves, "triton"), data, dy).items():
        assert not value.isnan().any(), name


# ---- Special values --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def test_a_window_with_nan(device):
    """NaN wins and takes the gradient; a window of -inf alone goes to its first element inside the image."""
    x = torch.tensor([[[[1, NAN, 3, NAN], [2, 5, 4, 0], [-INF] * 4, [-INF] * 4]]], device=device).requires_grad_()
    y = ops.max_pool2d(x, 2, backend="triton")
    peer = torch.nn.functional.max_pool2d(x, 2)
    assert torch.equal(y.isnan(), peer.isnan())
    assert torch.equal(y[0, 0, 1], peer[0, 0, 1])
    dy = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], device=device)
    (dx,), (expected,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(peer, x, dy)
    assert torch.equal(dx, expected)


def test_lrn_of_large_and_special_values(device):
    """float16 squares overflow at 256: inside they are float32. NaN spreads over the windows that hold it alone."""
    x = torch.full((1, 8, 1, 2), 300.0, dtype=torch.float16, device=device)
    x[0, 3, 0, 1] = NAN
    y = ops.local_response_norm(x, 3, 1e-4, backend="triton")
    exact = ops.local_response_norm(x.double().cpu(), 3, 1e-4, backend="reference")
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-3, atol=0, equal_nan=True)
    assert y[0, :, 0, 1].isnan().nonzero().flatten().tolist() == [2, 3, 4]


def test_relu_of_special_values(device):
    """max(0, NaN) is NaN, and passes the gradient, as torch's does."""
    z = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1e-40, -1e-40, 2.0], device=device).view(1, 8, 1, 1).requires_grad_()
    y, peer = ops.epilogue(z, backend="triton"), torch.relu(z)
    torch.testing.assert_close(y, peer, rtol=0, atol=0, equal_nan=True)
    dy = torch.ones_like(y)
    assert torch.equal(*(torch.autograd.grad(out, z, dy)[0] for out in (y, peer)))


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.reason in ("AlexNet's first", "several pieces of work")], ids=str
)
def test_deterministic(sample, device):
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.bfloat16).items()}
    dy = output_gradient(sample, torch.bfloat16).to(device)
    first = results(lambda leaves: sample.ours(leaves, "triton"), data, dy)
    for _ in range(20):
        again = results(lambda leaves: sample.ours(leaves, "triton"), data, dy)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.local_response_norm(x, 5, backend="triton"),
        lambda x: ops.max_pool2d(x, 3, 2, backend="triton"),
        lambda x: ops.epilogue(x, lrn=SMALL, pool=OVERLAPPING, backend="triton"),
        lambda x: ops.conv_relu(x, torch.ones(8, 64, 1, 1, dtype=x.dtype, device=x.device), backend="triton"),
    ],
    ids=["lrn", "max_pool", "epilogue", "conv_relu"],
)
def test_more_than_2_to_the_31_elements(call, form, device):
    """The last image, whose elements lie beyond 2³¹, comes out as it does alone."""
    batch = 2**31 // (64 * 128 * 128) + 1
    x = torch.randn(batch, 64, 128, 128, dtype=torch.bfloat16, device=device).contiguous(memory_format=form)
    x.requires_grad_()
    y = call(x)
    last = x.detach()[-1:].clone(memory_format=form).requires_grad_()
    alone = call(last)
    assert torch.equal(y[-1:], alone)
    (dx,), (alone_dx,) = torch.autograd.grad(y, x, y.detach()), torch.autograd.grad(alone, last, alone.detach())
    assert torch.equal(dx[-1:], alone_dx)


@pytest.mark.gpu
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.reason in ("AlexNet's first", "pool", "LRN")], ids=str)
def test_cuda_graph(sample, device):
    """Capture records every launch on the capturing stream; replays follow the inputs' new values."""
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    sample.ours(data, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = sample.ours(data, "triton")
    data["input"].neg_()
    graph.replay()
    assert torch.equal(y, sample.ours(data, "triton"))
