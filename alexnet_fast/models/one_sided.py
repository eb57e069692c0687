"""LPIPS as a loss: the backbone is frozen, and of the two images one alone wants a gradient.

Autograd would take the batch of both images back through the net, and keep for that what each operator reads. Of a
frozen net backward reads weights, pooling's codes and the ReLUs' masks; the masks are the signs of the features, which
the layers' ends keep anyway, and the codes come from the features in a second pass of pooling. So features are all that
is kept, they go layer by layer, and one image goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from alexnet_fast import ops
from alexnet_fast.backends import choose
from alexnet_fast.geometry import Pool
from alexnet_fast.nn.fused import _kind, _looked_at, _one_by_one, hooked
from alexnet_fast.ops.arguments import pool_window
from alexnet_fast.ops.registry import Family, empty, family
from alexnet_fast.ops.run import keeps_graph, saving_hooks

STEMS = "conv_relu", "max_pool", "lpips_layer"


class Layer(NamedTuple):
    """A convolution with its ReLU, and the pool before it."""

    pool: nn.MaxPool2d | None
    conv: nn.Conv2d


def layers_of(trunk: nn.Module) -> list[Layer] | None:
    """The layers of a frozen trunk; None if its slices are made of anything else, or anybody looks into them."""
    found = []
    for part in trunk.children():
        modules = list(part.children())
        kinds = "".join(map(_kind, modules))
        if kinds not in ("cr", "pcr") or hooked(part) or not isinstance(modules[-2].padding, tuple):
            return None
        found.append(Layer(modules[0] if kinds == "pcr" else None, modules[-2]))
    frozen = not any(parameter.requires_grad for layer in found for parameter in layer.conv.parameters())
    return found if frozen and not hooked(trunk) else None


def folds(conv: nn.Conv2d) -> bool:
    """Whether :func:`by_folding` is for it: AlexNet's first, on a CPU. There oneDNN's gradient of three channels with a
    stride takes four times as long a product as its other convolutions."""
    same = conv.stride[0] == conv.stride[1] and conv.padding[0] == conv.padding[1]
    return same and conv.stride[0] > 1 and conv.dilation == (1, 1) and conv.groups == 1 and conv.weight.is_cpu


def by_folding(dz: Tensor, conv: nn.Conv2d, sides: Sequence[int]) -> Tensor:
    """The gradient by a convolution's input of ``sides`` pixels, where its stride s is over 1: an image of s·s times
    the channels, its pixels s apart, is a convolution of ``dz`` with stride 1, by every s-th weight, turned around."""
    step, channels = conv.stride[0], conv.in_channels
    rows, columns = (-(-side // step) for side in conv.kernel_size)
    weight = F.pad(conv.weight, (0, columns * step - conv.kernel_size[1], 0, rows * step - conv.kernel_size[0]))
    weight = weight.unflatten(2, (rows, step)).unflatten(4, (columns, step)).flip(2, 4)  # (K, C, rows, s, columns, s)
    weight = weight.permute(1, 3, 5, 0, 2, 4).reshape(channels * step**2, len(conv.weight), rows, columns)
    image = F.pixel_shuffle(F.conv2d(dz, weight, padding=(rows - 1, columns - 1)), step)
    # What padding saw goes, and what no window reached has no gradient.
    top, left = conv.padding
    below, right = (side + pad - has for side, pad, has in zip(sides, conv.padding, image.shape[2:], strict=True))
    return F.pad(image, (-left, right, -top, below))


def families(first: Tensor, second: Tensor) -> dict[str, Family] | None:
    """Whose operators run, by stem; None where gradients are not wanted of ``first`` alone, or not to be computed by
    operators."""
    if (
        torch.compiler.is_compiling()
        or not (torch.is_grad_enabled() and first.requires_grad and not second.requires_grad)
        or _looked_at()
        or _one_by_one()
        or saving_hooks(True) is not None
    ):
        return None
    chosen = {stem: choose(stem, first, None) for stem in STEMS}
    return None if "reference" in chosen.values() else {stem: family(name) for stem, name in chosen.items()}


class Call(NamedTuple):
    """Of a distance, all but the images and the weights of channels."""

    trunk: nn.Module
    layers: list[Layer]  # the trunk's
    families: dict[str, Family]
    scaled: Callable[[Tensor, Tensor], Tensor]  # both images as one batch, as the trunk takes them
    unscaled: Callable[[Tensor, Tensor], Tensor]  # an image's gradient, of that by what the trunk takes
    spatial: bool


class Shares(Function):
    """The layers' shares of the distances."""

    @staticmethod
    def forward(ctx, call: Call, first: Tensor, second: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x = call.scaled(first, second)
        ctx.call, ctx.sides, ctx.features = call, x.shape[2:], []
        for part in call.trunk.children():
            x = part(x)
            ctx.features.append(x)
        # The convolutions' weights too, so that torch notices where one has changed before backward.
        ctx.save_for_backward(first, second, *weights, *[layer.conv.weight for layer in call.layers])
        end = call.families["lpips_layer"].lpips_layer
        return tuple(end(x, weight, call.spatial) for x, weight in zip(ctx.features, weights, strict=True))

    @staticmethod
    def backward(ctx, *dy: Tensor) -> tuple[Tensor | None, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[3:]
        first, second, *weights = ctx.saved_tensors[: -len(call.layers)]
        if torch.is_grad_enabled():
            inputs = [first, *(weight for weight, want in zip(weights, wanted, strict=True) if want)]
            pairs = zip(call.trunk(call.scaled(first, second)), weights, strict=True)
            shares = [ops.lpips_layer(x, weight, call.spatial) for x, weight in pairs]
            found = iter(torch.autograd.grad(shares, inputs, dy, create_graph=True))
            return None, next(found), None, *(next(found) if want else None for want in wanted)
        pairs, features = len(first), list(ctx.features) if keeps_graph() else ctx.features
        dweights: list[Tensor | None] = [None] * len(weights)
        above: Tensor | None = None  # the gradient by this layer's output, of the layers above it
        while features:
            x, number = features.pop(), len(features)
            pool, conv = call.layers[number]
            end = call.families["lpips_layer"].lpips_layer_backward
            dx, dweight = end(dy[number], x, weights[number], call.spatial, wanted[number])
            if wanted[number]:
                dweights[number] = dweight
            dx, y = dx[:pairs], x[:pairs]
            if above is not None:
                dx += above
            below = features[-1][:pairs] if features else None
            sides = ctx.sides if below is None else below.shape[2:]
            if pool is not None:
                options = Pool(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode)
                window = pool_window(options, conv.in_channels, *sides)
                sides = window.out(*sides)
            if folds(conv):
                dz = torch.ops.aten.threshold_backward(dx, y, 0)
                del x, y, dx
                above = by_folding(dz, conv, sides)
                del dz
            else:
                # Of its input a convolution reads the shape alone, where the weight wants no gradient.
                unread = empty(x, (pairs, conv.in_channels, *sides))
                geometry = conv.stride, conv.padding, conv.dilation, conv.groups
                backward = call.families["conv_relu"].conv_relu_backward
                above = backward(dx, unread, conv.weight, y, *geometry, [True, False, False])[0]
                del x, y, dx, unread
            if pool is not None:
                code = call.families["max_pool"].max_pool(below, *window, True)[1]
                backward = call.families["max_pool"].max_pool_backward
                above = backward(above, code, *below.shape[2:], *window[:3])
        return None, call.unscaled(above, first), None, *dweights
