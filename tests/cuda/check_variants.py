"""Trains every variant's convolutional part for a step on the CUDA kernels: for the process that bindings.run starts.

The nets are AlexNet's own modules, with a quarter of the channels, on the smallest images that they take.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

from alexnet_fast import backend
from alexnet_fast.models import AlexNet
from alexnet_fast.models.variants import VARIANTS, Conv

from ..ops.calls import Calls
from . import bindings


def features(name: str) -> tuple[nn.Module, int]:
    """The net's features, initialized so that activations keep their size, and the side of its images."""
    whole = VARIANTS[name]
    layers = [x._replace(channels=x.channels // 4) if isinstance(x, Conv) else x for x in whole.features]
    small = replace(whole, features=tuple(layers))
    with mock.patch.dict(VARIANTS, {name: small}), torch.device("meta"):
        net = AlexNet(variant=name).features
    net = net.to_empty(device="cpu")
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.normal_(module.bias)
    return net, small.min_image_size


def step(net: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The net's output, and the gradients of its parameters."""
    y = net(x)
    names, parameters = zip(*net.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, parameters, dy)
    return dict(zip(("output", *names), (y.detach(), *grads), strict=True))


def error(actual: Tensor, exact: Tensor) -> float:
    """The relative error in the Euclidean norm: where 16-bit numbers round to the same value, another of them may win a
    maximum."""
    return ((actual.double() - exact).norm() / exact.norm()).item()


def check(name: str, dtype: torch.dtype, form: torch.memory_format) -> set[str]:
    torch.manual_seed(0)
    net, side = features(name)
    net = net.to(dtype=dtype, memory_format=form)
    x = (30 * torch.randn(2, 3, side, side)).to(dtype=dtype, memory_format=form)  # LRN's sums then count beside its k
    exact_net = copy.deepcopy(net).double()
    with backend("reference"):
        dy = torch.randn_like(net(x))
        exact, peer = step(exact_net, x.double(), dy.double()), step(net, x, dy)
    with Calls() as mode:
        actual = step(net, x, dy)
    for key, value in exact.items():
        assert actual[key].dtype == peer[key].dtype, f"{name}, {key}: {actual[key].dtype}"
        found, allowed = error(actual[key], value), 2 * error(peer[key], value) + torch.finfo(dtype).eps
        assert found <= allowed, f"{name}, {dtype}, {key}: errs by {found:.3g}, the reference by {allowed / 2:.3g}"
    return {func.name().removeprefix("alexnet_fast::") for func, _ in mode.calls}


def main() -> None:
    bindings.take_over(sys.argv[1])
    forms = (torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format)
    for number, name in enumerate(VARIANTS):
        print(name, *sorted(check(name, *forms[number % 2])))


if __name__ == "__main__":
    main()
