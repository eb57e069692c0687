"""Convolution, bias and ReLU.

    y = max(0, w * x + b)

With m = ∂L/∂y where y > 0 and 0 elsewhere, ∂L/∂x and ∂L/∂w are the convolution's gradients at m, and ∂L/∂b is m's sum
over images and pixels. Saved for backward: x, w and y, off which the mask is read; the raw convolution is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from alexnet_fast import reference, tuning
from alexnet_fast.backends import choose
from alexnet_fast.geometry import IntPair, memory_format
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import once_per_form
from alexnet_fast.ops.convolution import GEOMETRY
from alexnet_fast.ops.epilogue import NO_LRN, NO_POOL, pooled
from alexnet_fast.ops.registry import CUDA, LIBRARY, NATIVE, TRITON, TUNED, Family, define, empty, family
from alexnet_fast.ops.run import Layer, stage


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, *ctx.geometry = inputs
    ctx.save_for_backward(x, weight, output)


def _backward(family: Family, ctx, dy: Tensor):
    x, weight, y = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    grads = family.conv_relu_backward(dy, x, weight, y, *ctx.geometry, wanted)
    return *[g if want else None for g, want in zip(grads, wanted, strict=True)], *[None] * 4


def _fake(x, weight, bias, *geometry):
    return convolution.fake(x, weight, *geometry[:3])


def _fake_backward(dy, x, weight, y, stride, padding, dilation, groups, wanted, *_):
    shapes = (x.shape, x), (weight.shape, weight), (weight.shape[:1], None)
    return tuple(
        (x.new_empty(size) if like is None else empty(x, size, layout_of=convolution.layout_of(x, weight)))
        if want
        else x.new_empty(0)
        for (size, like), want in zip(shapes, wanted, strict=True)
    )


FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor"
# y None: dy is masked already. wanted: which of dx, dweight, dbias to compute; the others come back empty.
BACKWARD = (
    f"(Tensor dy, Tensor x, Tensor weight, Tensor? y, {GEOMETRY}, bool[3] wanted)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)

define(
    "conv_relu",
    FORWARD,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=lambda family, dtype, x, weight, bias, *rest: family.conv_relu(
        *convolution.autocast(dtype, x, weight, bias), *rest
    ),
    flops=convolution.flops,
    families=(NATIVE, TRITON, CUDA, TUNED),
)
define(
    "conv_relu_backward",
    BACKWARD,
    fake=_fake_backward,
    flops=convolution.flops_backward,
    families=(NATIVE, TRITON, CUDA, TUNED),
)
convolution.define_own_kernel("conv_relu", FORWARD)
convolution.define_own_kernel("conv_relu_backward", BACKWARD)
convolution.define_sm90("conv_relu", FORWARD, _fake)
# mask_dx: dx is 0 where x, then a ReLU's output, is not positive.
convolution.define_sm90("conv_relu_backward", BACKWARD, _fake_backward, ", bool mask_dx=False")
# masks: dx may be masked so; masked: has an element if it is. As a tensor: called from C++, torch 2.13 takes results of
# several types for one another.
LIBRARY.define(
    f"conv_relu_backward_in_run(Tensor dy, Tensor x, Tensor weight, Tensor? y, {GEOMETRY}, bool[3] wanted, bool masks)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor masked)"
)


# ---- What auto chooses from on a GPU ---------------------------------------------------------------------------------


def _cudnn_bias_relu(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups) -> Tensor:
    y = torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=memory_format(convolution.layout_of(x, weight)))


_sm90_backward = convolution.sm90_kernel("conv_relu_backward")


def _triton_backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    return family("triton").conv_relu_backward(*arguments)


def _backwards(operator: str) -> dict[str, Callable]:
    """conv_relu_backward, by the candidates of one of the gradients."""
    return {
        "cudnn": NATIVE.conv_relu_backward,
        "cuda": CUDA.conv_relu_backward,
        **convolution.by_tile(operator, "cuda", convolution.own_kernel("conv_relu_backward")),
        "cuda_sm90": _sm90_backward,
        "triton": _triton_backward,
    }


def _gradient(backward: Callable, place: int, dy: Tensor, x: Tensor, weight: Tensor, *geometry) -> Tensor:
    """That one of (dx, dweight, dbias), of a masked dy."""
    return backward(dy, x, weight, None, *geometry, [place == other for other in range(3)])[place]


FORWARDS = {
    "cudnn_epilogue": NATIVE.conv_relu,
    "cudnn_bias_relu": _cudnn_bias_relu,
    "cuda": CUDA.conv_relu,
    **convolution.by_tile("conv_relu", "cuda", convolution.own_kernel("conv_relu")),
    "cuda_sm90": convolution.sm90_kernel("conv_relu"),
    "triton": lambda *arguments: family("triton").conv_relu(*arguments),
}
BACKWARDS = {operator: _backwards(operator) for operator in ("conv_backward_input", "conv_backward_weight")}
INPUT_GRADIENTS, WEIGHT_GRADIENTS = (
    {name: partial(_gradient, backward, place) for name, backward in backwards.items()}
    for place, backwards in enumerate(BACKWARDS.values())
)


def _tuned(x: Tensor, weight: Tensor, *rest) -> Tensor:
    return tuning.run(convolution.form("conv_relu", x, weight, *rest[1:]), FORWARDS, (x, weight, *rest))


def _backward_in_run(dy, x, weight, y, stride, padding, dilation, groups, wanted, masks: bool):
    """Hopper's kernel masks dx on its way out, where that is of use: the layer before then needs no pass for it."""
    geometry = stride, padding, dilation, groups

    def chosen(operator: str, candidates: dict) -> Callable:
        form = convolution.form(operator, x, weight, *geometry)
        return BACKWARDS[operator][tuning.choose(form, candidates, (dy, x, weight, *geometry))]

    of_input = chosen("conv_backward_input", INPUT_GRADIENTS) if wanted[0] else None
    of_weight = chosen("conv_backward_weight", WEIGHT_GRADIENTS) if wanted[1] else None
    first = of_input or of_weight or NATIVE.conv_relu_backward
    if of_weight in (None, first) and first is not _sm90_backward:
        return *first(dy, x, weight, y, *geometry, wanted), torch.empty(0)
    # Each on its own, of a dy that is masked once. The bias's gradient comes on the way there, or with the weight's.
    dbias = dweight = x.new_empty(0)
    adds = wanted[2] and y is None
    if y is not None:
        no_code = dy.new_empty(0, dtype=torch.uint8)
        dy, dbias = NATIVE.epilogue_backward(dy, no_code, y, *y.shape[2:], wanted[2], *NO_LRN, *NO_POOL[:3])
    elif adds and not of_weight:
        dbias, adds = dy.sum((0, 2, 3)), False
    operands = dy, x, weight, *geometry
    masked = masks and of_input is _sm90_backward and x.data_ptr() % convolution.CHUNK == 0
    of_input = partial(_sm90_backward, mask_dx=True) if masked else of_input
    dx = _gradient(of_input, 0, *operands) if of_input else x.new_empty(0)
    if of_weight:
        _, dweight, added = of_weight(dy, x, weight, None, *geometry, [False, True, adds])
        dbias = added if adds else dbias
    return dx, dweight, dbias, torch.empty(int(masked))


def _tuned_backward(*arguments):
    return _backward_in_run(*arguments, False)[:3]


LIBRARY.impl("conv_relu_tuned", _tuned, "CUDA")
LIBRARY.impl("conv_relu_backward_tuned", _tuned_backward, "CUDA")
LIBRARY.impl("conv_relu_backward_in_run", _backward_in_run, "CUDA")


def planned(operator, arguments, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Layer, list[int]] | None:
    """What C++ is told of a call of conv_relu or conv_stage, and its result's shape; None where it does not carry it
    out."""
    stem = "conv_stage" if len(arguments) > 4 else "conv_relu"
    if operator not in (getattr(NATIVE, stem), getattr(TUNED, stem)) or x.dim() != 4:
        return None
    stride, padding, dilation, groups, *windows = arguments
    windows = windows or [*NO_LRN, *NO_POOL]
    sides = convolution.out_sides(x, weight, stride, padding, dilation)
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = stage("conv", bias is not None, sides, windows, tuned=operator is getattr(TUNED, stem), **geometry)
    return layer, [x.shape[0], weight.shape[0], *pooled(windows, *sides)]


@partial(once_per_form, planned=planned)
def _prepare(input, weight, bias, stride, padding, dilation, groups, backend):
    """The operator that runs, or None for the reference, and the geometry."""
    geometry, _sides, refusal = convolution.check(input, weight, bias, stride, padding, dilation, groups)
    chosen = choose("conv_relu", input, backend, refusal, cuda_refusal=convolution.cuda_refuses(weight))
    # Of no channels there is nothing to compute, and what comes of that, gradients included, is torch's to say.
    return None if chosen == "reference" or not weight.shape[1] else family(chosen).conv_relu, geometry


def conv_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """relu(conv2d(...)), arguments as :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, float16, bfloat16 or float64.
        weight: (K, C / groups, R, S), of input's dtype and device.
        bias: (K,) or None.
        stride, padding, dilation: an int or (vertical, horizontal); padding may be 'same' or 'valid'.
        groups: input and output channels are split into so many independent convolutions.
        backend: see :mod:`alexnet_fast.backends`.

    Returns:
        (N, K, P, Q), channels_last if input or weight is.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator, geometry, native = _prepare(input, weight, bias, stride, padding, dilation, groups, backend)
    if native is not None and (y := native(input, weight, bias)) is not None:
        return y
    if operator is None:
        return reference.conv_relu(input, weight, bias, stride, padding, dilation, groups)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    y = operator(x, weight, bias, *geometry)
    return y if input.dim() == 4 else y.squeeze(0)
