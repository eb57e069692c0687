"""AlexNet: torchvision's module by default, and its other variants."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from os import PathLike
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from alexnet_fast.models.features import fully_convolutional
from alexnet_fast.models.registration import register_with_torchvision
from alexnet_fast.models.variants import VARIANTS, Conv, Layer, Relu, SpatialLRN, ZeroPad
from alexnet_fast.models.weights import AlexNet_Weights, read
from alexnet_fast.nn import FusedSequential, GroupedLinear, GroupedLocalResponseNorm, SpatialResponseNorm
from alexnet_fast.nn.fused import Whole, pools_nothing
from alexnet_fast.ops import LRN, Pool
from alexnet_fast.ops.arguments import integer


def _module(layer: Layer, channels: int) -> nn.Module:
    """The module of ``layer`` on an input of so many channels."""
    match layer:
        case Conv():
            return nn.Conv2d(
                channels, layer.channels, layer.kernel, layer.stride, padding=layer.padding, groups=layer.groups
            )
        case Relu():
            return nn.ReLU(inplace=True)
        case LRN(groups=1):
            return nn.LocalResponseNorm(*layer[:-1])
        case LRN():
            return GroupedLocalResponseNorm(*layer)
        case SpatialLRN():
            return SpatialResponseNorm(*layer)
        case Pool():
            return nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding, ceil_mode=layer.ceil_mode)
        case ZeroPad():
            return nn.ZeroPad2d((0, layer.pixels, 0, layer.pixels))


def _linear(inputs: int, outputs: int, groups: int, rank: int) -> list[nn.Module]:
    if rank:
        return [nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)]
    return [nn.Linear(inputs, outputs) if groups == 1 else GroupedLinear(inputs, outputs, groups)]


class AlexNet(nn.Module):
    """AlexNet, called and built as ``torchvision.models.AlexNet``: same modules, state_dict keys and initial weights.

    Args:
        num_classes: outputs of the last layer.
        dropout: probability of zeroing an input (an output, in variants other than torchvision) of fc6 and fc7.
        variant: a name in :data:`alexnet_fast.models.VARIANTS`, where suffixes take something away, as in
            ``paper-no-lrn``, ``paper-pool-2x2``, ``alex2012-no-talk``. Those that state an initialization start from
            it.
        widths: channels of conv1 … conv5 and outputs of fc6 and fc7, where they are not the variant's.
        ranks: ranks of fc6 and fc7. A layer of rank r is two: the first has r outputs and no bias, the second the
            layer's own outputs and bias. With 0 it is a single layer.

    ``features`` and ``classifier`` are of class :class:`alexnet_fast.FusedSequential`. ``avgpool`` brings the output of
    ``features`` to the side that fc6 expects, 6 pixels (keras: 5). At the variant's own image size it changes nothing;
    it lets every variant take other sizes.

    Shape: (N, 3, H, W) to (N, num_classes); H and W at least ``variant.min_image_size``. Images may come folded for the
    first convolution (:func:`alexnet_fast.ops.augment`).

    Raises:
        ValueError: an argument is wrong, or an image has another number of channels or is too small.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        *,
        variant: str = "torchvision",
        widths: Sequence[int] | None = None,
        ranks: Sequence[int] = (0, 0),
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
        if (count := integer(num_classes)) is None or count < 1:
            raise ValueError(f"num_classes: expected a positive int, got {num_classes!r}")
        self.variant = VARIANTS[variant] if widths is None else VARIANTS[variant].resized(widths)
        self.variant.check_ranks(ranks)
        layers, channels = [], 3
        for layer in self.variant.features:
            layers.append(_module(layer, channels))
            channels = layer.channels if isinstance(layer, Conv) else channels
        self.features = FusedSequential(*layers)
        side = self.variant.feature_side(self.variant.image_size)
        self.avgpool = nn.AdaptiveAvgPool2d((side, side))
        sides = self.variant.linear_sides
        fc6, fc7 = (_linear(*io, self.variant.linear_groups, rank) for io, rank in zip(sides, ranks, strict=True))
        fc8 = nn.Linear(self.variant.fc7, num_classes)
        drop6, drop7 = nn.Dropout(p=dropout), nn.Dropout(p=dropout)
        relu6, relu7 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        if self.variant.dropout_first:
            self.classifier = FusedSequential(drop6, *fc6, relu6, drop7, *fc7, relu7, fc8)
        else:
            self.classifier = FusedSequential(*fc6, relu6, drop6, *fc7, relu7, drop7, fc8)
        self._initialize()

    def _initialize(self) -> None:
        modules = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None]
        starts = self.variant.convolutions + list(self.variant.linear or ())
        for module, start in zip(modules, starts, strict=False):
            if start.std is not None:
                nn.init.normal_(module.weight, 0.0, start.std)
                nn.init.constant_(module.bias, start.bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        else:  # noqa: RET505  TorchScript leaves out this branch, but nothing that would follow it
            return self._run(x)

    _whole = None  # of a packed net: what it is as one recording

    def _record_as_one(self) -> None:
        self.__dict__["_whole"] = Whole(self._modules, "features", "avgpool", "classifier")

    @torch.jit.unused
    def _run(self, x: Tensor) -> Tensor:
        try:
            if self._whole is not None and not is_dynamo_compiling() and (y := self._whole(x)) is not None:
                return y
            x_pooled = self.features(x)
            if not pools_nothing(self.avgpool, x_pooled):
                x_pooled = self.avgpool(x_pooled)
            return self.classifier(torch.flatten(x_pooled, 1))
        except (RuntimeError, ValueError) as error:
            if isinstance(x, Tensor) and (reason := self._refusal(x)):
                raise ValueError(reason) from error
            raise

    def fully_convolutional(self) -> nn.Sequential:
        """See :func:`alexnet_fast.models.features.fully_convolutional`."""
        return fully_convolutional(self)

    def _refusal(self, x: Tensor) -> str:
        """Why the net cannot take image ``x``; '' if it can. Also '' where ``features`` is not as it was built: users
        put modules of their own there, and those know best what they take."""
        layers, modules = self.variant.features, list(self.features)
        built = [_module(layer, 1).__dict__ for layer in layers if not isinstance(layer, Conv)]
        geometry = [(layer.kernel, layer.stride, layer.padding) for layer in layers if isinstance(layer, Conv)]
        convolutions = [module for module in modules if type(module) is nn.Conv2d]
        windows = [m.__dict__ for m in modules if type(m) is nn.MaxPool2d]
        asked = [own for own in built if "ceil_mode" in own]
        sides = ("kernel_size", "stride", "padding", "ceil_mode")
        if (
            len(modules) != len(layers)
            or [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions] != geometry
            or [[own[name] for name in sides] for own in windows] != [[own[name] for name in sides] for own in asked]
        ):
            return ""
        channels = convolutions[0].in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            return f"input: expected (N, {channels}, H, W), got shape {tuple(x.shape)}"
        least = self.variant.min_image_size
        if x.shape[2] < least or x.shape[3] < least:
            return (
                f"input: variant {self.variant.name!r} takes images of at least {least}x{least} pixels, "
                f"got {x.shape[2]}x{x.shape[3]}"
            )
        return ""


def alexnet(
    weights: AlexNet_Weights | str | PathLike[str] | None = None,
    progress: bool = True,
    *,
    num_classes: int | None = None,
    variant: str | None = None,
    replace_head: bool = False,
    freeze_features: bool = False,
    **kwargs: Any,
) -> AlexNet:
    """An :class:`AlexNet`, with trained weights if ``weights`` names some::

        alexnet(weights="DEFAULT")                                                           # 1000 ImageNet classes
        alexnet(weights="DEFAULT", num_classes=10, replace_head=True, freeze_features=True)  # transfer learning

    Args:
        weights: a member of :class:`AlexNet_Weights` or torchvision's enum of that name, or its name; the path of a
            file of safetensors or of torch.save, whatever its name, or of a folder with ``model.safetensors`` or
            ``pytorch_model.bin``; or an http, https or file URL of such a file, kept in torch.hub's cache and checked
            where its name ends in a hash as torch.hub's do. A state_dict may be inside what training scripts write
            around it, such as ``{"state_dict": …}``, and its keys may have the prefixes of wrappers, such as
            ``module.``: a warning says what was taken off.
        progress: show the download's progress.
        num_classes: outputs of the last layer; those of the weights if not given, or 1000.
        variant: the net's variant; the one that the weights name if not given, or torchvision.
        replace_head: leave out the weights' last layer: the net's own, new one, has ``num_classes`` outputs.
        freeze_features: ``requires_grad=False`` for all of ``features``.
        kwargs: passed on to :class:`AlexNet`; and ``pretrained``, as torchvision called ``weights`` before 0.13.

    Raises:
        ValueError: the weights are no state_dict or do not fit, with the keys and shapes that differ; ``num_classes``
            is not the weights' and ``replace_head`` is not set; ``variant`` is not the one that they name.
        OSError: there is no such file, or it cannot be downloaded.
    """
    if isinstance(weights, bool) or (weights is None and "pretrained" in kwargs):
        pretrained = kwargs.pop("pretrained", weights)
        weights = AlexNet_Weights.DEFAULT if pretrained else None
        warnings.warn(f"pretrained: deprecated, and read as weights={weights}", stacklevel=2)
    if weights is None:
        if replace_head:
            raise ValueError("replace_head: without weights there is no head to replace")
        model = AlexNet(1000 if num_classes is None else num_classes, variant=variant or "torchvision", **kwargs)
    else:
        checkpoint = read(weights, progress)
        if variant is None:
            variant = checkpoint.variant or "torchvision"
        elif checkpoint.variant not in (None, variant):
            raise ValueError(f"variant: {checkpoint.name} is for {checkpoint.variant!r}, got {variant!r}")
        stored = checkpoint.classes or 1000
        if num_classes is None:
            num_classes = stored
        elif num_classes != stored and not replace_head:
            raise ValueError(
                f"num_classes: {checkpoint.name} has {stored} outputs, got {num_classes}; "
                "replace_head=True gives the net a new last layer"
            )
        model = AlexNet(num_classes, variant=variant, **kwargs)
        checkpoint.load_into(model, without=checkpoint.head if replace_head else None)
    if freeze_features:
        model.features.requires_grad_(False)
    return model


class _Page(ModuleType):
    """This module, which can be called as the function that it holds: as in torchvision,
    ``alexnet_fast.models.alexnet`` is the name of both."""

    def __call__(self, *args: Any, **kwargs: Any) -> AlexNet:
        return alexnet(*args, **kwargs)


sys.modules[__name__].__class__ = _Page
register_with_torchvision(alexnet)
