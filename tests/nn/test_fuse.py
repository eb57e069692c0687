"""fuse() on the kinds of net that people bring."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from alexnet_fast import FusedSequential, fuse


class Fire(nn.Module):
    """SqueezeNet's module: no Sequential, with ReLUs called one by one and a concatenation."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeezed, expanded, 1), nn.ReLU(inplace=True)
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.squeeze_activation(self.squeeze(x))
        both = self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))
        return torch.cat(both, 1)


class Classified(nn.Module):
    def __init__(self, features: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features, self.avgpool, self.classifier = features, nn.AdaptiveAvgPool2d((2, 2)), classifier

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)))


class Taps(nn.Module):
    """An LPIPS backbone: slices of one Sequential under their old names, with an output after each ReLU."""

    def __init__(self) -> None:
        super().__init__()
        features = alexnet()
        for i, (start, end) in enumerate([(0, 2), (2, 5), (5, 8)]):
            tap = nn.Sequential()
            for k in range(start, end):
                tap.add_module(str(k), features[k])
            self.add_module(f"slice{i}", tap)

    def forward(self, x):
        taps = []
        for part in (self.slice0, self.slice1, self.slice2):
            x = part(x)
            taps.append(x.clone())
        return torch.cat([tap.flatten(1) for tap in taps], 1)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def alexnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)),
    )


def vgg() -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)),
        nn.MaxPool2d(2),
    )
    return Classified(features, nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.ReLU(True), nn.Linear(16, 4)))


def squeezenet() -> nn.Module:
    features = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, ceil_mode=True)),
        *(Fire(8, 4, 8), Fire(16, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True)),
    )
    return Classified(features, nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)))


def caffenet() -> nn.Module:
    named = [
        *(("conv1", nn.Conv2d(3, 8, 5, 2)), ("relu1", nn.ReLU(inplace=True))),
        *(("pool1", nn.MaxPool2d(3, 2, ceil_mode=True)), ("norm1", nn.LocalResponseNorm(5, 1e-4, 0.75))),
        *(("conv2", nn.Conv2d(8, 8, 5, padding=2, groups=2)), ("relu2", nn.ReLU(inplace=True))),
        *(("pool2", nn.MaxPool2d(3, 2, ceil_mode=True)), ("norm2", nn.LocalResponseNorm(5, 1e-4, 0.75))),
    ]
    return nn.Sequential(OrderedDict(named))


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), Residual(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), nn.ReLU())


NETS = {"alexnet": (alexnet, 1), "vgg": (vgg, 2), "squeezenet": (squeezenet, 2), "lpips": (Taps, 3)} | {
    "caffenet": (caffenet, 1),
    "residual": (residual, 1),
}


@pytest.mark.parametrize("name", NETS)
def test_same_net(name):
    build, sequences = NETS[name]
    plain = build().double()
    model = copy.deepcopy(plain)
    modules, keys = list(model.modules()), list(model.state_dict())
    fused = fuse(model)
    assert fused is model
    assert list(fused.modules()) == modules
    assert list(fused.state_dict()) == keys
    assert sum(type(module) is FusedSequential for module in fused.modules()) == sequences
    x = torch.randn(2, 3, 35, 35, dtype=torch.float64)
    results = []
    for net in (plain, fused):
        y = net(x)
        y.square().sum().backward()
        results.append([y, *[p.grad for p in net.parameters()]])
    torch.testing.assert_close(*results)


def test_keeps_hooks_and_references():
    model = vgg().double()
    features, seen = model.features, []
    features.register_forward_hook(lambda module, args, output: seen.append(output))
    features[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    fuse(model)
    assert model.features is features
    x = torch.randn(2, 3, 35, 35, dtype=torch.float64)
    model(x)
    assert seen[0] is x
    torch.testing.assert_close(seen[1], nn.Sequential(*features)(x))


def test_twice_is_once():
    model = fuse(vgg())
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in fuse(model).modules()] == classes


def test_leaves_subclasses_alone():
    model = fuse(residual())
    assert type(model[1]) is Residual


def test_wants_a_module():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got list"):
        fuse([nn.ReLU()])
