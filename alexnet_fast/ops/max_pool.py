"""Max-pooling over windows that may overlap.

    y = max over the window, which is cut off at the image's borders

Of equal elements the first in row order wins, and NaN wins over all, as in torch. Saved for backward: one uint8 for
each output, the winner's place in its window (kernel width · row + column); torch keeps an int64. Backward gathers: an
input adds up the gradients of those windows over it whose code names it, so there are no atomics and one order of sums.
In inference no code is written.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.geometry import IntPair, Pool, Window
from alexnet_fast.ops.arguments import check_tensor, flag, once_per_form, pair, pool_window, refuse_window
from alexnet_fast.ops.registry import NATIVE, Family, define, empty, family
from alexnet_fast.ops.run import WINDOWS, Layer


def _fake(x, kernel_size, stride, padding, ceil_mode, keep_code):
    out = Window(kernel_size, stride, padding, ceil_mode).out(*x.shape[2:])
    y = empty(x, [*x.shape[:2], *out])
    code = empty(y, y.shape, dtype=torch.uint8, layout_of=x) if keep_code else y.new_empty(0, dtype=torch.uint8)
    return y, code


def _setup_context(ctx, inputs, output) -> None:
    x, *ctx.window, ceil_mode, keep_code = inputs
    ctx.sides, ctx.keep_code, ctx.ceil_mode = x.shape[2:], keep_code, ceil_mode
    # A graph that was exported in inference may be differentiated all the same: its codes come from a second pass.
    ctx.save_for_backward(output[1] if keep_code else x)


def _backward(family: Family, ctx, dy: Tensor, _dcode):
    (code,) = ctx.saved_tensors
    if not ctx.keep_code:
        code = family.max_pool(code, *ctx.window, ctx.ceil_mode, True)[1]
    return family.max_pool_backward(dy, code, *ctx.sides, *ctx.window), None, None, None, None, None


define(
    "max_pool",
    "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, bool keep_code)"
    " -> (Tensor y, Tensor code)",
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
define(
    "max_pool_backward",
    "(Tensor dy, Tensor code, SymInt height, SymInt width, int[2] kernel_size, int[2] stride, int[2] padding)"
    " -> Tensor",
    fake=lambda dy, code, height, width, *window: empty(dy, [*dy.shape[:2], height, width], layout_of=code),
)


def planned(operator, window: Window, x: Tensor, *_) -> tuple[Layer, list[int]] | None:
    """What C++ is told of a call, and its result's shape; None where it does not carry it out."""
    if operator is not NATIVE.max_pool or x.dim() != 4:
        return None
    layer = Layer("max_pool", sides=tuple(x.shape[2:]), **dict(zip(WINDOWS[5:], window, strict=True)))
    return layer, [*x.shape[:2], *window.out(*x.shape[2:])]


@partial(once_per_form, planned=planned)
def _prepare(input, _weight, _bias, kernel_size, stride, padding, dilation, ceil_mode, return_indices, backend):
    """The operator that runs, or None for the reference, and its window."""
    check_tensor("input", input, (3, 4), integers=True)
    ceil_mode, return_indices = flag("ceil_mode", ceil_mode), flag("return_indices", return_indices)
    if pair("dilation", dilation, 1) == [1, 1]:
        window = pool_window(Pool(kernel_size, stride, padding, ceil_mode), *input.shape[-3:])
        refusal = "return_indices" if return_indices else refuse_window(window)
    else:
        window, refusal = None, f"dilation {dilation}"
    chosen = choose("max_pool", input, backend, refusal)
    return None if chosen == "reference" else family(chosen).max_pool, window


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = ...,
    padding: IntPair = ...,
    dilation: IntPair = ...,
    ceil_mode: bool = ...,
    return_indices: Literal[False] = ...,
    *,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = ...,
    padding: IntPair = ...,
    dilation: IntPair = ...,
    ceil_mode: bool = ...,
    *,
    return_indices: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def max_pool2d(
    input: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None = None,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    """Max-pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, float16, bfloat16 or float64; the result keeps its layout. Integers
            run on the reference alone.
        kernel_size: the window's sides, an int or (height, width).
        stride: its step; ``kernel_size`` if None. Under ``kernel_size``, windows overlap, as AlexNet's 3/2.
        padding: -inf on both sides, at most half of ``kernel_size``.
        dilation: space between the window's elements; other than 1 on the reference alone.
        ceil_mode: round the output's sides up, as Caffe and cuda-convnet do.
        return_indices: also return each winner's place in its image (row · W + column, int64), as
            :func:`torch.nn.functional.max_unpool2d` takes it; on the reference alone.
        backend: see :mod:`alexnet_fast.backends`. Kernels cover windows of up to 255 elements.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator, window, native = _prepare(
        input, None, None, kernel_size, stride, padding, dilation, ceil_mode, return_indices, backend
    )
    if native is not None and (y := native(input)) is not None:
        return y
    if operator is None:
        flags = bool(ceil_mode), bool(return_indices)  # torch takes no other kind
        return reference.max_pool2d(input, kernel_size, stride, padding, dilation, *flags)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    keep_code = x.requires_grad and torch.is_grad_enabled()
    y, _code = operator(x, *window, keep_code)
    return y if input.dim() == 4 else y.squeeze(0)
