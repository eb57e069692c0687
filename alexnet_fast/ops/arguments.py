"""Checks that every operator makes of its arguments. Messages name the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_fast import backends

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IntPair = int | tuple[int, int]
INT32_MAX = 2**31 - 1
MOST_FORMS = 4096


class LRN(NamedTuple):
    """Local response normalization inside :func:`epilogue` and :func:`conv_stage`; fields as in
    :func:`alexnet_fast.ops.local_response_norm`."""

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    groups: int = 1


class Pool(NamedTuple):
    """Max-pooling inside :func:`epilogue` and :func:`conv_stage`; fields as in :func:`alexnet_fast.ops.max_pool2d`."""

    kernel_size: IntPair
    stride: IntPair | None = None
    padding: IntPair = 0
    ceil_mode: bool = False


def once_per_form(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """``prepare(input, weight, bias, *rest)`` with its results kept: called once for the shapes, dtypes and devices of
    the tensors, of which the last two may be None, the values of the rest, and the backend in force.

    Checks take longer than an operator's dispatch, ten times so where the kernel before has taken the caches. They are
    made anew where sizes are symbolic or arguments lists, which cannot be looked up, where dtypes differ, on which
    autocast decides, while torch compiles, and under transforms of torch.func. Errors are not kept.
    """
    prepared: dict[tuple, Any] = {}
    backends.prepared.append(prepared)

    @wraps(prepare)
    def look_up(input, weight, bias, *rest):
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return prepare(input, weight, bias, *rest)
        try:
            form = (
                backends.current(),
                (input.shape, input.dtype, input.device),
                weight is None or (weight.shape, weight.dtype, weight.device),
                bias is None or (bias.shape, bias.dtype, bias.device),
                rest,
                *map(type, rest),  # 1, 1.0 and True are equal
            )
            return prepared[form]
        except (AttributeError, KeyError, TypeError):
            result = prepare(input, weight, bias, *rest)
        tensors = [tensor for tensor in (input, weight, bias) if tensor is not None]
        if all(tensor.dtype == input.dtype for tensor in tensors):
            if len(prepared) >= MOST_FORMS:
                prepared.clear()
            with suppress(TypeError):
                prepared[form] = result
        return result

    return look_up


def check_tensor(name: str, x: object, dims: tuple[int, ...], like: Tensor | None = None) -> None:
    """x is a dense floating-point tensor of so many dimensions, on ``like``'s device and of its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name}: expected {wanted} dimensions, got {x.dim()} (shape {tuple(x.shape)})")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    if like is not None:
        if x.device != like.device:
            raise ValueError(f"{name}: is on {x.device}, but input is on {like.device}")
        if x.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
            raise TypeError(f"{name}: is {x.dtype}, but input is {like.dtype}")


def check_bias(bias: object, channels: int, like: Tensor) -> None:
    check_tensor("bias", bias, (1,), like)
    if bias.shape[0] != channels:
        raise ValueError(f"bias: expected one element for each of {channels} channels, got {bias.shape[0]}")


def pair(name: str, value: object, least: int) -> list[int]:
    """[height, width] of an int or a pair of ints, each at least ``least``."""
    if type(value) is int and least <= value <= INT32_MAX:  # quickly what nearly all calls give, in every call
        return [value, value]
    if type(value) is tuple and len(value) == 2:
        a, b = value
        if type(a) is int and type(b) is int and least <= a <= INT32_MAX and least <= b <= INT32_MAX:
            return [a, b]
    values = [value, value] if isinstance(value, (int, torch.SymInt)) else value
    if not isinstance(values, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in values):
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if len(values) == 1:
        values = [*values, *values]
    if len(values) != 2:
        raise ValueError(f"{name}: expected an int or a pair of ints, got {len(values)} values")
    for v in values:
        if not least <= v <= INT32_MAX:
            raise ValueError(f"{name}: expected at least {least} and at most {INT32_MAX}, got {value!r}")
    return list(values)


def check_lrn(lrn: LRN, channels: int) -> None:
    if not isinstance(lrn, LRN):
        raise TypeError(f"lrn: expected alexnet_fast.ops.LRN or None, got {lrn!r}")
    if not isinstance(lrn.size, int) or not 1 <= lrn.size <= INT32_MAX:
        raise ValueError(f"size: expected a positive int of at most {INT32_MAX}, got {lrn.size!r}")
    for name in ("alpha", "beta", "k"):
        if not isinstance(value := getattr(lrn, name), (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not isinstance(lrn.groups, int) or lrn.groups < 1 or channels % lrn.groups:
        raise ValueError(f"groups: expected a divisor of the {channels} channels, got {lrn.groups!r}")


def cuda_refuses(lrn: LRN | None) -> str:
    """What of a normalization the CUDA kernels do not cover: they keep up to 16 channels in registers."""
    return f"windows of more than 16 channels (size={lrn.size})" if lrn and lrn.size > 16 else ""


def out_side(name: str, side: int, kernel: int, stride: int, padding: int, ceil_mode: bool = False) -> int:
    """Output side of a window that slides over ``side`` elements, as torch counts it."""
    out = (side + 2 * padding - kernel + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= side + padding:
        out -= 1  # the last window must begin inside the image or its left padding
    if out < 1:
        raise ValueError(f"{name}: a window of {kernel} is larger than the input's side {side} with padding {padding}")
    return out


class Window(NamedTuple):
    """A checked pooling window."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    ceil_mode: bool

    def out(self, height: int, width: int) -> list[int]:
        sides = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        return [out_side("kernel_size", *side, self.ceil_mode) for side in sides]


def pool_window(pool: Pool, channels: int, height: int, width: int) -> Window:
    """The window of ``pool``, checked against the images it slides over."""
    if not isinstance(pool, Pool):
        raise TypeError(f"pool: expected alexnet_fast.ops.Pool or None, got {pool!r}")
    kernel = pair("kernel_size", pool.kernel_size, 1)
    stride = kernel if pool.stride is None else pair("stride", pool.stride, 1)
    padding = pair("padding", pool.padding, 0)
    for p, side in zip(padding, kernel, strict=True):
        if 2 * p > side:
            raise ValueError(f"padding: expected at most half of kernel_size {pool.kernel_size}, got {pool.padding}")
    if 0 in (channels, height, width):
        raise ValueError(f"input: only the batch may be empty, got images of {channels} x {height} x {width}")
    window = Window(kernel, stride, padding, bool(pool.ceil_mode))
    window.out(height, width)
    return window


def refuse_window(window: Window) -> str:
    """What of a pooling window only the reference covers: winners are stored as uint8, and 255 means none."""
    rows, columns = window.kernel
    return f"windows of more than 255 elements ({rows}x{columns})" if rows * columns > 255 else ""
