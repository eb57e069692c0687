"""The net a run starts from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from alexnet_fast.data.random import mix
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.alexnet import alexnet
from alexnet_fast.models.variants import Variant
from alexnet_fast.models.weights import read
from alexnet_fast.nn import weight_only_int8
from alexnet_fast.train.config import TrainConfig, check_choices, variant_of

MOST_WIDTH = 8  # times the variant's


def build_model(config: TrainConfig) -> nn.Module:
    """AlexNet as ``config`` says, on the CPU; the same weights for the same seed on every rank.

    Pretrained weights keep their last layer if it has ``num_classes`` outputs, and get a new one otherwise. Raises
    :class:`InputError` for weights that are missing or do not fit.
    """
    torch.manual_seed(mix(config.seed) >> 1)
    net = {"num_classes": config.num_classes, "dropout": config.dropout, "variant": config.variant}
    net |= {"widths": config.widths, "ranks": config.ranks}
    if config.weights is None:
        model = alexnet(**net, freeze_features=config.freeze_features)
        if config.init == "kaiming":
            kaiming(model)
        _start(model, config)
        return weight_only_int8(model) if config.quantization == "int8_weight_only" else model
    try:
        new_head = read(config.weights).classes != config.num_classes
        return alexnet(weights=config.weights, replace_head=new_head, freeze_features=config.freeze_features, **net)
    except (ValueError, OSError) as error:
        raise InputError("--" + " ".join(str(error).split())) from None


def widths_of(variant: Variant, prune: float, width: float) -> list[int]:
    """How many channels and outputs stay, equally many in each of a layer's parts and one at least."""
    factors = [width * (1 - prune)] * 5 + [width] * 2
    pairs = zip(variant.widths, variant.parts, factors, strict=True)
    return [max(1, round(factor * now / parts)) * parts for now, parts, factor in pairs]


def scaled(given: dict[str, Any], width: float) -> dict[str, Any]:
    """``given`` with the widths of its variant multiplied by ``width``; raises :class:`InputError`."""
    if not 0 < width <= MOST_WIDTH:
        raise InputError(f"--width: expected a factor above 0, at most {MOST_WIDTH}, got {width:g}")
    if "widths" in given:
        raise InputError("--width: --config states widths already")
    check_choices(given)
    return {**given, "widths": tuple(widths_of(VARIANTS[variant_of(given)], 0, width))}


def skeleton(config: TrainConfig, build: Callable[[TrainConfig], nn.Module] = build_model) -> nn.Module:
    """The net of ``config`` as names, shapes and dtypes, without memory for its numbers."""
    with torch.device("meta"), _Unfilled():
        return build(dataclasses.replace(config, weights=None))


class _Unfilled(TorchFunctionMode):
    """Initializations do nothing: there is nothing to fill, and on the meta device drawing imports torch's compiler."""

    FILLING = ("normal_", "uniform_", "zeros_", "zero_", "constant_", "fill_")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__.endswith(self.FILLING):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def kaiming(model: nn.Module) -> None:
    """Weights N(0, 2 / fan-in) ahead of ReLUs (He et al., arXiv 1502.01852), N(0, 0.01) in the last layer, biases 0.

    The last layer is small so that the first loss is ln(classes): no class is favoured before anything is learnt.
    """
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    nn.init.normal_(layers[-1].weight, 0.0, 0.01)


def _start(model: nn.Module, config: TrainConfig) -> None:
    """Draws again the weights, and sets the biases, that ``config`` wants otherwise than they are now."""
    variant = VARIANTS[config.variant]
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None]
    if config.init_std not in (None, variant.init_std):
        for layer, std in zip(layers, config.init_std, strict=True):
            nn.init.normal_(layer.weight, 0.0, std)
    for layer, bias in zip(layers, config.init_bias or (), strict=False):
        nn.init.constant_(layer.bias, bias)
