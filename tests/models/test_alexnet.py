"""AlexNet() is torchvision's AlexNet; the variants are what they say."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from alexnet_fast import AlexNet, FusedSequential, backend, fuse
from alexnet_fast.models import VARIANTS


class Documented(nn.Module):
    """The module that torchvision documents, in plain torch.nn."""

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
            *(nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(p=dropout), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True)),
            *(nn.Dropout(p=dropout), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


PARAMETERS = {
    "torchvision": 61_100_840,
    "paper": 60_965_224,
    "alex2012": 60_965_224,
    "caffe": 60_965_224,
    "caffenet": 60_965_224,
    "owt": 61_100_840,
    "keras": 50_844_008,
}
SMALLEST = {"torchvision": 63, "paper": 63, "alex2012": 36, "caffe": 39, "caffenet": 39, "owt": 36, "keras": 67}
# What runs as one operator of this package, in order.
OPERATORS = {
    "torchvision": ["conv_stage", "conv_stage", "conv_relu", "conv_relu", "conv_stage"],
    "alex2012": ["lrn", "max_pool", "conv_stage", "max_pool", "conv_relu", "conv_relu", "conv_stage"],
    "caffenet": ["conv_stage", "lrn", "conv_stage", "lrn", "conv_relu", "conv_relu", "conv_stage"],
    "owt": ["lrn", "max_pool", "conv_stage", "conv_relu", "conv_relu", "conv_stage"],
}
OPERATORS["paper"] = OPERATORS["caffe"] = OPERATORS["keras"] = OPERATORS["torchvision"]


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Documented(10)


@pytest.fixture(scope="module")
def ours(plain) -> AlexNet:
    model = AlexNet(10)
    model.load_state_dict(plain.state_dict())
    return model


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request) -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(variant=request.param).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 67, 75)


def normalized(model: AlexNet, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.variant.mean, model.variant.std))
    return (pixels - mean) / std


# ------------------------------------------------------------------------------------------- torchvision's AlexNet


def test_same_initial_weights(plain):
    torch.manual_seed(0)
    state = AlexNet(10).state_dict()
    assert all(torch.equal(state[key], t) for key, t in plain.state_dict().items())


def test_state_dicts_go_both_ways(plain, ours):
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert not any(ours.load_state_dict(plain.state_dict(), strict=True))
    assert not any(plain.load_state_dict(ours.state_dict(), strict=True))


def test_same_modules(plain, ours):
    """Both print the same text, so every module has the same options."""
    assert repr(ours) == repr(plain).replace("Documented", "AlexNet")
    assert type(ours.features) is FusedSequential


@pytest.mark.parametrize(
    ("part", "dtype", "name", "rtol", "atol"),
    [
        ("features", torch.float64, "reference", 0, 0),
        ("features", torch.float64, "cpu", 1e-9, 1e-11),
        ("", torch.float32, "auto", 1e-3, 1e-5),
    ],
)
def test_outputs_and_gradients_agree(plain, ours, images, part, dtype, name, rtol, atol):
    """The whole net, and what is ours of it; atol is a share of the largest element."""
    results = []
    for model in (plain, ours):
        net = copy.deepcopy(model.get_submodule(part)).to(dtype).train()
        x = images.to(dtype, copy=True).requires_grad_()
        torch.manual_seed(1)  # dropout's masks
        with backend(name):
            y = net(x)
        y.square().sum().backward()
        results.append([y, x.grad, *[p.grad for p in net.parameters()]])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol * expected.abs().max().item())


def test_a_gradient_penalty_agrees(plain, ours, images):
    """R1 (Mescheder, Geiger and Nowozin 2018): the squared gradient by the image, and what it teaches the net."""
    results = []
    for net in (plain, ours):
        x = images.clone().requires_grad_()
        torch.manual_seed(1)  # dropout's masks
        (gradient,) = torch.autograd.grad(net(x).logsumexp(1).sum(), x, create_graph=True)
        penalty = gradient.square().sum()
        learnt = torch.autograd.grad(penalty, [net.features[0].weight, net.features[10].bias, net.classifier[4].weight])
        results.append([penalty, *learnt])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_slices_and_hooks_agree(plain, ours, images):
    seen: dict[int, list] = {}
    handles = [
        net.features[k].register_forward_hook(lambda m, i, o, k=k: seen.setdefault(k, []).append(o.clone()))
        for net in (plain, ours)
        for k in range(13)
    ]
    try:
        plain.features(images), ours.features(images)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for k in range(13):
            torch.testing.assert_close(*seen[k], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.features[: k + 1](images), seen[k][0], rtol=1e-4, atol=1e-5)


def test_fuse_makes_the_documented_net_ours(plain, ours, images, operators):
    fused = fuse(copy.deepcopy(plain)).eval()
    assert operators(fused, images) == OPERATORS["torchvision"]
    torch.testing.assert_close(fused(images), ours.eval()(images))


# --------------------------------------------------------------------------------------------------------- variants


def test_parameter_count(variant):
    assert sum(p.numel() for p in variant.parameters()) == PARAMETERS[variant.variant.name]


def test_every_variant_is_counted():
    assert list(PARAMETERS) == list(VARIANTS)


def test_native_size_makes_pooling_the_identity(variant):
    record = variant.variant
    with torch.no_grad():
        y = variant.features(torch.randn(1, 3, record.image_size, record.image_size))
        assert tuple(y.shape[2:]) == variant.avgpool.output_size
        assert torch.equal(variant.avgpool(y), y)


def test_pooling_that_changes_nothing_is_left_out():
    """Pooling is skipped, unless it has a hook, gives another side, or is a module that a user put in its place."""
    net, images = AlexNet(variant="torchvision").eval(), torch.zeros(1, 3, 224, 224)

    def pools(images: torch.Tensor) -> int:
        called = 0

        def entered(frame, event, _argument) -> None:
            nonlocal called
            called += event == "call" and frame.f_code is nn.AdaptiveAvgPool2d.forward.__code__

        sys.setprofile(entered)
        try:
            net(images)
        finally:
            sys.setprofile(None)
        return called

    with torch.no_grad():
        assert pools(images) == 0
        assert pools(torch.zeros(1, 3, 256, 256)) == 1
        seen = []
        hook = net.avgpool.register_forward_hook(lambda module, args, output: seen.append("hook"))
        assert pools(images) == len(seen) == 1
        hook.remove()
        with register_module_forward_hook(lambda module, args, output: None):
            assert pools(images) == 1
        net.avgpool = nn.AdaptiveMaxPool2d(6)
        net.avgpool.register_forward_hook(lambda module, args, output: seen.append("other"))
        net(images)
    assert seen == ["hook", "other"]


def test_conv1_gives_55_in_the_nets_of_2012(variant):
    record = variant.variant
    side = 54 if record.name == "keras" else 55
    with torch.no_grad():
        conv1 = 1 if isinstance(variant.features[0], nn.ZeroPad2d) else 0
        y = variant.features[: conv1 + 1](torch.zeros(1, 3, record.image_size, record.image_size))
    assert y.shape[2:] == (side, side)


def test_smallest_image(variant):
    record = variant.variant
    least = record.min_image_size
    assert least == SMALLEST[record.name]
    with torch.no_grad():
        assert variant(torch.zeros(1, 3, least, least + 9)).shape == (1, 1000)
    for height, width in ((least - 1, least), (least, least - 1)):
        expected = f"variant '{record.name}' takes images of at least {least}x{least} pixels, got {height}x{width}"
        with pytest.raises(ValueError, match=f"input: {expected}"):
            variant(torch.zeros(1, 3, height, width))
    with pytest.raises((ValueError, RuntimeError)):  # and rightly so
        nn.Sequential(*variant.features)(torch.zeros(1, 3, least - 1, least))


@pytest.mark.parametrize("shape", [(1, 1, 80, 80), (3, 80, 80), (1, 80, 80, 3)])
def test_wrong_channels(variant, shape):
    with pytest.raises(ValueError, match=r"input: expected \(N, 3, H, W\), got shape"):
        variant(torch.zeros(shape))


def test_runs_as_stages(variant, images, operators):
    assert operators(variant, images) == OPERATORS[variant.variant.name]


def test_agrees_with_its_modules(variant):
    """Called one by one, by torch; values as large as the variant's normalization makes them."""
    images = normalized(variant, torch.rand(2, 3, 80, 80))
    with backend("reference"), torch.no_grad():
        expected = nn.Sequential(*variant.features)(images)
    torch.testing.assert_close(variant.features(images), expected, rtol=1e-4, atol=1e-5 * expected.max().item())


def test_initialization(variant):
    """Standard deviation and bias of every layer, as the source of the variant states them; none stated: torch's."""
    stated = {
        "paper": ([0.01] * 8, [0, 1, 0, 1, 1, 1, 1, 0]),
        "alex2012": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
        "caffe": ([0.01] * 5 + [0.005, 0.005, 0.01], [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0]),
        "caffenet": ([0.01] * 5 + [0.005, 0.005, 0.01], [0, 1, 0, 1, 1, 1, 1, 0]),
        "owt": ([0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01], [0, 1, 0, 1, 1, 1, 1, -7]),
    }
    layers = [m for m in variant.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    if variant.variant.name in stated:
        for layer, std, bias in zip(layers, *stated[variant.variant.name], strict=True):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
            assert abs(layer.weight.mean().item()) < 0.03 * std
            assert torch.all(layer.bias == bias)
    else:
        for layer in layers:  # uniform within 1 / sqrt(fan in)
            bound = layer.weight[0].numel() ** -0.5
            assert layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_dropout_is_where_the_source_has_it(variant):
    places = [i for i, module in enumerate(variant.classifier) if isinstance(module, nn.Dropout)]
    assert places == ([0, 3] if variant.variant.name == "torchvision" else [2, 5])


def test_the_signal_reaches_the_output(variant):
    """No dead start: on images normalized as the variant wants, logits differ between images, and all layers learn."""
    y = variant(normalized(variant, torch.rand(2, 3, 99, 99)))
    nn.functional.cross_entropy(y, torch.arange(2)).backward()
    try:
        assert (y[0] - y[1]).abs().max() > 1e-3
        assert all(p.grad.abs().max() > 0 for p in variant.parameters())
    finally:
        variant.zero_grad(set_to_none=True)


def test_alex2012_pads_as_its_code_does():
    """side = 1 + ceil((H - 11) / 4) with zeros beyond the image, whatever H."""
    torch.manual_seed(0)
    net = AlexNet(2, variant="alex2012")
    for side in range(40, 48):
        image = torch.randn(1, 3, side, side)
        y = net.features[:2](image)
        out = 1 + -(-(side - 11) // 4)
        assert y.shape[2:] == (out, out)
        padded = nn.functional.pad(image, (0, 20, 0, 20))
        torch.testing.assert_close(y, net.features[1](padded)[:, :, :out, :out])


# ------------------------------------------------------------------------------------------------ use of all kinds


def small(name: str) -> AlexNet:
    """Without its linear layers, which are torch's own and most of its bytes."""
    model = AlexNet(3, variant=name).eval()
    model.classifier = nn.Identity()
    return model


def test_copies_pickles_and_records_its_variant(images):
    model = small("paper")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.variant == VARIANTS["paper"]
        assert torch.equal(other(images), model(images))


def test_records_are_frozen():
    with pytest.raises(AttributeError):
        VARIANTS["paper"].image_size = 227


@pytest.mark.parametrize("name", ["paper", "alex2012", "caffenet"])  # all kinds of layers and orders
def test_compiles_to_one_graph(name, images):
    model = small(name)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(images), model(images))


def test_autocast_and_half(ours, images):
    expected = ours.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(images)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.01)
    half = copy.deepcopy(ours).bfloat16()(images.bfloat16())
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.01)


def test_channels_last_and_empty_batch(ours, images):
    expected = ours.eval()(images)
    got = copy.deepcopy(ours).to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert ours(images[:0]).shape == (0, 10)


def test_traces_with_fx_for_feature_extraction(variant, images):
    graph = torch.fx.symbolic_trace(variant)
    assert any(node.target == "features.0" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(images), variant(images), rtol=1e-4, atol=1e-4)


def test_other_image_channels_after_conv1_is_replaced(images):
    model = AlexNet(3).eval()
    model.features[0] = nn.Conv2d(1, 64, 11, 4, 2)
    assert model(images[:, :1]).shape == (2, 3)
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, W\)"):
        model(images)
    model.features = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 256, 11))
    assert model.eval()(images[:, :1]).shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "vgg"}, "variant: expected one of torchvision, paper, .*, got 'vgg'"),
        ({"num_classes": 0}, "num_classes: expected a positive int, got 0"),
        ({"num_classes": "5"}, "num_classes: expected a positive int, got '5'"),
        ({"num_classes": 5.0}, "num_classes: expected a positive int, got 5.0"),
        ({"variant": None}, "variant: expected one of torchvision, paper, .*, got None"),
        ({"variant": ["paper"]}, r"variant: expected one of torchvision, paper, .*, got \['paper'\]"),
        ({"widths": "abcdefg"}, "widths: conv1: expected a positive multiple, got 'a'"),
        ({"ranks": "ab"}, "ranks: fc6 takes 9216 to 4096, so 0 … 4096, got 'a'"),
        ({"dropout": 1.5}, "dropout probability"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlexNet(**arguments)


# ---- Surgery, and the tools that take a net apart -------------------------------------------------------------------


def _other_input(net: AlexNet) -> torch.Tensor:
    net.features[0] = nn.Sequential(nn.Conv2d(4, 3, 1), net.features[0])
    return torch.randn(1, 4, 224, 224)


def _small_kernel(net: AlexNet) -> torch.Tensor:
    net.features[0] = nn.Conv2d(3, 64, 3, 1, 1)
    return torch.randn(1, 3, 32, 32)


def _grey(net: AlexNet) -> torch.Tensor:
    net.features[0] = nn.Conv2d(1, 64, 11, 4, 2)
    return torch.randn(1, 1, 64, 64)


def _fewer_layers(net: AlexNet) -> torch.Tensor:
    del net.features[12]
    return torch.randn(1, 3, 40, 40)


def _behind_a_norm(net: AlexNet) -> torch.Tensor:
    net.features = nn.Sequential(nn.BatchNorm2d(3), net.features)
    return torch.randn(1, 3, 224, 224)


@pytest.mark.parametrize("operate", [_other_input, _small_kernel, _grey, _fewer_layers, _behind_a_norm])
def test_surgery(operate):
    """The net asks its modules nothing that torchvision's does not ask."""
    net = AlexNet(5).eval()
    x = operate(net)
    expected = net.classifier(torch.flatten(net.avgpool(net.features(x)), 1))
    assert torch.equal(net(x), expected)
    assert expected.shape == (1, 5)


def test_what_a_changed_net_cannot_take_is_its_modules_to_say():
    net = AlexNet(5)
    net.features[0] = nn.Conv2d(4, 64, 11, 4, 2)
    with pytest.raises(ValueError, match=r"input: expected \(N, 4, H, W\), got shape \(1, 3, 80, 80\)"):
        net(torch.zeros(1, 3, 80, 80))
    net.features[0] = nn.Conv2d(3, 64, 3, 1, 1)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        net(torch.zeros(1, 3, 8, 8))
    assert "variant" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(variant):
    """torch.jit.trace and script give what they give for torchvision's net; in training dropout is on."""
    x = torch.randn(2, 3, variant.variant.image_size, variant.variant.image_size)
    with torch.no_grad():
        expected = variant.eval()(x)
        for made in (torch.jit.trace(variant, x), torch.jit.script(variant)):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_export_with_any_size():
    """Adaptive pooling is skipped at the variant's own size, but not in a graph that is for all."""
    net, free = AlexNet(5).eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(net, (torch.randn(2, 3, 224, 224),), dynamic_shapes=({0: free, 2: free, 3: free},))
    for shape in ((2, 3, 224, 224), (1, 3, 300, 257)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-5)
