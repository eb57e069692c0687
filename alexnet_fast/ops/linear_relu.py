"""A linear layer and its ReLU.

    y = max(0, x wᵀ + b)

Without ``relu`` y is the sum itself. With one row, or a few, it takes as long as w takes to come: fc6 to fc8 are 117 MB
of bfloat16. This package's CUDA kernel reads them once and writes y; cuBLAS's product is followed by a pass for ReLU.

With m = ∂L/∂y where y > 0 and 0 elsewhere, ∂L/∂x = m w, ∂L/∂w = mᵀ x and ∂L/∂b is m's sum over rows, by torch's own
products. Saved for backward: x, w, and y where there is a ReLU, off which the mask is read.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import backends, reference, tuning
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import check_linear, flag, once_per_form
from alexnet_fast.ops.registry import CUDA, LIBRARY, NATIVE, TRITON, TUNED, Family, define, family
from alexnet_fast.ops.run import Layer
from alexnet_fast.tuning import Form

MOST_ROWS = 8  # that the CUDA kernel is for: it multiplies so many at a time


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _bias, relu = inputs
    ctx.save_for_backward(x, weight, *([output] if relu else []))


def _backward(family: Family, ctx, dy: Tensor):
    x, weight, *y = ctx.saved_tensors
    by_input, by_weight, by_bias, _ = ctx.needs_input_grad
    if y:
        dy, db = family.linear_relu_dropout_backward(dy, *y, 0.0, by_bias)
    else:
        db = dy.sum(0) if by_bias else None
    return dy @ weight if by_input else None, dy.mT @ x if by_weight else None, db if by_bias else None, None


define(
    "linear_relu",
    "(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor",
    fake=lambda x, weight, bias, relu: x.new_empty((x.shape[0], weight.shape[0])),
    setup_context=_setup_context,
    backward=_backward,
    autocast=lambda family, dtype, x, weight, bias, relu: family.linear_relu(
        *convolution.autocast(dtype, x, weight, bias), relu
    ),
    flops=lambda x, weight, *_: 2 * x[0] * x[1] * weight[0],
    families=(NATIVE, TRITON, CUDA, TUNED),
)


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    y = F.linear(x, weight, bias)
    return y.relu_() if relu else y


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """The library's product, then bias and ReLU in one pass."""
    if not relu:
        return F.linear(x, weight, bias)
    return family("triton").linear_relu_dropout(F.linear(x, weight), bias, 0.0, None)


# ---- What auto chooses from on a GPU ---------------------------------------------------------------------------------

FORWARDS = {"cublas": NATIVE.linear_relu, "cuda": CUDA.linear_relu}


def _streams(x: Tensor) -> bool:
    """Whether the kernel reads the matrix's rows where they lie, 16 bytes at a time."""
    return x.is_contiguous() and x.data_ptr() % 16 == 0 and x.shape[1] * x.itemsize % 16 == 0


def _tuned(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if x.shape[0] > MOST_ROWS or not (_streams(x) and _streams(weight)):
        return NATIVE.linear_relu(x, weight, bias, relu)
    return tuning.run(_form(x, weight), FORWARDS, (x, weight, bias, relu))


def _form(x: Tensor, weight: Tensor) -> Form:
    """As of a convolution of one pixel."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    sizes = (*x.shape, 1, 1), (*weight.shape, 1, 1)
    return Form("linear_relu", x.dtype, *sizes, (1, 1), (0, 0), (1, 1), 1, "contiguous", tf32=tf32)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear_relu", _library, _key)
    LIBRARY.impl("linear_relu_triton", _triton, _key)
LIBRARY.impl("linear_relu_tuned", _tuned, "CUDA")


def own_kernel(x: Tensor) -> str:
    """Which backend a net's layer of few rows ``x`` goes to, ``cuda`` or ``tuned``; '' where its product is torch's, as
    under autocast, which keeps the weights it has cast, and in graphs, whose number of rows may be a symbol."""
    if torch.compiler.is_compiling() or x.dim() != 2 or x.shape[0] > MOST_ROWS or torch.is_autocast_enabled("cuda"):
        return ""
    chosen = backends.choose("linear_relu", x, None)
    return chosen if chosen in ("cuda", "tuned") else ""


def planned(operator, relu: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Layer, list[int]] | None:
    """What C++ is told of a call, and its result's shape; None where it does not carry it out."""
    if operator not in (NATIVE.linear_relu, TUNED.linear_relu) or x.dim() != 2:
        return None
    layer = Layer("linear", bias is not None, relu, tuned=operator is TUNED.linear_relu)
    return layer, [x.shape[0], weight.shape[0]]


@partial(once_per_form, planned=planned)
def _prepare(input, weight, bias, relu, backend):
    """The operator that runs, or None for the reference, and whether there is a ReLU."""
    check_linear(input, weight, bias)
    chosen = backends.choose("linear_relu", input, backend)
    return None if chosen == "reference" else family(chosen).linear_relu, flag("relu", relu)


def linear_relu(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = True, *, backend: str | None = None
) -> Tensor:
    """relu(linear(input, weight, bias)), as in :mod:`torch.nn.functional`.

    Args:
        input: (N, in) or (in,), float32, float16, bfloat16 or float64.
        weight: (out, in), of input's dtype and device.
        bias: (out,) or None.
        relu: False leaves ReLU out.
        backend: see :mod:`alexnet_fast.backends`. ``auto`` on a GPU measures, or asks the table that ships with this
            package, for up to 8 rows (:mod:`alexnet_fast.tuning`), and is cuBLAS's product for more.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    operator, relu, native = _prepare(input, weight, bias, relu, backend)
    if native is not None and (y := native(input, weight, bias)) is not None:
        return y
    if operator is None:
        return reference.linear_relu(input, weight, bias, relu)
    y = operator(input if input.dim() == 2 else input.unsqueeze(0), weight, bias, relu)
    return y if input.dim() == 2 else y.squeeze(0)
