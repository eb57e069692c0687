"""LPIPS in place of the package lpips: its formula in plain operators here; the package itself in check_lpips."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast import LPIPS
from alexnet_fast.models import one_sided
from alexnet_fast.models.lpips import BACKBONES, Trunk
from alexnet_fast.ops.registry import NATIVE
from benchmarks.memory import peak_bytes
from tests.ops.compare import saved_bytes

ROOT = Path(__file__).parents[2]
QUIET = {"pnet_rand": True, "pretrained": False, "verbose": False}


def made(net: str = "alex", **options) -> LPIPS:
    """With random weights that keep activations' size, and linear ones that are positive, as trained ones are."""
    torch.manual_seed(0)
    loss = LPIPS(net=net, **{**QUIET, **options})
    for convolution in [module for module in loss.net.modules() if isinstance(module, nn.Conv2d)]:
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    for linear in loss.lins:
        nn.init.uniform_(linear.weight)
    return loss


def images(batch: int = 2, side: int = 33) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(batch, 3, side, side) * 2 - 1, torch.rand(batch, 3, side, side) * 2 - 1


def written_out(loss: LPIPS, first: Tensor, second: Tensor) -> Tensor:
    """The formula, one image after the other, by nn.Sequential."""

    def directions(image: Tensor) -> list[Tensor]:
        x, found = (image - loss.scaling_layer.shift) / loss.scaling_layer.scale, []
        for part in loss.net.children():
            x = nn.Sequential.forward(part, x)
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    pairs = zip(directions(first), directions(second), loss.lins, strict=True)
    return sum(F.conv2d((a - b) ** 2, linear.weight).mean((2, 3), keepdim=True) for a, b, linear in pairs)


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_the_formula(net):
    """Values, and the gradients of both images and of the linear weights."""
    loss, made_of = made(net), {}
    for name, call in (("ours", loss), ("plain", lambda *pair: written_out(loss, *pair))):
        leaves = [image.requires_grad_() for image in images()]
        distance = call(*leaves)
        weights = [linear.weight for linear in loss.lins]
        made_of[name] = [distance, *torch.autograd.grad(distance.sum(), leaves + weights)]
    for ours, plain in zip(made_of["ours"], made_of["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.slow
def test_against_the_package(second_torch):
    done = second_torch("tests.models.check_lpips")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("context", ["float32", "bfloat16", "autocast"])
def test_features_that_are_all_zero(context):
    """Their gradient is 0, not NaN: of black images where no bias lights a channel."""
    loss = made()
    for convolution in [m for m in loss.net.modules() if isinstance(m, nn.Conv2d)]:
        nn.init.zeros_(convolution.bias)
    dtype = torch.bfloat16 if context == "bfloat16" else torch.float32
    first = loss.scaling_layer.shift.expand(1, 3, 33, 33).to(dtype).clone().requires_grad_()
    second = images(1)[1].to(dtype)
    loss.net.to(dtype)
    loss.scaling_layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=context == "autocast"):
        distance = loss(first, second)
    assert distance.dtype == torch.float32
    assert distance.isfinite().all()
    assert distance > 0
    distance.sum().backward()
    assert first.grad.isfinite().all()


def test_keeps_the_features_alone():
    """What is kept for backward: the scaled images, what the net keeps without LPIPS, and the linear weights."""
    loss, (first, second) = made(), images()
    both = torch.cat([first, second])
    trunk = saved_bytes(lambda: sum(x.sum() for x in loss.net(both.clone().requires_grad_())))
    whole = saved_bytes(lambda: loss(first.clone().requires_grad_(), second.clone().requires_grad_()))
    assert whole <= trunk + 4 * sum(loss.chns) + 4 * loss.scaling_layer.scale.numel()


# ---- As a loss: one image's gradient, through a frozen net -----------------------------------------------------------

LOSSES = {
    "plain": {},
    "the second image": {"wanted": 1},
    "of each pixel": {"spatial": True},
    "in 0 … 1": {"normalize": True},
    "weights frozen": {"frozen": True},
    "no weights": {"lpips": False},
    "version 0.0": {"version": "0.0"},
    "channels_last": {"layout": torch.channels_last},
    "one against many": {"batch": 1},
    "gray": {"channels": 1},
    "of many pixels": {"many": 1},
    "squeeze": {"net": "squeeze"},
}


@pytest.mark.parametrize("case", LOSSES)
def test_one_images_gradient(case, monkeypatch):
    """The same, with that of the linear weights, as when both images want theirs; a second time too."""
    options = dict(LOSSES[case])
    monkeypatch.setattr(one_sided, "MANY_PIXELS", options.pop("many", one_sided.MANY_PIXELS))
    wanted, batch, channels = options.pop("wanted", 0), options.pop("batch", 2), options.pop("channels", 3)
    normalize, frozen, layout = (
        options.pop("normalize", False),
        options.pop("frozen", False),
        options.pop("layout", None),
    )
    loss = made(**options) if options.get("lpips", True) else LPIPS(**QUIET, **options)
    pair = [image.contiguous(memory_format=layout or torch.contiguous_format) for image in images(2, 40)]
    pair[wanted] = pair[wanted][:batch, :channels]
    weights = [] if frozen or not loss.lpips else [linear.weight for linear in loss.lins]
    loss.requires_grad_(not frozen)
    loss.net.requires_grad_(False)
    found = []
    for both in (False, True):
        leaves = [image.clone().requires_grad_(both or place == wanted) for place, image in enumerate(pair)]
        total, shares = loss(*leaves, retPerLayer=True, normalize=normalize)
        dy = torch.rand(total.shape, generator=torch.Generator().manual_seed(0))
        gradients = torch.autograd.grad(total, [leaves[wanted], *weights], dy, retain_graph=True)
        again = torch.autograd.grad(total, [leaves[wanted], *weights], dy)
        assert all(torch.equal(one, other) for one, other in zip(gradients, again, strict=True))
        found.append([total, *shares, *gradients])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(total, leaves[wanted], dy)
    for one, plain in zip(*found, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


def test_a_weight_that_has_changed_since_is_noticed():
    loss, (first, second) = made().requires_grad_(False), images(1, 40)
    distance = loss(first.clone().requires_grad_(), second)
    loss.net.slice2[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        distance.backward()


def test_one_images_gradients_gradient():
    loss, (first, second) = made().requires_grad_(False), images(1, 40)
    found = []
    for both in (False, True):
        leaf = first.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            loss(leaf, second.clone().requires_grad_(both)).sum(), leaf, create_graph=True
        )
        found.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5 * found[1].abs().max().item())


def test_one_image_goes_back(monkeypatch):
    """The five convolutions' gradients are of N images. Where anybody looks into the net, it runs as it stands."""
    loss, (first, second) = made(), images(2, 40)
    batches = []
    backward = NATIVE.conv_relu_backward
    monkeypatch.setattr(NATIVE, "conv_relu_backward", lambda dy, *rest: batches.append(len(dy)) or backward(dy, *rest))
    loss(first.clone().requires_grad_(), second).sum().backward()
    assert batches == [2] * 5
    seen = []
    loss.net.slice3[1].register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
    loss(first.clone().requires_grad_(), second).sum().backward()
    assert batches == [2] * 5
    assert sorted(seen) == [False, True]


@pytest.mark.parametrize("side", [64, 128])
def test_memory_as_a_loss(side):
    """At its most, less than half of what autograd takes through the plain net, but for the copy that oneDNN makes of a
    weight."""
    loss, (first, second) = made(), images(4, side)
    leaf = first.clone().requires_grad_()
    ours, plain = (
        peak_bytes(lambda call=call: torch.autograd.grad(call(leaf, second).sum(), leaf), "cpu")
        for call in (loss, lambda *pair: written_out(loss, *pair))
    )
    copy = max(p.nbytes for p in loss.net.parameters())
    assert ours - copy < 0.5 * plain


def test_one_image_against_many_and_gray_ones():
    loss, (first, second) = made(), images(3)
    together = loss(first[:1], second)
    assert together.shape == (3, 1, 1, 1)
    for number in range(3):
        alone = loss(first[0], second[number])
        torch.testing.assert_close(together[number : number + 1], alone, rtol=1e-5, atol=1e-7)
    gray = first[:, :1]
    torch.testing.assert_close(loss(gray, second), loss(gray.expand(-1, 3, -1, -1), second))
    assert loss(first, first).abs().max() < 1e-10  # oneDNN's sums may depend on an image's place in the batch


def test_a_map_has_the_images_size():
    loss, (first, second) = made(spatial=True), images(1, 40)
    total, shares = loss(first, second, retPerLayer=True)
    assert total.shape == (1, 1, 40, 40)
    torch.testing.assert_close(total, sum(shares))
    torch.testing.assert_close(loss(first / 2 + 0.5, second / 2 + 0.5, normalize=True), total, rtol=1e-4, atol=1e-5)


def test_dropout_while_linear_layers_are_trained():
    loss, (first, second) = made(eval_mode=False), images()
    assert not torch.equal(loss(first, second), loss(first, second))
    loss.eval()
    assert torch.equal(loss(first, second), loss(first, second))


# ---- Weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear_weights(tmp_path) -> Path:
    """A file as lpips writes it."""
    state = {f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate(BACKBONES["alex"].channels)}
    torch.save(state, tmp_path / "alex.pth")
    return tmp_path / "alex.pth"


@pytest.mark.parametrize("use_dropout", [True, False])
def test_linear_weights_of_a_file(linear_weights, use_dropout):
    loss = LPIPS(pnet_rand=True, model_path=linear_weights, use_dropout=use_dropout, verbose=False)
    for number, weight in enumerate(torch.load(linear_weights).values()):
        assert torch.equal(loss.lins[number].weight, weight)
        assert loss.lins[number] is getattr(loss, f"lin{number}")


def test_weights_of_the_backbone(tmp_path):
    """A state_dict of torchvision's net and its file give the same; its classifier is left aside."""
    state = {f"features.{key.partition('.')[2]}": t for key, t in Trunk("alex").state_dict().items()}
    state["classifier.6.weight"] = torch.zeros(2, 2)
    torch.save(state, tmp_path / "alexnet.pth")
    for backbone in (state, tmp_path / "alexnet.pth"):
        loss = LPIPS(backbone=backbone, pretrained=False, verbose=False)
        assert torch.equal(loss.net.slice3[1].weight, state["features.6.weight"])
        assert not any(p.requires_grad for p in loss.net.parameters())
        assert all(linear.weight.requires_grad for linear in loss.lins)


def test_bad_weights(linear_weights, monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match=r"model_path: expected linear weights for net 'vgg'.*lin1.*got \(1, 192, 1, 1\)"
    ):
        LPIPS(net="vgg", pnet_rand=True, model_path=linear_weights)
    state = {f"features.{key.partition('.')[2]}": t for key, t in Trunk("alex").state_dict().items()}
    del state["features.3.bias"]
    with pytest.raises(ValueError, match=r"^backbone: the state_dict does not fit the net: slice2\.3\.bias is"):
        LPIPS(backbone=state, pretrained=False)
    for name, given in (("model_path", {"pnet_rand": True}), ("backbone", {"pretrained": False})):
        with pytest.raises(FileNotFoundError, match=rf"^{name}: no file nowhere\.pth"):
            LPIPS(**given, **{name: "nowhere.pth"})
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(ValueError, match=rf"^{name}: .*text\.pth is not a file of tensors alone"):
            LPIPS(**given, **{name: tmp_path / "text.pth"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps lpips, or name a file"):
        LPIPS(pnet_rand=True)


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_the_smallest_images(net):
    least = BACKBONES[net].least
    with torch.device("meta"):
        trunk = Trunk(net)
        assert all(x.numel() for x in trunk(torch.empty(1, 3, least, least)))
        with pytest.raises((ValueError, RuntimeError)):
            trunk(torch.empty(1, 3, least - 1, least - 1))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"net: expected one of alex, vgg, squeeze, vgg16, got 'resnet'"):
        LPIPS(net="resnet")
    with pytest.raises(ValueError, match=r"version: expected one of 0\.1, 0\.0, got '0.2'"):
        LPIPS(version="0.2")
    loss, (first, second) = made(), images()
    with pytest.raises(ValueError, match="in1: net 'alex' compares images of at least 31x31 pixels, got 30x33"):
        loss(first, second[..., :30, :])
    with pytest.raises(TypeError, match="in1: expected a Tensor, got ndarray"):
        loss(first, second.numpy())
    with pytest.raises(ValueError, match=r"in0: expected \(N, 3, H, W\), got shape \(2, 2, 33, 33\)"):
        loss(first[:, :2], second)
    with pytest.raises(ValueError, match=r"in1: expected in0's shape \(2, 3, 33, 33\), got \(2, 3, 32, 33\)"):
        loss(first, second[:, :, :32])
