"""LPIPS as a loss: the backbone is frozen, and of the two images one alone wants a gradient.

Autograd would take the batch of both images back through the net, and keep for that what each operator reads. Of a
frozen net backward reads weights, pooling's codes and the ReLUs' masks; the masks are the signs of the features, which
the layers' ends keep anyway. So features and codes, of a byte each, are all that is kept, they go layer by layer, and
one image goes back.
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
from alexnet_fast.geometry import Pool, Window
from alexnet_fast.nn.fused import _kind, _looked_at, _one_by_one, hooked
from alexnet_fast.ops.arguments import pool_window
from alexnet_fast.ops.registry import Family, empty, family
from alexnet_fast.ops.run import keeps_graph, saving_hooks

STEMS = "conv_relu", "max_pool", "lpips_layer"
# From so many pixels an image on, oneDNN's convolutions are the faster in channels_last.
MANY_PIXELS = 192 * 192


class Layer(NamedTuple):
    """A convolution with its ReLU, and the pool before it."""

    pool: nn.MaxPool2d | None
    conv: nn.Conv2d

    @property
    def geometry(self) -> tuple:
        return self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups

    def window(self, sides: Sequence[int]) -> Window | None:
        """What the pool does to images of ``sides`` pixels."""
        if self.pool is None:
            return None
        options = Pool(self.pool.kernel_size, self.pool.stride, self.pool.padding, self.pool.ceil_mode)
        return pool_window(options, self.conv.in_channels, *sides)


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
    """Whether the gradient by its input comes :func:`folded`: AlexNet's first, on a CPU. There oneDNN's gradient of
    three channels with a stride takes four times as long a product as its other convolutions."""
    same = conv.stride[0] == conv.stride[1] and conv.padding[0] == conv.padding[1]
    return same and conv.stride[0] > 1 and conv.dilation == (1, 1) and conv.groups == 1 and conv.weight.is_cpu


def folded(conv: nn.Conv2d) -> Tensor:
    """The weight of the convolution of stride 1 that one of stride s is for an image of s·s times the channels, whose
    pixels lie s apart."""
    step = conv.stride[0]
    rest = [-side % step for side in conv.kernel_size]
    return F.pixel_unshuffle(F.pad(conv.weight, (0, rest[1], 0, rest[0])), step)


def unfolded(image: Tensor, conv: nn.Conv2d, sides: Sequence[int]) -> Tensor:
    """The image of ``sides`` pixels of a folded one: what padding saw goes, and what no window reached is zero."""
    image = F.pixel_shuffle(image, conv.stride[0])
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
        if x.is_cpu and x.shape[2] * x.shape[3] >= MANY_PIXELS:
            x = x.contiguous(memory_format=torch.channels_last)
        ctx.call, ctx.sides, ctx.kept = call, x.shape[2:], []
        for layer in call.layers:
            window, code = layer.window(x.shape[2:]), None
            if window is not None:
                x, code = call.families["max_pool"].max_pool(x, *window, True)
            x = call.families["conv_relu"].conv_relu(x, layer.conv.weight, layer.conv.bias, *layer.geometry)
            ctx.kept.append((x, code))
        # The convolutions' weights too, so that torch notices where one has changed before backward.
        ctx.save_for_backward(first, second, *weights, *[layer.conv.weight for layer in call.layers])
        end = call.families["lpips_layer"].lpips_layer
        return tuple(end(x, weight, call.spatial) for (x, _), weight in zip(ctx.kept, weights, strict=True))

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
        pairs, kept = len(first), list(ctx.kept) if keeps_graph() else ctx.kept
        dweights: list[Tensor | None] = [None] * len(weights)
        above: Tensor | None = None  # the gradient by this layer's output, of the layers above it
        while kept:
            x, code = kept.pop()
            number = len(kept)
            layer, conv = call.layers[number], call.layers[number].conv
            end = call.families["lpips_layer"].lpips_layer_backward
            dx, dweight = end(dy[number], x, weights[number], call.spatial, wanted[number])
            if wanted[number]:
                dweights[number] = dweight
            dx, y = dx[:pairs], x[:pairs]
            if above is not None:
                dx += above
            below = kept[-1][0].shape[2:] if kept else ctx.sides
            window = layer.window(below)
            sides = below if window is None else window.out(*below)
            weight, geometry, seen = conv.weight, layer.geometry, sides
            if fold := folds(conv):
                weight, geometry = folded(conv), ((1, 1), (0, 0), (1, 1), 1)
                seen = [side + taps - 1 for side, taps in zip(dx.shape[2:], weight.shape[2:], strict=True)]
            # Of its input a convolution reads the shape alone, where the weight wants no gradient.
            unread = empty(x, (pairs, weight.shape[1] * conv.groups, *seen))
            backward = call.families["conv_relu"].conv_relu_backward
            above = backward(dx, unread, weight, y, *geometry, [True, False, False])[0]
            del x, y, dx, unread
            if fold:
                above = unfolded(above, conv, sides)
            if window is not None:
                backward = call.families["max_pool"].max_pool_backward
                above = backward(above, code[:pairs], *below, *window[:3])
        return None, call.unscaled(above, first), None, *dweights
