"""The nets of the 2012 logs from which something was taken."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.nn import GroupedLinear, SpatialResponseNorm
from alexnet_fast.train.config import resolve, without

# Layer by layer, as layers-147, -148 and -150.cfg of the 2012 code have them.
CONV1, CONV4, CONV5, FC7, FC8 = 34_944, 663_936, 442_624, 16_781_312, 4_097_000
NO_TALK = CONV1 + 320 * (48 * 25 + 1) + 384 * (160 * 9 + 1) + CONV4 + CONV5 + 8192 * (4608 + 1) + 4096 * 4097 + FC8
PARAMETERS = {
    "paper-no-lrn": 60_965_224,
    "alex2012-no-lrn": 60_965_224,
    "paper-pool-2x2": 60_965_224,
    "alex2012-pool-2x2": 60_965_224 + 4096 * 256 * (7 * 7 - 6 * 6),  # sides are rounded up: 28, 14, 7
    "paper-no-talk": NO_TALK,
    "alex2012-no-talk": NO_TALK,
    "caffe-no-talk": NO_TALK,
    "alex2012-no-lrn-pool-2x2-no-talk": NO_TALK + 8192 * 128 * (7 * 7 - 6 * 6),
    "torchvision-pool-2x2": 61_100_840,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str):
    with torch.device("meta"):
        net = AlexNet(variant=name)
        assert sum(parameter.numel() for parameter in net.parameters()) == PARAMETERS[name]
        assert net(torch.empty(1, 3, net.variant.image_size, net.variant.image_size)).shape == (1, 1000)
    assert net.variant.name == name


def test_what_is_taken_is_gone_and_the_rest_stays():
    def kinds(name: str) -> list[type]:
        with torch.device("meta"):
            return [type(module) for module in AlexNet(variant=name).features]

    norms = (nn.LocalResponseNorm, SpatialResponseNorm)
    assert kinds("alex2012-no-lrn") == [kind for kind in kinds("alex2012") if not issubclass(kind, norms)]
    assert kinds("alex2012-pool-2x2") == kinds("alex2012")
    pools = [layer.kernel_size for layer in VARIANTS["paper-pool-2x2"].features if hasattr(layer, "kernel_size")]
    assert pools == [2, 2, 2]


@pytest.mark.parametrize("name", ["paper-no-talk", "caffe-no-talk"])
def test_towers_that_never_talk_depend_on_their_own_half(name: str):
    net = AlexNet(10, variant=name).eval()
    x = torch.randn(2, 3, 80, 80)
    net.classifier[:-1](torch.flatten(net.avgpool(net.features(x)), 1))[:, :2048].sum().backward()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module is not net.classifier[-1]:
            own, other = module.weight.grad.chunk(2)
            assert own.abs().sum() > 0
            assert other.abs().sum() == 0


def test_a_grouped_linear_is_a_block_diagonal_one():
    layer = GroupedLinear(6, 4, groups=2)
    full = nn.Linear(6, 4)
    with torch.no_grad():
        full.weight.copy_(torch.block_diag(*layer.weight.chunk(2)))
        full.bias.copy_(layer.bias)
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), full(x))
    assert "groups=2" in repr(layer)
    with pytest.raises(ValueError, match="groups: expected a divisor of 6 and 4, got 3"):
        GroupedLinear(6, 4, groups=3)


@pytest.mark.parametrize(
    "name", ["paper-", "paper-no", "paper-no-talk-no-lrn", "torchvision-no-lrn", "owt-no-talk", "x"]
)
def test_other_names_are_unknown(name: str):
    assert name not in VARIANTS
    with pytest.raises(ValueError, match="variant: expected one of torchvision, "):
        AlexNet(variant=name)


def test_flags_are_suffixes_of_the_recipes_variant():
    given = without({"data": "/pictures", "out": "x", "recipe": "alex2012"}, ["no-lrn", "no-talk"])
    assert resolve(given, 10).variant == "alex2012-no-lrn-no-talk"
    assert resolve(given, 10).init_bias == (0, 1, 0, 1, 1, 1, 1, 0)
    for variant, ablation, had in (("torchvision", "no-lrn", "no LRN"), ("owt", "no-talk", "one tower")):
        with pytest.raises(InputError, match=f"--{ablation}: variant {variant} has {had} as it is"):
            without({"variant": variant}, [ablation])
