"""Images that come folded (space to depth) for the first convolution: the net gives of them what it gives of plain
ones, gradients included, and its parameters are the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from alexnet_fast import AlexNet, FusedSequential, fuse, ops, pack
from alexnet_fast.nn import input_fold, runs
from alexnet_fast.ops.convolution import fold_weight, is_folded
from tests.ops.compare import as_exact

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONVOLUTIONS = {
    "AlexNet": ((43, 50), ops.SpaceToDepth(11, 4, 2)),
    "unpadded": (47, ops.SpaceToDepth(11, 4)),
    "uneven": ((20, 23), ops.SpaceToDepth((3, 5), (2, 3), (1, 2))),
    "pixels that no window sees": (20, ops.SpaceToDepth(2, 3, 0)),
}


def batch(size: int | tuple[int, int], fold: ops.SpaceToDepth | None = None, dtype=torch.float32) -> Tensor:
    images = torch.randint(256, (4, 3, 80, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ops.augment(images, size, MEAN, STD, index=torch.arange(4), fold=fold, dtype=dtype)


@pytest.mark.parametrize(("size", "fold"), CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_convolution(size, fold):
    """Forward and the gradients of weight and bias against float64, as near as the convolution of plain images."""
    kernel, stride, padding = ((v, v) if isinstance(v, int) else v for v in fold)
    weight, bias = torch.randn(8, 3, *kernel), torch.randn(8)
    x, xf = batch(size), batch(size, fold)
    assert is_folded(xf, weight, stride, padding, (1, 1), 1)
    assert not is_folded(x, weight, stride, padding, (1, 1), 1)

    def results(x: Tensor, folded: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, w, b = x.to(dtype), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
        y = ops.conv_relu(x, fold_weight(w, stride), b) if folded else ops.conv_relu(x, w, b, stride, padding)
        return y, *torch.autograd.grad((y * torch.linspace(0.5, 1, y.numel(), dtype=dtype).view_as(y)).sum(), (w, b))

    exact = results(x, False, torch.float64)
    for got, plain, wanted in zip(
        results(xf, True, torch.float32), results(x, False, torch.float32), exact, strict=True
    ):
        assert as_exact(got, plain, wanted)


def test_a_weights_fold_is_undone_by_its_gradient():
    """Each element of the weight stands once in the folded one, at (a, b, channel), and the rest is 0."""
    weight = torch.arange(1.0, 1 + 2 * 3 * 11 * 11).view(2, 3, 11, 11).requires_grad_()
    folded = fold_weight(weight, (4, 4))
    assert folded.shape == (2, 48, 3, 3)
    assert folded.is_contiguous(memory_format=torch.channels_last)
    assert folded[1, (2 * 4 + 3) * 3 + 1, 1, 0] == weight[1, 1, 1 * 4 + 2, 3]
    assert folded.count_nonzero() == weight.numel()
    (gradient,) = torch.autograd.grad((folded * folded.detach()).sum(), weight)
    assert torch.equal(gradient, weight)


def net() -> FusedSequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(3, 2)
    return FusedSequential(*layers, nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 49, 5))


def outcome(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The net's result and its parameters' gradients."""
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(net.parameters()))]


@pytest.fixture
def carried_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gets, for each run in C++, how many runs of modules it is."""
    found, carry_out = [], runs.Run.carry_out

    def counted(planned: runs.Run, x: Tensor) -> Tensor | None:
        found.append(planned.count)
        return carry_out(planned, x)

    monkeypatch.setattr(runs.Run, "carry_out", counted)
    return found


def test_net(carried_out):
    """Plain images, folded ones and plain ones again, in one run in C++ each."""
    model = net()
    fold = input_fold(model)
    assert fold == ops.SpaceToDepth((11, 11), (4, 4), (2, 2))
    plain, folded, again = (outcome(model, x) for x in (batch(63), batch(63, fold), batch(63)))
    for a, b, c in zip(plain, folded, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        assert torch.equal(a, c)
    assert carried_out == [4, 4, 4]


def test_net_follows_its_weight():
    """The folded weight is made of the parameter in each call: after a step, and after one written through .data."""
    model, fold = net(), input_fold(net())
    x, xf = batch(63), batch(63, fold)
    with torch.no_grad():
        before = model(xf)
        model[0].weight.data.neg_()
        assert not torch.equal(model(xf), before)
        torch.testing.assert_close(model(xf), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["autocast", "compiled", "packed", "normalized", "frozen"])
def test_net_in_other_ways(way):
    model, fold = net(), input_fold(net())
    x, xf = batch(63), batch(63, fold)
    if way == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            plain, folded = outcome(model, x.bfloat16()), outcome(model, xf.bfloat16())
        for a, b in zip(plain, folded, strict=True):
            torch.testing.assert_close(b.float(), a.float(), rtol=0.05, atol=0.05 * a.float().abs().max().item())
        return
    if way == "compiled":
        torch.testing.assert_close(outcome(torch.compile(model, backend="aot_eager"), xf), outcome(model, xf))
    if way == "frozen":
        model[0].requires_grad_(False)
        assert not model[:4](xf).requires_grad
    if way == "packed":
        pack(model)
    if way == "normalized":
        layers = copy.deepcopy(list(model))
        model = fuse(nn.Sequential(layers[0], nn.BatchNorm2d(8), *layers[1:]), fold_batchnorm=True).eval()
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
        assert input_fold(model) == fold
    with torch.no_grad():
        for _ in range(2):  # a packed copy is made by the first call
            torch.testing.assert_close(model(xf), model(x), rtol=1e-4, atol=1e-4)


def test_only_a_first_convolution_with_a_stride_is_folded_for():
    conv = nn.Conv2d(3, 8, 11, 4, 2)
    assert input_fold(FusedSequential(conv, nn.ReLU()))
    for layers in (
        [],
        [conv],
        [nn.ReLU(), conv, nn.ReLU()],
        [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(4, 8, 3, 2), nn.ReLU()],
        [nn.Conv2d(3, 9, 3, 2, groups=3), nn.ReLU()],
        [nn.Conv2d(3, 8, 3, 2, dilation=2), nn.ReLU()],
        [nn.Conv2d(3, 8, 3, 2, padding="valid"), nn.ReLU()],
        [nn.Conv2d(3, 8, 3, 2, padding_mode="reflect"), nn.ReLU()],
    ):
        assert input_fold(FusedSequential(*layers)) is None, layers
    hooked = FusedSequential(nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU())
    hooked[0].register_forward_hook(lambda *_: None)
    assert input_fold(hooked) is None
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 48"):
        hooked(torch.zeros(1, 48, 9, 9))


@pytest.mark.parametrize("variant", ["torchvision", "paper", "caffe", "caffenet", "keras", "alex2012", "owt"])
def test_variants(variant):
    """All but those that put zeros before the first convolution take folded images, at their own size."""
    model = AlexNet(5, variant=variant, widths=(8, 8, 8, 8, 8, 16, 16)).eval()
    fold = input_fold(model.features)
    if type(model.features[0]) is nn.ZeroPad2d:
        assert fold is None
        return
    size = model.variant.min_image_size
    with torch.no_grad():
        torch.testing.assert_close(model(batch(size, fold)[:1]), model(batch(size)[:1]), rtol=1e-3, atol=1e-3)


def test_gradients_of_gradients():
    model, fold = net().double(), input_fold(net())

    def penalty(x: Tensor) -> list[Tensor]:
        y = model(x.double())
        (gradient,) = torch.autograd.grad(y.square().sum(), model[0].weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [model[0].weight, model[4].weight])

    torch.testing.assert_close(penalty(batch(63, fold)), penalty(batch(63)), rtol=1e-6, atol=1e-6)
