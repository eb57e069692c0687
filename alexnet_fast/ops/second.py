"""A run's gradients as a graph, for gradients of gradients: what ``run_backward`` computes, by torch's operators.

Of its layers' outputs a run keeps the numbers and no graph. Each becomes a :class:`_Made` tensor here, whose gradient
goes on to the layer's input and parameters. Backward then goes through the layers by formulas of such tensors, and
their gradients are autograd's to find.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd import Function

from alexnet_fast import reference

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # by a layer's input, weight and bias


class Stand(Function):
    """In place of a tensor whose numbers nobody reads: its shape and its place in the graph, without its memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return dy


class _Made(Function):
    """A tensor of these numbers, made of an input, a weight and a bias that ``gradient`` returns the gradients of."""

    @staticmethod
    def forward(ctx, gradient: Callable[[Tensor], Gradients], numbers: Tensor, *_: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        return numbers.view_as(numbers)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        return None, None, *ctx.gradient(dy)


def gradients(layers, shapes, parameters, needs, dy: Tensor, x: Tensor, kept) -> list[Tensor]:
    """The gradients that are wanted, in order.

    ``layers`` (:class:`alexnet_fast.ops.run.Layer`) and their outputs' ``shapes``; ``needs``: for the input and each of
    ``parameters``, whether its gradient is wanted; ``x``: the input, or if it was not kept its :class:`Stand`, or
    anything where its gradient is not wanted; ``kept``: as run_backward takes it.
    """
    kept, steps = iter(kept), []
    places = [1]  # of each layer's first parameter
    for layer in layers:
        places.append(places[-1] + layer.has_weight + layer.bias)
    first = next(i for i in range(len(layers)) if needs[0] or any(needs[places[i] : places[i + 1]]))

    def reads_input(i: int) -> bool:
        kind = layers[i].kind
        return kind in ("conv", "lrn") or (kind == "linear" and needs[places[i]])

    def unread(*shape: int) -> Tensor:
        return dy.new_zeros(()).expand(shape)

    def step(numbers: Tensor, gradient: Callable[[Tensor], Gradients], place: int, *tensors: Tensor | None) -> Tensor:
        steps.append((gradient, place))
        return _Made.apply(gradient, numbers, x, *tensors)

    for i, layer in enumerate(layers):
        keeps = (i >= first and layer.returns_its_mask) or (i + 1 in range(first, len(layers)) and reads_input(i + 1))
        out = next(kept) if keeps else unread(*shapes[i])
        if i < first:
            x = out
            continue
        code = next(kept) if layer.pool_kernel[0] else None
        place, end = places[i], places[i + 1]
        tensors = [*[None] * (not layer.has_weight), *parameters[place - 1 : end - 1], None, None]
        weight, bias = tensors[:2]
        wanted = i > first or needs[0], layer.has_weight and needs[place], layer.bias and needs[end - 1]
        if layer.kind in ("conv", "epilogue"):
            mask = out if layer.returns_its_mask else next(kept) if layer.lrn_size else None
            z = unread(*shapes[i][:2], *layer.sides) if mask is None else mask
            gradient = partial(_conv, layer, x, weight) if layer.has_weight else _shift
            x = step(z, partial(gradient, mask, wanted), place - (not layer.has_weight), weight, bias)
            if not layer.returns_its_mask:
                x = step(out, partial(_windows, layer, code, x), place)
        elif layer.kind == "linear":
            x = step(out, partial(_linear, layer, x, weight, out, wanted), place, weight, bias)
        else:
            x = step(out, partial(_pointwise, layer, code, x), place)

    found: dict[int, Tensor | None] = {}
    for gradient, place in reversed(steps):
        dy, dweight, dbias = gradient(dy)
        found |= {at: grad for at, grad in ((place, dweight), (place + 1, dbias)) if grad is not None}
    if needs[0]:
        found[0] = dy
    return [found[place] for place in sorted(found)]


def _conv(layer, x: Tensor, weight: Tensor, mask: Tensor | None, wanted: tuple, dy: Tensor) -> Gradients:
    geometry = layer.stride, layer.padding, layer.dilation, layer.groups
    return reference.conv_relu_backward(dy, x, weight, mask, *geometry, wanted)


def _shift(mask: Tensor | None, wanted: tuple, dy: Tensor) -> Gradients:
    dz = dy if mask is None else torch.ops.aten.threshold_backward(dy, mask, 0)
    return dz, None, dz.sum((0, 2, 3)) if wanted[2] else None


def _windows(layer, code: Tensor | None, r: Tensor, dy: Tensor) -> Gradients:
    windows = layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups
    windows += layer.pool_kernel, layer.pool_stride, layer.pool_padding
    return reference.epilogue_backward(dy, code, r, *layer.sides, False, *windows)[0], None, None


def _linear(layer, x: Tensor, weight: Tensor, out: Tensor, wanted: tuple, dy: Tensor) -> Gradients:
    if layer.relu:
        dy = torch.ops.aten.threshold_backward(dy, out, 0)
    by_input, by_weight, by_bias = wanted
    return dy @ weight if by_input else None, dy.mT @ x if by_weight else None, dy.sum(0) if by_bias else None


def _pointwise(layer, code: Tensor | None, x: Tensor, dy: Tensor) -> Gradients:
    if layer.kind == "flatten":
        return dy.unflatten(1, layer.sides), None, None
    if layer.kind == "lrn":
        window = layer.lrn_size, layer.alpha, layer.beta, layer.k, layer.lrn_groups
        return reference.lrn_backward(dy, x, *window), None, None
    window = layer.pool_kernel, layer.pool_stride, layer.pool_padding
    return reference.max_pool_backward(dy, code, *layer.sides, *window), None, None
