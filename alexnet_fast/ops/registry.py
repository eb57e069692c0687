"""How an operator gets its names: one schema, one fake and one autograd formula, shared by all implementations.

The dispatcher has one slot for each device. Native code (or torch) fills the slots of ``alexnet_fast::NAME``. Further
implementations are operators of their own, registered here with the same schema, fake and formula: Triton's,
``alexnet_fast::NAME_triton``, and ``alexnet_fast::NAME_cuda`` for convolutions by this package's own CUDA kernels,
whose slot in ``NAME`` is cuDNN's. ``alexnet_fast::NAME_tuned`` is that one of them which alexnet_fast/tuning.py chooses
for the call's shapes, as late as this: a graph that was compiled or exported chooses where it runs. A formula reaches
the backward operator of its own family through the ``family`` it is handed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from alexnet_fast import reference
from alexnet_fast.geometry import memory_format

LIBRARY = torch.library.Library("alexnet_fast", "DEF")


class Family:
    """The operators of one kind of implementation, by stem: ``NATIVE.lrn_backward``, ``TRITON.lrn_backward``. What a
    family has no operator of its own for, NATIVE's does: ``CUDA.lrn_backward`` is ``NATIVE.lrn_backward``."""

    def __init__(self, suffix: str):
        self._suffix = suffix

    def __getattr__(self, name: str):
        operators = torch.ops.alexnet_fast
        overload = (getattr(operators, name + self._suffix, None) or getattr(operators, name)).default
        setattr(self, name, overload)
        return overload


class Differentiable:
    """A family whose backward operators are the reference's functions of these names, which have gradients."""

    def __init__(self, family: Family):
        self._family = family

    def __getattr__(self, name: str):
        return getattr(reference if name.endswith("_backward") else self._family, name)


NATIVE, TRITON, CUDA, TUNED = Family(""), Family("_triton"), Family("_cuda"), Family("_tuned")


def family(backend: str) -> Family:
    """The operators behind a backend that is not the reference."""
    if backend == "triton":
        import alexnet_fast.triton_kernels  # noqa: F401  registers the implementations

        return TRITON
    return {"cuda": CUDA, "tuned": TUNED}.get(backend, NATIVE)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Callable | None = None,
    flops: Callable | None = None,
    families: tuple[Family, ...] = (NATIVE, TRITON),
) -> None:
    """Registers operator ``name`` for each of ``families``.

    ``schema``: arguments and returns, in torch's schema language. ``fake``: shapes, dtypes and strides of the result.
    ``backward(family, ctx, *grads)``: the autograd formula; without one, differentiating raises. Where a graph of the
    gradient is asked for (``create_graph=True``), ``family`` is :class:`Differentiable`.
    ``autocast(family, dtype, *args)``: the operator's result, of arguments in the dtypes that autocast wants; without
    one, autocast passes by. ``flops(*args)``: what torch's FlopCounterMode counts, of shapes in place of tensors.
    """
    for member in families:
        qualified = f"alexnet_fast::{name}{member._suffix}"
        LIBRARY.define(f"{name}{member._suffix}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        formula = partial(_gradient, backward, member) if backward else partial(_no_gradient, name)
        torch.library.register_autograd(qualified, formula, setup_context=setup_context, lib=LIBRARY)
        if flops:
            register_flop_formula(getattr(torch.ops.alexnet_fast, f"{name}{member._suffix}"))(
                lambda *args, out_shape=None: flops(*args)
            )
        if autocast:
            for device in ("cpu", "cuda"):
                kernel = partial(_autocast, member, device, autocast)
                LIBRARY.impl(f"{name}{member._suffix}", kernel, f"Autocast{device.upper()}")


def _gradient(backward: Callable, member: Family, ctx, *grads):
    return backward(Differentiable(member) if torch.is_grad_enabled() else member, ctx, *grads)


def _no_gradient(name: str, ctx, *grads):
    raise RuntimeError(f"alexnet_fast::{name} is not differentiable: call alexnet_fast.reference.{name}")


def _autocast(member: Family, device: str, call: Callable, *args):
    with torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    ):
        return call(member, torch.get_autocast_dtype(device), *args)


def empty(like: Tensor, size, *, dtype: torch.dtype | None = None, layout_of: Tensor | None = None) -> Tensor:
    """An unwritten tensor on ``like``'s device, dense in the layout of ``layout_of`` (``like`` itself if not given)."""
    form = memory_format(like if layout_of is None else layout_of)
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=form)
