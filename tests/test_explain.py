"""Maps of what counted: against what the packages grad-cam and captum compute, written out here
(tests/models/check_explain.py compares with the packages), and where in an image a layer's channels look."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_fast import AlexNet, explain
from alexnet_fast.models.features import features

SIDE = 80
TARGETS = torch.tensor([2, 0])


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(0)
    made = AlexNet(4).eval()
    made.classifier = nn.Sequential(nn.Linear(9216, 4))
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def test_grad_cam(net, images):
    """At a layer whose output the next one overwrites, as at one whose it does not."""
    for layer, end in (("relu5", 12), ("conv5", 11)):
        maps = net.features[:end](images).requires_grad_()
        scores = net.classifier(net.avgpool(net.features[end:](maps.clone())).flatten(1))
        (slope,) = torch.autograd.grad(scores.gather(1, TARGETS[:, None]).sum(), maps)
        expected = torch.einsum("nkhw,nk->nhw", maps, slope.mean((2, 3))).relu().detach()
        torch.testing.assert_close(explain.grad_cam(net, images, TARGETS, layer), expected)
    likeliest = explain.grad_cam(net, images)
    torch.testing.assert_close(likeliest, explain.grad_cam(net, images, net(images).argmax(1)))
    assert not any(module._forward_hooks for module in net.modules())


def test_guided_gradients(net, images):
    """What a ReLU written out with that gradient gives."""

    class Guided(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.relu()

        @staticmethod
        def backward(ctx, slope):
            (x,) = ctx.saved_tensors
            return slope.relu() * (x > 0)

    x = images.clone().requires_grad_()
    y = x
    for module in net.features:
        y = Guided.apply(y) if isinstance(module, nn.ReLU) else module(y)
    scores = net.classifier(net.avgpool(y).flatten(1))
    (expected,) = torch.autograd.grad(scores[:, 1].sum(), x)
    ours = explain.guided_gradients(net, images, 1)
    torch.testing.assert_close(ours, expected)
    assert ours.abs().max() > 0
    assert images.grad is None
    assert not any(module._forward_hooks for module in net.modules())


def test_occlusion(net, images):
    """Squares that overlap and reach over the border, pixel by pixel."""
    window, stride = 45, 40
    expected = torch.zeros(2, SIDE, SIDE)
    covered = torch.zeros(SIDE, SIDE)
    with torch.no_grad():
        for row in (0, 40):
            for column in (0, 40):
                part = images.clone()
                part[..., row : row + window, column : column + window] = 0.5
                drop = (net(images) - net(part)).gather(1, TARGETS[:, None])
                expected[:, row : row + window, column : column + window] += drop[..., None]
                covered[row : row + window, column : column + window] += 1
    ours = explain.occlusion(net, images, TARGETS, window=window, stride=stride, fill=0.5, batch_size=3)
    torch.testing.assert_close(ours, expected / covered, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layer", ["conv1", "pool2", "relu5"])
@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_receptive_field(layer, variant):
    """By the pixels of which one place has a gradient; normalization over channels moves none."""
    net = AlexNet(2, variant=variant).eval()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1.0)
    field = explain.receptive_field(net, layer)
    image = torch.rand(1, 3, net.variant.image_size, net.variant.image_size, requires_grad=True)
    place = 6
    seen = features(net, layer)(image)[layer][0, :, place, place].sum()
    (slope,) = torch.autograd.grad(seen, image)
    rows = slope[0].abs().sum((0, 2)).nonzero()[:, 0]
    first, last = field.start + place * field.step, field.start + place * field.step + field.size - 1
    if "pool" in layer or layer == "relu5":  # of a pooling window one place has all the gradient
        assert first <= rows[0]
        assert rows[-1] <= last
        assert rows[-1] - rows[0] > 0.6 * min(field.size, image.shape[2])
    else:
        assert (rows[0], rows[-1]) == (first, last)


def test_peaks(net):
    """The box holds what the channel answers to: the one bright spot of a dark image."""
    image = torch.zeros(2, 3, SIDE, SIDE)
    image[1, :, 50:54, 20:24] = 5.0
    values, boxes = explain.peaks(net, image, "pool1")
    output = features(net, "pool1")(image)["pool1"]
    torch.testing.assert_close(values, output.amax((2, 3)))
    answers = values[1] > values[0] + 0.1
    assert answers.sum() > 10
    for top, left, bottom, right in boxes[1, answers].tolist():
        assert top < 54 and bottom > 50 and left < 24 and right > 20  # noqa: PT018
        assert bottom - top <= explain.receptive_field(net, "pool1").size == 19
    values, boxes = explain.peaks(net, image, "classifier")
    torch.testing.assert_close(values, net(image))
    assert boxes[0, 0].tolist() == [0, 0, SIDE, SIDE]


def test_bad_arguments(net, images):
    cases = {
        "layers: there is no layer 'relu9'; did you mean relu": lambda: explain.grad_cam(net, images, 0, "relu9"),
        "layer: expected one that gives maps .*'classifier' of shape": (
            lambda: explain.grad_cam(net, images, 0, "classifier")
        ),
        "target: expected classes from 0 to 3, got 4": lambda: explain.guided_gradients(net, images, 4),
        "target: expected a class or one for each of 2": lambda: explain.grad_cam(net, images, torch.zeros(3).long()),
        "window: expected a positive number of pixels, got 0": lambda: explain.occlusion(net, images, window=0),
        "stride: expected from 1 to the window's 5 pixels, got 6": (
            lambda: explain.occlusion(net, images, window=5, stride=6)
        ),
        r"net: expected one with modules nn\.ReLU": lambda: explain.guided_gradients(nn.Flatten(), images),
        r"net: expected one that gives \(N, classes\), got \(2, 3, 80, 80\)": lambda: explain.occlusion(F.relu, images),
    }
    for said, call in cases.items():
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.slow
def test_against_the_packages(second_torch):
    done = second_torch("tests.models.check_explain")
    assert done.returncode == 0, done.stderr
