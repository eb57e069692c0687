"""What follows a raw convolution z in a stage, in one pass: bias, ReLU, and optionally LRN and max-pooling.

    r = max(0, z + bias),    y = pool(lrn(r))

Saved for backward, so that nothing of z's size is kept without LRN:

    pool            one uint8 for each output: the winner's place in its window, or 255 where the maximum is 0 or less.
                    That is the ReLU's mask too: a winner at 0 or below passes no gradient.
    LRN             r
    LRN and pool    r and the winner's place
    neither         y, which is r

Backward gives ∂L/∂z and ∂L/∂bias in one pass; the bias gradient is summed in a fixed order. r is an output, so that a
gradient of the gradient, which depends on it with LRN, comes back by it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.geometry import LRN, Pool, Window
from alexnet_fast.ops.arguments import (
    check_bias,
    check_lrn,
    check_tensor,
    cuda_refuses,
    once_per_form,
    pool_window,
    refuse_window,
)
from alexnet_fast.ops.registry import NATIVE, Family, define, empty, family
from alexnet_fast.ops.run import Layer, stage
from alexnet_fast.reference.lrn import widened

# lrn_size 0: no normalization. pool_kernel [0, 0]: no pooling.
WINDOWS = (
    "int lrn_size, float alpha, float beta, float k, int lrn_groups, "
    "int[2] pool_kernel, int[2] pool_stride, int[2] pool_padding"
)
NO_LRN = LRN(0)
NO_POOL = Window([0, 0], [1, 1], [0, 0], False)


def fake(z: Tensor, lrn_size: int, window: Window, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(y, code, r) for a convolution output like z: what epilogue and conv_stage return."""
    pooling = window.kernel[0] != 0
    out = window.out(*z.shape[2:]) if pooling else z.shape[2:]
    y = empty(z, [*z.shape[:2], *out])
    code = empty(z, y.shape, dtype=torch.uint8) if training and pooling else z.new_empty(0, dtype=torch.uint8)
    r = empty(z, z.shape) if training and lrn_size else z.new_empty(0)
    return y, code, r


def save(ctx, output: tuple[Tensor, Tensor, Tensor], sides, windows, ceil_mode: bool, training: bool) -> list[Tensor]:
    """Keeps on ctx what :func:`gradient` reads beside tensors; returns the tensors to save, if ``training``.

    Otherwise backward first runs the forward pass anew for them: a graph that was exported in inference may be
    differentiated all the same.
    """
    ctx.sides, ctx.windows, ctx.ceil_mode, ctx.training = sides, windows, ceil_mode, training
    ctx.set_materialize_grads(False)  # of r there hardly ever is one
    return kept_of(ctx, output)


def kept_of(ctx, output: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The code and the tensor that :func:`gradient` takes, of a forward pass for training."""
    y, code, r = output
    lrn_size, pool_kernel = ctx.windows[0], ctx.windows[5]
    return [code, y if lrn_size == 0 and pool_kernel[0] == 0 else r]


def gradient(
    family: Family, ctx, dy: Tensor | None, dr: Tensor | None, code: Tensor, r: Tensor, want_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(∂L/∂z, ∂L/∂bias), None for what is not wanted or zero; ``dr`` is r's gradient, which there is with LRN alone."""
    passes = [(dy, ctx.windows), (dr if ctx.windows[0] else None, (*NO_LRN, *NO_POOL[:3]))]
    parts = [
        family.epilogue_backward(grad, code, r, *ctx.sides, want_bias, *windows)
        for grad, windows in passes
        if grad is not None
    ]
    if not parts:
        return None, None
    (dz, db), *more = parts
    for dz_too, db_too in more:
        dz, db = dz + dz_too, db + db_too if want_bias else None
    return dz, db if want_bias else None


def _setup_context(ctx, inputs, output) -> None:
    z, bias, *windows, ceil_mode, training = inputs
    kept = save(ctx, output, z.shape[2:], windows, ceil_mode, training)
    ctx.save_for_backward(*(kept if training else (z, bias)))


def _backward(family: Family, ctx, dy: Tensor | None, _dcode, dr: Tensor | None):
    kept = ctx.saved_tensors
    if not ctx.training:
        kept = kept_of(ctx, family.epilogue(*kept, *ctx.windows, ctx.ceil_mode, True))
    dz, db = gradient(family, ctx, dy, dr, *kept, ctx.needs_input_grad[1])
    return dz, db, *[None] * 10


def _autocast(family: Family, _dtype, z: Tensor, bias: Tensor | None, lrn_size: int, *rest):
    """In z's dtype, but with LRN in float32, as torch's own."""
    wide = widened(z) if lrn_size else z
    shift = None if bias is None else bias.to(z.dtype).to(wide.dtype)
    return family.epilogue(wide, shift, lrn_size, *rest)


def _fake_backward(dy, code, r, height, width, want_bias, lrn_size, alpha, beta, k, lrn_groups, pool_kernel, *_window):
    kept = r if lrn_size or pool_kernel[0] == 0 else code
    dz = empty(dy, [*dy.shape[:2], height, width], layout_of=kept)
    return dz, dy.new_empty(dy.shape[1] if want_bias else 0)


define(
    "epilogue",
    f"(Tensor z, Tensor? bias, {WINDOWS}, bool ceil_mode, bool training) -> (Tensor y, Tensor code, Tensor r)",
    fake=lambda z, bias, lrn_size, alpha, beta, k, groups, *rest: fake(z, lrn_size, Window(*rest[:4]), rest[4]),
    setup_context=_setup_context,
    backward=_backward,
    autocast=_autocast,
)
define(
    "epilogue_backward",
    f"(Tensor dy, Tensor code, Tensor r, SymInt height, SymInt width, bool want_bias, {WINDOWS})"
    " -> (Tensor dz, Tensor db)",
    fake=_fake_backward,
)


def plan(lrn: LRN | None, pool: Pool | None, channels: int, height: int, width: int) -> tuple[list, str]:
    """The operators' window arguments (ceil_mode last), checked, and what of them only the reference covers."""
    if lrn is not None:
        lrn = check_lrn(lrn, channels)
    window = NO_POOL if pool is None else pool_window(pool, channels, height, width)
    return [*(lrn or NO_LRN), *window], refuse_window(window)


def planned(operator, windows: list, z: Tensor, _weight, bias: Tensor | None) -> tuple[Layer, list[int]] | None:
    """What C++ is told of a call, and its result's shape; None where it does not carry it out."""
    if operator is not NATIVE.epilogue or z.dim() != 4:
        return None
    return stage("epilogue", bias is not None, z.shape[2:], windows), [*z.shape[:2], *pooled(windows, *z.shape[2:])]


def pooled(windows: list, height: int, width: int) -> list[int]:
    """The sides that are left of a convolution's output by ``windows``, which :func:`plan` returned."""
    window = Window(*windows[5:])
    return window.out(height, width) if window.kernel[0] else [height, width]


@partial(once_per_form, planned=planned)
def _prepare(input, _weight, bias, lrn, pool, backend):
    """The operator that runs, or None for the reference, and its windows."""
    check_tensor("input", input, (3, 4))
    channels = input.shape[-3]
    if bias is not None:
        check_bias(bias, channels, input)
    windows, refusal = plan(lrn, pool, channels, *input.shape[-2:])
    chosen = choose("epilogue", input, backend, refusal, cuda_refusal=cuda_refuses(lrn))
    return None if chosen == "reference" else family(chosen).epilogue, windows


def epilogue(
    input: Tensor,
    bias: Tensor | None = None,
    *,
    lrn: LRN | None = None,
    pool: Pool | None = None,
    backend: str | None = None,
) -> Tensor:
    """pool(lrn(relu(input + bias))) in one pass over a raw convolution output.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, float16, bfloat16 or float64; the result keeps its layout.
        bias: (C,), of input's dtype and device, or None.
        lrn: :class:`alexnet_fast.ops.LRN`, or None for no normalization.
        pool: :class:`alexnet_fast.ops.Pool`, or None for no pooling.
        backend: see :mod:`alexnet_fast.backends`.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator, windows, native = _prepare(input, None, bias, lrn, pool, backend)
    if native is not None and (y := native(input, bias)) is not None:
        return y
    if operator is None:
        return reference.epilogue(input, bias, lrn=lrn, pool=pool)
    z = input if input.dim() == 4 else input.unsqueeze(0)
    training = torch.is_grad_enabled() and (z.requires_grad or (bias is not None and bias.requires_grad))
    y, _code, _r = operator(z, bias, *windows, training)
    return y if input.dim() == 4 else y.squeeze(0)
