"""The nets that go by the name of AlexNet, layer by layer, as data. docs/models.md compares them.

Sources:

- the paper: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", 2012
- the 2012 code: github.com/computerhistory/AlexNet-Source-Code, layers/layers-145.cfg and layer-params-145.cfg
- Caffe: github.com/BVLC/caffe, models/bvlc_alexnet and models/bvlc_reference_caffenet
- cuda-convnet2: github.com/akrizhevsky/cuda-convnet2, layers/layers-imagenet-1gpu.cfg, the net of arXiv 1404.5997
- torchvision: torchvision.models.alexnet

LRN's alpha is torch's throughout, the coefficient of the window's mean square: size times the paper's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from alexnet_fast.geometry import out_side
from alexnet_fast.ops import LRN, Pool
from alexnet_fast.ops.arguments import integer


class Conv(NamedTuple):
    """A convolution. Weights start as N(0, std) and biases as ``bias``; as torch.nn makes them where std is None."""

    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    std: float | None = None
    bias: float = 0.0


class Relu(NamedTuple):
    pass


class SpatialLRN(NamedTuple):
    """Normalization over size x size pixels of one channel (:class:`alexnet_fast.nn.SpatialResponseNorm`)."""

    size: int
    alpha: float
    beta: float
    k: float


class ZeroPad(NamedTuple):
    """Zeros at the right and the bottom of the image."""

    pixels: int


class Linear(NamedTuple):
    """How a linear layer starts: weights N(0, std), biases ``bias``."""

    std: float
    bias: float


Layer = Conv | Relu | LRN | SpatialLRN | Pool | ZeroPad

RELU = Relu()
POOL = Pool(3, 2)
CEIL_POOL = Pool(3, 2, ceil_mode=True)  # Caffe and cuda-convnet round up; at 55, 27 and 13 that makes no difference
# cuda-convnet rounds the convolution's side up too, ceil((H - 11) / 4) + 1, reading zeros beyond the image. As
# ceil(n / 4) = floor((n + 3) / 4), that is three zeros at the right and the bottom: 224 becomes 227, and 227 gives 55.
CEIL_CONV1 = ZeroPad(3)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Older nets see 0..255 minus the training set's mean image; here its mean pixel, as Caffe publishes it.
PIXEL_MEAN, PIXEL_STD = (122.679 / 255, 116.669 / 255, 104.007 / 255), (1 / 255, 1 / 255, 1 / 255)


@dataclass(frozen=True)
class Variant:
    """One net: five convolutions and three max-pools in ``features``, then linear layers of 4096, 4096 and num_classes.

    ``mean`` and ``std`` normalize RGB images scaled to 0..1 as the net was trained: (image - mean) / std.
    """

    name: str
    description: str
    image_size: int  # the side it was made for, in pixels
    min_image_size: int = field(init=False)  # the smallest side that leaves a pixel after the last pooling
    features: tuple[Layer, ...] = field(repr=False)
    linear: tuple[Linear, Linear, Linear] | None = None  # None: as torch.nn makes them
    fc6: int = 4096  # outputs of the first linear layer
    fc7: int = 4096  # of the second
    linear_groups: int = 1  # parts of the first two linear layers that do not see each other
    dropout_first: bool = False  # dropout before the first two linear layers; otherwise after their ReLUs
    mean: tuple[float, float, float] = PIXEL_MEAN
    std: tuple[float, float, float] = PIXEL_STD

    def __post_init__(self) -> None:
        smallest = next(side for side in range(1, self.image_size + 1) if self.feature_side(side) > 0)
        object.__setattr__(self, "min_image_size", smallest)

    @property
    def init_std(self) -> tuple[float, ...] | None:
        """Deviations that conv1 to fc8 start with; None where torch.nn's own initialization is kept."""
        return tuple(start.std for start in self._starts()) if self.linear else None

    @property
    def init_bias(self) -> tuple[float, ...] | None:
        """Biases that conv1 to fc8 start with, likewise."""
        return tuple(float(start.bias) for start in self._starts()) if self.linear else None

    @property
    def convolutions(self) -> list[Conv]:
        return [layer for layer in self.features if isinstance(layer, Conv)]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of conv1 to conv5, outputs of fc6 and fc7."""
        return *(conv.channels for conv in self.convolutions), self.fc6, self.fc7

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many equal parts each of :attr:`widths` has to fall: groups of the layer, of the normalization
        after it, and of the layer that it goes into."""
        parts = [self.linear_groups]
        for layer in reversed(self.features):
            if isinstance(layer, Conv):
                parts += [math.lcm(parts.pop(), layer.groups), layer.groups]
            elif isinstance(layer, LRN):
                parts[-1] = math.lcm(parts[-1], layer.groups)
        return *parts[-2::-1], self.linear_groups, self.linear_groups

    @property
    def linear_sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Inputs and outputs of fc6 and of fc7."""
        side = self.feature_side(self.image_size)
        return (self.convolutions[-1].channels * side * side, self.fc6), (self.fc6, self.fc7)

    def resized(self, widths: Sequence[int]) -> Variant:
        """The net with other :attr:`widths`. Raises ValueError, from ``widths`` on, where there is no such."""
        names = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]
        if len(widths) != len(names):
            raise ValueError(f"widths: expected one for each of {', '.join(names)}, got {len(widths)}")
        for name, width, parts in zip(names, widths, self.parts, strict=True):
            if (count := integer(width)) is None or count < 1 or count % parts:
                of = f" of {parts}, its parts that do not see each other" if parts > 1 else ""
                raise ValueError(f"widths: {name}: expected a positive multiple{of}, got {width!r}")
        channels = iter(widths[:5])
        features = tuple(
            layer._replace(channels=next(channels)) if isinstance(layer, Conv) else layer for layer in self.features
        )
        return dataclasses.replace(self, features=features, fc6=widths[5], fc7=widths[6])

    def check_ranks(self, ranks: Sequence[int]) -> None:
        """Raises ValueError, from ``ranks`` on, for what cannot be the ranks of fc6 and fc7; 0 leaves a layer whole."""
        if len(ranks) != 2:
            raise ValueError(f"ranks: expected one for fc6 and one for fc7, got {len(ranks)}")
        if any(ranks) and self.linear_groups > 1:
            raise ValueError(f"ranks: the linear layers of {self.name} are split over towers")
        for name, sides, rank in zip(("fc6", "fc7"), self.linear_sides, ranks, strict=True):
            if (count := integer(rank)) is None or not 0 <= count <= min(sides):
                raise ValueError(f"ranks: {name} takes {sides[0]} to {sides[1]}, so 0 … {min(sides)}, got {rank!r}")

    def _starts(self) -> list[Conv | Linear]:
        return self.convolutions + list(self.linear or ())

    def feature_side(self, side: int) -> int:
        """The side of ``features``' output for images of ``side`` pixels; 0 where a window does not fit."""
        try:
            for layer in self.features:
                match layer:
                    case Conv():
                        side = out_side("image", side, layer.kernel, layer.stride, layer.padding)
                    case Pool():
                        side = out_side("image", side, layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode)
                    case ZeroPad():
                        side += layer.pixels
        except ValueError:
            return 0
        return side


_CAFFE_LRN = LRN(5, alpha=1e-4, beta=0.75, k=1.0)
_CUDA_CONVNET_LRN = LRN(5, alpha=1e-4, beta=0.75, k=2.0)

_WHOLE: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant(
            name="torchvision",
            description="torchvision.models.alexnet: one tower of fewer channels, no LRN",
            image_size=224,
            features=(
                *(Conv(64, 11, stride=4, padding=2), RELU, POOL),
                *(Conv(192, 5, padding=2), RELU, POOL),
                *(Conv(384, 3, padding=1), RELU),
                *(Conv(256, 3, padding=1), RELU),
                *(Conv(256, 3, padding=1), RELU, POOL),
            ),
            dropout_first=True,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
        Variant(
            name="paper",
            description="the text of 2012: two towers, each normalized by itself",
            image_size=224,
            # Padding 2 is the paper's 227: floor((224 + 4 - 11) / 4) + 1 = 55 windows reach over 2 + 224 + 1 pixels.
            features=(
                *(Conv(96, 11, stride=4, padding=2, std=0.01), RELU, LRN(5, 5e-4, 0.75, 2.0, groups=2), POOL),
                *(Conv(256, 5, padding=2, groups=2, std=0.01, bias=1), RELU, LRN(5, 5e-4, 0.75, 2.0, groups=2), POOL),
                *(Conv(384, 3, padding=1, std=0.01), RELU),
                *(Conv(384, 3, padding=1, groups=2, std=0.01, bias=1), RELU),
                *(Conv(256, 3, padding=1, groups=2, std=0.01, bias=1), RELU, POOL),
            ),
            linear=(Linear(0.01, 1), Linear(0.01, 1), Linear(0.01, 0)),
        ),
        Variant(
            name="alex2012",
            description="the code that won in 2012: two towers, pooling before ReLU in stage 1, two LRNs in stage 2",
            image_size=224,
            # Stage 5 pools before ReLU there. Maximum and ReLU commute, gradients too, and this order is one operator.
            features=(
                CEIL_CONV1,
                *(Conv(96, 11, stride=4, std=0.01), _CUDA_CONVNET_LRN._replace(groups=2), CEIL_POOL, RELU),
                *(Conv(256, 5, padding=2, groups=2, std=0.01, bias=1), RELU, _CUDA_CONVNET_LRN._replace(groups=2)),
                *(SpatialLRN(5, alpha=1e-3, beta=0.75, k=1.0), CEIL_POOL),
                *(Conv(384, 3, padding=1, std=0.03), RELU),
                *(Conv(384, 3, padding=1, groups=2, std=0.03, bias=1), RELU),
                *(Conv(256, 3, padding=1, groups=2, std=0.03, bias=1), RELU, CEIL_POOL),
            ),
            linear=(Linear(0.01, 1), Linear(0.01, 1), Linear(0.01, 0)),
        ),
        Variant(
            name="caffe",
            description="Caffe's bvlc_alexnet: grouped convolutions, LRN across the groups",
            image_size=227,
            features=(
                *(Conv(96, 11, stride=4, std=0.01), RELU, _CAFFE_LRN, CEIL_POOL),
                *(Conv(256, 5, padding=2, groups=2, std=0.01, bias=0.1), RELU, _CAFFE_LRN, CEIL_POOL),
                *(Conv(384, 3, padding=1, std=0.01), RELU),
                *(Conv(384, 3, padding=1, groups=2, std=0.01, bias=0.1), RELU),
                *(Conv(256, 3, padding=1, groups=2, std=0.01, bias=0.1), RELU, CEIL_POOL),
            ),
            linear=(Linear(0.005, 0.1), Linear(0.005, 0.1), Linear(0.01, 0)),
        ),
        Variant(
            name="caffenet",
            description="Caffe's bvlc_reference_caffenet: as caffe, with pooling before LRN",
            image_size=227,
            features=(
                *(Conv(96, 11, stride=4, std=0.01), RELU, CEIL_POOL, _CAFFE_LRN),
                *(Conv(256, 5, padding=2, groups=2, std=0.01, bias=1), RELU, CEIL_POOL, _CAFFE_LRN),
                *(Conv(384, 3, padding=1, std=0.01), RELU),
                *(Conv(384, 3, padding=1, groups=2, std=0.01, bias=1), RELU),
                *(Conv(256, 3, padding=1, groups=2, std=0.01, bias=1), RELU, CEIL_POOL),
            ),
            linear=(Linear(0.005, 1), Linear(0.005, 1), Linear(0.01, 0)),
        ),
        Variant(
            name="owt",
            description="cuda-convnet2's single tower, of One weird trick: torchvision's channels, with LRN",
            image_size=224,
            features=(
                CEIL_CONV1,
                *(Conv(64, 11, stride=4, std=0.01), _CUDA_CONVNET_LRN, CEIL_POOL, RELU),
                *(Conv(192, 5, padding=2, std=0.01, bias=1), RELU, _CUDA_CONVNET_LRN, CEIL_POOL),
                *(Conv(384, 3, padding=1, std=0.03), RELU),
                *(Conv(256, 3, padding=1, std=0.03, bias=1), RELU),
                *(Conv(256, 3, padding=1, std=0.03, bias=1), RELU, CEIL_POOL),
            ),
            linear=(Linear(0.01, 1), Linear(0.01, 1), Linear(0.01, -7)),
        ),
        Variant(
            name="keras",
            description="the form of Keras tutorials: one tower of all channels, no LRN, conv1 without padding",
            image_size=224,
            features=(
                *(Conv(96, 11, stride=4), RELU, POOL),
                *(Conv(256, 5, padding=2), RELU, POOL),
                *(Conv(384, 3, padding=1), RELU),
                *(Conv(384, 3, padding=1), RELU),
                *(Conv(256, 3, padding=1), RELU, POOL),
            ),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        ),
    )
}


def _without_lrn(net: Variant) -> Variant:
    kept = tuple(layer for layer in net.features if not isinstance(layer, (LRN, SpatialLRN)))
    return dataclasses.replace(net, features=kept)


def _with_2x2_pools(net: Variant) -> Variant:
    """Every stage's windows side by side. Where sides are rounded up they are 28, 14 and 7, and fc6 grows."""
    pools = (layer._replace(kernel_size=2) if isinstance(layer, Pool) else layer for layer in net.features)
    return dataclasses.replace(net, features=tuple(pools))


def _without_talk(net: Variant) -> Variant:
    """The net of the 2012 log, layers-150.cfg: no layer before fc8 sees the other tower. What that saves in parameters
    its author gave back as width: 320 channels in conv2, 8192 outputs of fc6.
    """
    features, convolutions = [], 0
    for layer in net.features:
        if isinstance(layer, Conv):
            convolutions += 1
            channels = 320 if convolutions == 2 else layer.channels
            layer = layer._replace(channels=channels, groups=1 if convolutions == 1 else 2)
        elif isinstance(layer, LRN):
            layer = layer._replace(groups=2)
        features.append(layer)
    return dataclasses.replace(net, features=tuple(features), fc6=8192, linear_groups=2)


# Parts that the 2012 logs left out of the net to see what they are worth, as suffixes of variants' names, in this
# order: layers-148 (no normalization), layers-147 (pooling that does not overlap), layers-150 (towers that never talk).
ABLATIONS: dict[str, Callable[[Variant], Variant]] = {
    "no-lrn": _without_lrn,
    "pool-2x2": _with_2x2_pools,
    "no-talk": _without_talk,
}


def ablations_of(net: Variant) -> list[str]:
    """The ablations that change ``net``."""
    changes = {
        "no-lrn": any(isinstance(layer, (LRN, SpatialLRN)) for layer in net.features),
        "pool-2x2": True,
        "no-talk": any(isinstance(layer, Conv) and layer.groups == 2 for layer in net.features),
    }
    return [name for name in ABLATIONS if changes[name]]


class _Variants(dict[str, Variant]):
    """Variants by name. Names with suffixes, such as ``paper-no-lrn-no-talk``, are found as well, but are not
    listed."""

    def __missing__(self, name: str) -> Variant:
        base, _, suffixes = name.partition("-")
        net = self.get(base)
        if net is None or not suffixes:
            raise KeyError(name)
        for suffix in ablations_of(net):
            if f"{suffixes}-".startswith(f"{suffix}-"):
                net, suffixes = ABLATIONS[suffix](net), suffixes[len(suffix) + 1 :]
        if suffixes:
            raise KeyError(name)
        return dataclasses.replace(net, name=name)

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        try:
            self[name]
        except KeyError:
            return False
        return True


VARIANTS = _Variants(_WHOLE)
