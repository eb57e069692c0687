"""Layers' outputs by name, and linear layers as convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet, features
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.features import layer_names

NAMES = {
    "torchvision": "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool drop6 fc6 "
    "relu6 drop7 fc7 relu7 fc8",
    "paper": "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool fc6 "
    "relu6 drop6 fc7 relu7 drop7 fc8",
    "caffenet": "conv1 relu1 pool1 norm1 conv2 relu2 pool2 norm2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool fc6 "
    "relu6 drop6 fc7 relu7 drop7 fc8",
}


def made(variant: str = "torchvision", classes: int = 5) -> AlexNet:
    with torch.device("meta"):
        net = AlexNet(classes, variant=variant)
    net = net.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.view(-1)[: 2**16].normal_(std=0.05, generator=generator)
            for first in range(2**16, p.numel(), 2**16):  # sixty million random numbers take a second
                p.view(-1)[first : first + 2**16] = p.view(-1)[: min(2**16, p.numel() - first)]
    return net


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return made()


@pytest.mark.parametrize("variant", NAMES)
def test_names(variant):
    with torch.device("meta"):
        assert list(layer_names(AlexNet(variant=variant))) == NAMES[variant].split()


def test_outputs_are_the_layers_own(net):
    """Each layer's output as it is before the next layer, though ReLUs work in place; under either name; and the net
    stays as it was."""
    x = torch.randn(2, 3, 64, 64)
    asked = ["conv1", "relu1", "features.2", "relu5", "avgpool", "fc6", "relu7", "fc8"]
    with torch.no_grad():
        logits = net(x)
        found = features(net, asked)(x)
        expected, y = {}, x
        for number, module in enumerate(net.features):
            y = module(y.clone())
            expected[f"features.{number}"] = y
        y = expected["avgpool"] = net.avgpool(y)
        y = y.flatten(1)
        for number, module in enumerate(net.classifier):
            y = module(y.clone())
            expected[f"classifier.{number}"] = y
    assert list(found) == asked
    for name, output in found.items():
        torch.testing.assert_close(output, expected[layer_names(net).get(name, name)], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in net.modules())
    torch.testing.assert_close(net(x), logits, rtol=1e-4, atol=1e-4)


def test_the_rest_of_the_net_does_not_run(net):
    ran = []
    hook = net.classifier[6].register_forward_hook(lambda *_: ran.append(1))
    features(net, "pool5")(torch.randn(1, 3, 64, 64))
    hook.remove()
    assert ran == []


def test_gradients_reach_the_image(net):
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    features(net, "conv3")(x)["conv3"].square().sum().backward()
    assert x.grad.abs().max() > 0


def test_unknown_layers(net):
    with pytest.raises(ValueError, match=r"layers: there is no layer 'relu9'; did you mean relu\d"):
        features(net, ["conv1", "relu9"])
    with pytest.raises(TypeError, match="layers: expected a name or several, got 3"):
        features(net, 3)
    with pytest.raises(ValueError, match="layers: expected one name at least, got none"):
        features(net, [])
    with pytest.raises(ValueError, match="net: expected one with features and classifier, as AlexNet has, got Linear"):
        features(nn.Linear(2, 2), "fc1")


# ---- Fully convolutional ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_a_map_of_logits(variant):
    """At each place what the classifier makes of that window of features; one window of the net's own image size."""
    net = made(variant)
    whole = net.fully_convolutional()
    side, window = VARIANTS[variant].image_size, VARIANTS[variant].feature_side(VARIANTS[variant].image_size)
    with torch.no_grad():
        own = torch.randn(1, 3, side, side)
        torch.testing.assert_close(whole(own)[:, :, 0, 0], net(own), rtol=1e-4, atol=1e-4)
        x = torch.randn(1, 3, side + 32, side + 64)
        logits, seen = whole(x), net.features(x)
        assert logits.shape == (1, 5, 2, 3)
        for row in range(2):
            for column in range(3):
                part = seen[:, :, row : row + window, column : column + window]
                expected = net.classifier(part.flatten(1))
                torch.testing.assert_close(logits[:, :, row, column], expected, rtol=1e-4, atol=1e-4)
    assert whole[0].weight is net.features[0].weight


def test_nets_that_are_not_converted():
    with torch.device("meta"):
        towers = AlexNet(variant="paper-no-talk")
    with pytest.raises(ValueError, match="net: the linear layers of 'paper-no-talk' are split over towers"):
        towers.fully_convolutional()
