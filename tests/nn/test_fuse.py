"""fuse() on the kinds of net that people bring."""

from __future__ import annotations

import copy
import pickle
import re
from collections import OrderedDict

import pytest
import torch
from torch import nn

from alexnet_fast import FusedSequential, fuse, fusion_report, pack


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


# ---- What stands between a run's modules ---------------------------------------------------------------------------


@pytest.mark.parametrize("between", [nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout])
def test_what_does_nothing_is_seen_through(between, operators):
    """In inference dropouts are left out; one in training mode, or with a hook, is called."""
    net = fuse(nn.Sequential(nn.Conv2d(3, 8, 3), between(), nn.ReLU(), between(), nn.MaxPool2d(2))).eval()
    x = torch.randn(2, 3, 9, 9)
    assert operators(net, x) == ["conv_stage"]
    torch.testing.assert_close(net(x), nn.Sequential(*net)(x))
    net[1].register_forward_hook(lambda module, args, output: output + 1)
    assert operators(net, x) == ["max_pool"]
    torch.testing.assert_close(net(x), nn.Sequential(*net)(x))
    del net[1]
    net.train()
    assert operators(net, x) == (["conv_stage"] if between is nn.Identity else ["conv_relu", "max_pool"])


# ---- Batch normalization -------------------------------------------------------------------------------------------


def normalizing(**options) -> nn.Sequential:
    """Convolutions with normalizations that do something, of three forms."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.1, affine=False), nn.Identity(), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)),
    )
    for norm in net:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.affine:
                nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return net.to(**options).eval()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("packed", [False, True])
def test_normalization_is_folded_in_inference(mode, packed, operators):
    plain = normalizing(memory_format=torch.channels_last)
    net, x = fuse(copy.deepcopy(plain), fold_batchnorm=True), torch.randn(2, 3, 20, 20)
    if packed:
        pack(net)
    for _ in range(2):  # the second call takes what the first one kept
        with mode():
            torch.testing.assert_close(net(x), plain(x), rtol=1e-4, atol=1e-5)
            names = ["packed_stage"] * 2 if packed else ["conv_stage", "conv_relu"]
            assert operators(net, x) == names
    assert list(net.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net[0].weight.mul_(2),
        lambda net: net[1].running_var.mul_(2),
        lambda net: setattr(net[1], "eps", 0.5),
        lambda net: setattr(net[5], "weight", nn.Parameter(torch.randn(8, 8, 3, 3))),
        lambda net: net[1].load_state_dict(nn.BatchNorm2d(8).state_dict()),
        lambda net: net.train(),
        lambda net: net.double(),
        lambda net: net[1].register_forward_hook(lambda module, args, output: output + 1),
        lambda net: setattr(net, "1", nn.BatchNorm2d(8, track_running_stats=False).eval()),
    ],
)
@torch.no_grad()
def test_what_is_folded_follows_its_tensors(change):
    net, x = fuse(normalizing(), fold_batchnorm=True), torch.randn(2, 3, 20, 20)
    net(x)
    change(net)
    x = x.to(net[0].weight.dtype)
    expected = nn.Sequential(*copy.deepcopy(net))(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_normalization_is_called_where_gradients_are_wanted(operators):
    net, x = fuse(normalizing(), fold_batchnorm=True), torch.randn(2, 3, 20, 20)
    assert operators(net, x) == ["lrn", "max_pool"]
    torch.testing.assert_close(net(x), nn.Sequential(*net)(x))
    with torch.no_grad():
        assert operators(fuse(normalizing()), x) == ["lrn", "max_pool"], "not asked for"


# ---- Pairs in modules of one's own ---------------------------------------------------------------------------------

FIRE = [(name, f"{name}_activation") for name in ("squeeze", "expand1x1", "expand3x3")]


class Consecutive(nn.Module):
    """Sequentials that the parent calls one after the other; one ReLU for two convolutions; one that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Sequential(nn.ReLU(True), nn.MaxPool2d(2))
        self.a, self.b, self.relu = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x):
        y = self.relu(self.a(self.second(self.first(x))))
        z = self.b(y)
        return self.relu(z) + z


@pytest.mark.parametrize("pairs", [FIRE, "trace"])
def test_pairs(pairs, operators):
    plain = Fire(3, 4, 8).double()
    fused = fuse(copy.deepcopy(plain), pairs=pairs)
    assert (repr(fused), list(fused.state_dict())) == (repr(plain), list(plain.state_dict()))
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    assert operators(fused, x) == ["conv_relu"] * 3
    results = []
    for net in (plain, fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        y = net(x)
        y.square().sum().backward()
        results.append([y, *[p.grad for p in net.parameters()]])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


def test_pairs_across_sequentials(operators):
    """A convolution whose output something reads before the ReLU is no part of a pair."""
    plain = Consecutive()
    net, x = fuse(copy.deepcopy(plain), pairs="trace"), torch.randn(2, 3, 9, 9)
    assert operators(net, x) == ["conv_relu", "max_pool", "conv_relu"]
    torch.testing.assert_close(net(x), plain(x))


@pytest.mark.parametrize("name", ["squeeze", "squeeze_activation"])
def test_hooks_on_pairs(name, operators):
    plain = Fire(3, 4, 8)
    net, x, seen = fuse(copy.deepcopy(plain), pairs=FIRE), torch.randn(2, 3, 9, 9), []
    for model in (plain, net):
        model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    torch.testing.assert_close(net(x), plain(x))
    torch.testing.assert_close(*seen)
    assert operators(net, x) == ["conv_relu"] * 2


def test_a_paired_relu_elsewhere_is_a_relu():
    net = fuse(Fire(3, 4, 8), pairs=FIRE)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(net.squeeze_activation(x.clone()), x.relu())
    with torch.no_grad():
        y = net.squeeze(torch.randn(2, 3, 5, 5)).sub_(1)
        assert torch.equal(net.squeeze_activation(y.clone()), y.relu())
        assert torch.equal(net.squeeze_activation(y), y.relu()), "changed since the convolution"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pairs_in_graphs():
    plain = Fire(3, 4, 8)
    net, x = fuse(copy.deepcopy(plain), pairs=FIRE).eval(), torch.randn(2, 3, 9, 9)
    torch._dynamo.reset()
    made = [torch.compile(net, fullgraph=True, backend="eager"), torch.export.export(net, (x,)).module()]
    for graph in [*made, torch.jit.trace(net, x), torch.fx.symbolic_trace(net)]:
        torch.testing.assert_close(graph(x), plain(x))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("squeeze", "none")], "pairs: 'none' is no module of Fire"),
        ([("squeeze_activation", "squeeze")], "pairs: 'squeeze_activation' is a ReLU, expected Conv2d"),
        ([("squeeze",)], r"pairs: expected the names of a Conv2d and a ReLU, got \('squeeze',\)"),
        ("auto", "pairs: expected pairs of names or 'trace', got 'auto'"),
    ],
)
def test_wrong_pairs(pairs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fuse(Fire(3, 4, 8), pairs=pairs)


# ---- The report ----------------------------------------------------------------------------------------------------


def test_report(capsys, operators):
    """Each module without children, with the operators that run."""
    x = torch.randn(2, 3, 35, 35)
    net = fuse(squeezenet().eval(), pairs="trace", report=True)
    assert capsys.readouterr().out.startswith("name ")
    rows = fusion_report(net, x)
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert [row.name for row in rows] == [n for n, m in net.named_modules() if not [*m.children()]]
    ran = [row.runs_as for row in rows if row.module.endswith("Conv2d") or row.runs_as == "max_pool"]
    assert ran == operators(net, x)


@pytest.mark.parametrize(
    ("change", "name", "runs_as", "why"),
    [
        (lambda net: None, "1", "itself", r"fold_batchnorm=True"),
        (lambda net: None, "0", "itself", "a BatchNorm2d behind it, no ReLU"),
        (lambda net: net[5].register_forward_hook(print), "5", "itself", "it has hooks"),
        (lambda net: setattr(net[5], "padding_mode", "reflect"), "5", "itself", "padding_mode='reflect'"),
        (lambda net: setattr(net[4], "dilation", 2), "4", "itself", "dilation=2"),
        (
            lambda net: setattr(net[5], "__class__", type("Mine", (nn.Conv2d,), {})),
            "5",
            "itself",
            "a subclass of Conv2d",
        ),
        (lambda net: fuse(net, fold_batchnorm=True), "1", "conv_stage", "with 0, 2, 3, 4"),
        (lambda net: fuse(net, fold_batchnorm=True), "7", "nothing", "it does nothing in inference"),
    ],
)
def test_reasons(change, name, runs_as, why):
    net = fuse(normalizing())
    change(net)
    (row,) = [row for row in fusion_report(net) if row.name == name]
    assert row.runs_as == runs_as
    assert re.search(why, row.why)
