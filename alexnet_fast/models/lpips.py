"""LPIPS, the perceptual distance of Zhang, Isola, Efros, Shechtman and Wang (arXiv 1801.03924), on fused operators."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast import ops
from alexnet_fast.models import one_sided
from alexnet_fast.models.alexnet import _module
from alexnet_fast.models.variants import VARIANTS
from alexnet_fast.models.weights import AlexNet_Weights, Checkpoint, read
from alexnet_fast.nn import FusedSequential
from alexnet_fast.nn.fused import hooked
from alexnet_fast.ops.lpips_layer import accumulation
from alexnet_fast.reference.lpips_layer import squared_differences


class Fire(nn.Module):
    """SqueezeNet's module: 1x1 convolutions, whose outputs 1x1 and 3x3 ones see side by side."""

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.conv_relu(x, self.squeeze.weight, self.squeeze.bias)
        one = ops.conv_relu(x, self.expand1x1.weight, self.expand1x1.bias)
        return torch.cat([one, ops.conv_relu(x, self.expand3x3.weight, self.expand3x3.bias, padding=1)], 1)


def _alex() -> list[nn.Module]:
    layers = VARIANTS["torchvision"].features
    channels = [3, *(layer.channels for layer in layers if hasattr(layer, "channels"))]
    before = [sum(hasattr(layer, "channels") for layer in layers[:i]) for i in range(len(layers))]
    return [_module(layer, channels[count]) for layer, count in zip(layers, before, strict=True)]


def _vgg() -> list[nn.Module]:
    layers, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return layers


def _squeeze() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    first = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU(inplace=True), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool()]
    second = [Fire(128, 32, 128), Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192)]
    return [*first, *second, Fire(384, 64, 256), Fire(512, 64, 256)]


class _Backbone(NamedTuple):
    url: str  # of torchvision's weights
    layers: type
    ends: tuple[int, ...]  # each slice ends before this one of torchvision's features
    channels: tuple[int, ...]  # that slices give
    least: int  # pixels of an image's side


_HUB = "https://download.pytorch.org/models"
BACKBONES = {
    "alex": _Backbone(AlexNet_Weights.DEFAULT.url, _alex, (2, 5, 8, 10, 12), (64, 192, 384, 256, 256), 31),
    "vgg": _Backbone(f"{_HUB}/vgg16-397923af.pth", _vgg, (4, 9, 16, 23, 30), (64, 128, 256, 512, 512), 16),
    "squeeze": _Backbone(
        *(f"{_HUB}/squeezenet1_1-b8a52dc0.pth", _squeeze),
        *((2, 5, 8, 10, 11, 12, 13), (64, 128, 256, 384, 384, 512, 512), 17),
    ),
}
BACKBONES["vgg16"] = BACKBONES["vgg"]
VERSIONS = ("0.1", "0.0")


class Trunk(nn.Module):
    """The convolutional layers of a backbone in slices, each of which ends where LPIPS looks."""

    def __init__(self, net: str) -> None:
        super().__init__()
        layers, ends = BACKBONES[net].layers(), BACKBONES[net].ends
        for number, (first, past) in enumerate(pairwise((0, *ends)), 1):
            part = FusedSequential()
            for place in range(first, past):
                part.add_module(str(place), layers[place])
            self.add_module(f"slice{number}", part)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for part in self.children():
            x = part(x)
            features.append(x)
        return features

    def load(self, weights: Mapping[str, Tensor] | str | PathLike[str]) -> None:
        """Weights of torchvision's net: its state_dict, a file, a folder or a URL; its classifier is left aside."""
        own = isinstance(weights, Mapping)
        with _called("backbone"):
            name, state = ("the state_dict", weights) if own else read(weights)[:2]
        slices = {place: part for part, layers in self.named_children() for place in layers._modules}
        renamed = {}
        for key, tensor in state.items():
            top, _, rest = key.partition(".")
            place = rest.partition(".")[0]
            if top == "features" and place in slices:
                renamed[f"{slices[place]}.{rest}"] = tensor
        with _called("backbone"):
            Checkpoint(name, renamed, None).load_into(self)


@contextlib.contextmanager
def _called(argument: str) -> Iterator[None]:
    """What is said of ``weights`` is said of the argument by which they came."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        if not str(error).startswith("weights: "):
            raise
        raise type(error)(str(error).replace("weights:", f"{argument}:", 1)) from error


class Scaling(nn.Module):
    """From −1 … 1 to what the backbones were trained on: (x − shift) / scale."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.shift).div_(self.scale)


class Linear(nn.Module):
    """What each channel of a layer counts: a 1x1 convolution to one channel, with dropout before it in training."""

    def __init__(self, channels: int, use_dropout: bool) -> None:
        super().__init__()
        dropout = [nn.Dropout()] if use_dropout else []
        self.model = nn.Sequential(*dropout, nn.Conv2d(channels, 1, 1, bias=False))

    @property
    def weight(self) -> Tensor:
        return self.model[-1].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LPIPS(nn.Module):
    """The perceptual distance of two images, in place of ``lpips.LPIPS``: same arguments, state_dict keys and numbers
    within rounding::

        distance = LPIPS(net="alex")
        distance(first, second)  # (N, 1, 1, 1), of images in −1 … 1

    Both images go through the backbone as one batch, in fused stages, and each layer ends in one operator
    (:func:`alexnet_fast.ops.lpips_layer`), whose gradient is 0 where a pixel has no features, as is that of zeros. As a
    loss, with the backbone frozen and a gradient wanted of one image, that one alone goes back.
    16-bit features are compared in float32, so autocast and bfloat16 give finite distances.

    Args:
        pretrained: read the weights of the linear layers; otherwise they are random.
        net: the backbone, ``alex``, ``vgg`` or ``squeeze``.
        version: of the linear weights, ``0.1`` or ``0.0``, which does not scale its images.
        lpips: weigh channels; otherwise all count 1.
        spatial: a distance for each pixel, of the images' size, instead of their mean.
        pnet_rand: leave the backbone's weights random.
        pnet_tune: let the backbone be trained.
        use_dropout: dropout before the linear layers, while they are trained.
        model_path: a file of linear weights; that of the installed package ``lpips`` if None.
        eval_mode: start in evaluation mode.
        verbose: print where weights come from.
        backbone: the backbone's weights: a state_dict of torchvision's net, the path of its file, or a URL;
            torchvision's own if None, downloaded once.

    Raises:
        ValueError: an argument is wrong, or weights do not fit; the message names it.
        OSError: a file of weights is missing.
    """

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        lpips: bool = True,
        spatial: bool = False,
        pnet_rand: bool = False,
        pnet_tune: bool = False,
        use_dropout: bool = True,
        model_path: str | PathLike[str] | None = None,
        eval_mode: bool = True,
        verbose: bool = True,
        *,
        backbone: Mapping[str, Tensor] | str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"net: expected one of {', '.join(BACKBONES)}, got {net!r}")
        if version not in VERSIONS:
            raise ValueError(f"version: expected one of {', '.join(VERSIONS)}, got {version!r}")
        self.pnet_type, self.pnet_rand, self.pnet_tune = net, pnet_rand, pnet_tune
        self.version, self.lpips, self.spatial = version, lpips, spatial
        self.chns = list(BACKBONES[net].channels)
        self.L = len(self.chns)
        self.scaling_layer = Scaling()
        self.net = Trunk(net)
        if backbone is not None or not pnet_rand:
            self.net.load(BACKBONES[net].url if backbone is None else backbone)
        self.net.requires_grad_(pnet_tune)
        if lpips:
            self.lins = nn.ModuleList(Linear(channels, use_dropout) for channels in self.chns)
            for number, linear in enumerate(self.lins):
                self.add_module(f"lin{number}", linear)
            if pretrained:
                path = _installed(net, version) if model_path is None else Path(model_path)
                self._load_linear(path)
                if verbose:
                    print(f"LPIPS: {net}, version {version}, linear weights from {path}")
        if eval_mode:
            self.eval()

    def _load_linear(self, path: Path) -> None:
        """The linear weights of a file that lpips wrote; other weights in it are taken too, as lpips does."""
        if not path.is_file():
            raise FileNotFoundError(f"model_path: no file {path}")
        with _called("model_path"):
            state = dict(read(path).state)
        for number, linear in enumerate(self.lins):
            keys = [f"lin{number}.model.{place}.weight" for place in (1, 0)]  # with dropout, and without
            weight = next((state.pop(key) for key in keys if key in state), None)
            if weight is None or weight.shape != linear.weight.shape:
                found = "none" if weight is None else tuple(weight.shape)
                raise ValueError(
                    f"model_path: expected linear weights for net {self.pnet_type!r} in {path}, "
                    f"{keys[0]} of shape {tuple(linear.weight.shape)}, got {found}"
                )
            with torch.no_grad():
                linear.weight.copy_(weight)
        self.load_state_dict({key: t for key, t in state.items() if key.startswith("net.")}, strict=False)

    def forward(
        self, in0: Tensor, in1: Tensor, retPerLayer: bool = False, normalize: bool = False
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The distances of N pairs of images, (N, 1, 1, 1), or (N, 1, H, W) if ``spatial``.

        Args:
            in0, in1: (N, 3, H, W) or (3, H, W); one image is compared with each of many, and one channel stands for
                three.
            retPerLayer: also return each layer's share, in a list.
            normalize: images are in 0 … 1, not in −1 … 1.

        Raises:
            TypeError: an image is no tensor.
            ValueError: images are of other shapes, or smaller than the backbone's layers allow.
        """
        shares = self._shares(*self._pair(in0, in1), normalize)
        if self.spatial:
            size = in0.shape[-2:]
            shares = [F.interpolate(share, size, mode="bilinear", align_corners=False) for share in shares]
        total = sum(shares[1:], shares[0])
        return (total, shares) if retPerLayer else total

    def _pair(self, in0: Tensor, in1: Tensor) -> tuple[Tensor, Tensor]:
        """The images, equally many."""
        least = BACKBONES[self.pnet_type].least
        for name, image in (("in0", in0), ("in1", in1)):
            if not isinstance(image, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(image).__name__}")
            if image.dim() not in (3, 4) or image.shape[-3] not in (1, 3):
                raise ValueError(f"{name}: expected (N, 3, H, W), got shape {tuple(image.shape)}")
            if min(image.shape[-2:]) < least:
                raise ValueError(
                    f"{name}: net {self.pnet_type!r} compares images of at least {least}x{least} pixels, "
                    f"got {image.shape[-2]}x{image.shape[-1]}"
                )
        try:
            first, second = (image if image.dim() == 4 else image[None] for image in (in0, in1))
            if first.shape != second.shape:
                first, second = torch.broadcast_tensors(first, second)
        except RuntimeError:
            shapes = tuple(in0.shape), tuple(in1.shape)
            raise ValueError(f"in1: expected in0's shape {shapes[0]}, got {shapes[1]}") from None
        return first, second

    def _shares(self, first: Tensor, second: Tensor, normalize: bool) -> list[Tensor]:
        """What each layer adds to the distances. These are the same with the images exchanged."""
        if second.requires_grad and not first.requires_grad:
            first, second = second, first
        operators = one_sided.families(first, second)
        dropout = self.lpips and self.training and len(self.lins[0].model) > 1
        layers = None if operators is None or dropout else one_sided.layers_of(self.net)
        if layers is None or hooked(self.scaling_layer):
            return self._by_autograd(first, second, normalize)
        dtype = accumulation(layers[0].conv.weight.dtype)
        if self.lpips:
            weights = [linear.weight.flatten().to(dtype) for linear in self.lins]
        else:
            weights = [first.new_ones(channels, dtype=dtype) for channels in self.chns]

        def scaled(*images: Tensor) -> Tensor:
            return self._scaled(torch.cat(images), normalize)

        def unscaled(dx: Tensor, image: Tensor) -> Tensor:
            dx = dx / self.scaling_layer.scale if self.version == "0.1" else dx
            return (2 * dx if normalize else dx).sum_to_size(image.shape).to(image.dtype)

        call = one_sided.Call(self.net, layers, operators, scaled, unscaled, self.spatial)
        return list(one_sided.Shares.apply(call, first, second, *weights))

    def _scaled(self, images: Tensor, normalize: bool) -> Tensor:
        images = 2 * images - 1 if normalize else images
        return self.scaling_layer(images) if self.version == "0.1" else images

    def _by_autograd(self, first: Tensor, second: Tensor, normalize: bool) -> list[Tensor]:
        one_gradient = torch.is_grad_enabled() and first.requires_grad and not second.requires_grad
        if one_gradient and not any(parameter.requires_grad for parameter in self.net.parameters()):
            with torch.no_grad():
                others = self.net(self._scaled(second, normalize))
            own = self.net(self._scaled(first, normalize))
            features = [torch.cat(both) for both in zip(own, others, strict=True)]
        else:
            features = self.net(self._scaled(torch.cat([first, second]), normalize))
        return [self._share(layer, x) for layer, x in enumerate(features)]

    def _share(self, layer: int, features: Tensor) -> Tensor:
        if not self.lpips:
            return ops.lpips_layer(features, features.new_ones(features.shape[1]), self.spatial)
        linear = self.lins[layer]
        if self.training and len(linear.model) > 1:  # dropout draws for each channel of each pixel
            share = linear(squared_differences(features))
            return share if self.spatial else share.mean((2, 3), keepdim=True)
        return ops.lpips_layer(features, linear.weight.flatten(), self.spatial)


def _installed(net: str, version: str) -> Path:
    """The package lpips's file of linear weights; the package itself, which needs torchvision, is not imported."""
    found = importlib.util.find_spec("lpips")
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "model_path: the linear weights come from the package lpips, which is not installed: "
            "pip install --no-deps lpips, or name a file of them"
        )
    return Path(found.origin).parent / "weights" / f"v{version}" / f"{net.removesuffix('16')}.pth"
