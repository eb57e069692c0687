"""A whole stage: convolution, bias, ReLU, and optionally LRN and max-pooling.

    y = pool(lrn(max(0, w * x + b)))

Saved for backward: x, w and what the epilogue keeps (see epilogue.py); without LRN no tensor of the convolution's
output size. Backward is the epilogue's, then the convolution's at its result.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from alexnet_fast import reference, tuning
from alexnet_fast.backends import choose
from alexnet_fast.geometry import LRN, IntPair, Pool, Window
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import cuda_refuses, once_per_form
from alexnet_fast.ops.conv_relu import conv_relu, planned
from alexnet_fast.ops.convolution import GEOMETRY
from alexnet_fast.ops.epilogue import WINDOWS, gradient, kept_of, plan, save
from alexnet_fast.ops.epilogue import fake as fake_epilogue
from alexnet_fast.ops.registry import CUDA, LIBRARY, NATIVE, TRITON, TUNED, Family, define, family
from alexnet_fast.reference.lrn import widened


def _fake(x, weight, bias, stride, padding, dilation, groups, lrn_size, alpha, beta, k, lrn_groups, *rest):
    z = convolution.fake(x, weight, stride, padding, dilation)
    return fake_epilogue(z, lrn_size, Window(*rest[:4]), rest[4])


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, *rest = inputs
    ctx.geometry, windows, (ceil_mode, training) = rest[:4], rest[4:12], rest[12:]
    sides = convolution.out_sides(x, weight, *ctx.geometry[:3])
    kept = save(ctx, output, sides, windows, ceil_mode, training)
    ctx.save_for_backward(x, weight, *(kept if training else [bias, None]))


def _backward(family: Family, ctx, dy: Tensor | None, _dcode, dr: Tensor | None):
    x, weight, *kept = ctx.saved_tensors
    if not ctx.training:
        stage = family.conv_stage(x, weight, kept[0], *ctx.geometry, *ctx.windows, ctx.ceil_mode, True)
        kept = kept_of(ctx, stage)
    want_x, want_weight, want_bias = ctx.needs_input_grad[:3]
    dz, db = gradient(family, ctx, dy, dr, *kept, want_bias)
    if dz is None:
        return (None,) * 17
    dx, dweight, _ = family.conv_relu_backward(dz, x, weight, None, *ctx.geometry, [want_x, want_weight, False])
    return dx if want_x else None, dweight if want_weight else None, db, *[None] * 14


def _autocast(family: Family, dtype: torch.dtype, x, weight, bias, stride, padding, dilation, groups, *windows):
    """The convolution in autocast's dtype. With LRN, what follows it in float32, as torch's own."""
    tensors = convolution.autocast(dtype, x, weight, bias)
    geometry, lrn_size = (stride, padding, dilation, groups), windows[0]
    if not lrn_size:
        return family.conv_stage(*tensors, *geometry, *windows)
    return family.epilogue(widened(family.conv_relu(*tensors, *geometry)), None, *windows)


SCHEMA = (
    f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, {WINDOWS}, bool ceil_mode, bool training)"
    " -> (Tensor y, Tensor code, Tensor r)"
)

define(
    "conv_stage",
    SCHEMA,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
    flops=convolution.flops,
    families=(NATIVE, TRITON, CUDA, TUNED),
)
convolution.define_own_kernel("conv_stage", SCHEMA)
convolution.define_sm90("conv_stage", SCHEMA, _fake)


def _then_epilogue(conv_relu, x, weight, bias, stride, padding, dilation, groups, *windows, **tile):
    """Where one block an image leaves the card idle: a convolution of many blocks, then everything else in one pass."""
    return NATIVE.epilogue(conv_relu(x, weight, bias, stride, padding, dilation, groups, **tile), None, *windows)


FORWARDS = {
    "cudnn_epilogue": NATIVE.conv_stage,
    "cuda_epilogue": partial(_then_epilogue, CUDA.conv_relu),
    **convolution.by_tile("conv_stage", "cuda_epilogue", partial(_then_epilogue, convolution.own_kernel("conv_relu"))),
    "cuda_sm90_epilogue": partial(_then_epilogue, convolution.sm90_kernel("conv_relu")),
    "cuda_sm90": convolution.sm90_kernel("conv_stage"),
    "cuda": CUDA.conv_stage,
    **convolution.by_tile("conv_stage", "cuda", convolution.own_kernel("conv_stage")),
    "triton": lambda *arguments: family("triton").conv_stage(*arguments),
}


def _tuned(x, weight, bias, stride, padding, dilation, groups, lrn_size, *rest):
    pool, training = rest[4], rest[-1]
    form = convolution.form("conv_stage", x, weight, stride, padding, dilation, groups, lrn_size, pool, training)
    return tuning.run(form, FORWARDS, (x, weight, bias, stride, padding, dilation, groups, lrn_size, *rest))


LIBRARY.impl("conv_stage_tuned", _tuned, "CUDA")


@partial(once_per_form, planned=planned)
def _prepare(input, weight, bias, stride, padding, dilation, groups, lrn, pool, backend):
    """The operator that runs, or None for the reference, and its arguments after the tensors but for the last."""
    geometry, sides, refusal = convolution.check(input, weight, bias, stride, padding, dilation, groups)
    windows, refused_window = plan(lrn, pool, weight.shape[0], *sides)
    cuda_refusal = convolution.cuda_refuses(weight) or cuda_refuses(lrn)
    chosen = choose("conv_stage", input, backend, refusal or refused_window, cuda_refusal=cuda_refusal)
    return None if chosen == "reference" else family(chosen).conv_stage, (*geometry, *windows)


def conv_stage(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntPair = 1,
    padding: IntPair | str = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    *,
    lrn: LRN | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
) -> Tensor:
    """pool(lrn(relu(conv2d(...)))): one of AlexNet's stages.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in :func:`alexnet_fast.ops.conv_relu`.
        lrn: :class:`alexnet_fast.ops.LRN`, or None for no normalization.
        pool: :class:`alexnet_fast.ops.Pool`, or None for no pooling.
        backend: see :mod:`alexnet_fast.backends`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if lrn is None and pool is None:
        return conv_relu(input, weight, bias, stride, padding, dilation, groups, backend=backend)
    operator, arguments, native = _prepare(input, weight, bias, stride, padding, dilation, groups, lrn, pool, backend)
    if native is not None and (y := native(input, weight, bias)) is not None:
        return y
    if operator is None:
        return reference.conv_stage(input, weight, bias, stride, padding, dilation, groups, lrn=lrn, pool=pool)
    x = input if input.dim() == 4 else input.unsqueeze(0)
    training = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    y, _code, _r = operator(x, weight, bias, *arguments, training)
    return y if input.dim() == 4 else y.squeeze(0)
