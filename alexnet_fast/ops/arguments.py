"""Checks that every operator makes of its arguments. Messages name the argument, what came and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import wraps
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from alexnet_fast import _C, backends
from alexnet_fast.geometry import LRN, Pool, Window
from alexnet_fast.ops import run

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
INT32_MAX = 2**31 - 1
MOST_FORMS = 4096


def once_per_form(prepare: Callable[..., Any], planned: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``prepare(input, weight, bias, *rest)`` with its results kept: called once for the shapes, dtypes and devices of
    the tensors, of which the last two may be None, the values of the rest, and the backend in force.

    Checks take longer than an operator's dispatch, ten times so where the kernel before has taken the caches. Results
    are found in C++ (csrc/bindings/forms.cpp), and made anew where sizes are symbolic or arguments lists, which cannot
    be looked up, where dtypes differ, on which autocast decides, where an argument is a tensor, whose value may change,
    while torch compiles or traces, under transforms of torch.func and in forward mode. Errors are not kept.

    ``planned(*result, input, weight, bias)``: what C++ is told of a call, and its result's shape, or None. Results of
    ``prepare``, which then are tuples, get another element: the :class:`alexnet_fast.ops.run.Native` of that plan where
    there is one and nobody looks at operators, as modes and autocast do; else None.
    """
    known: dict[tuple, tuple] = {}
    backends.prepared.append(known)

    def anew(*arguments):
        result = prepare(*arguments)
        return (*result, None) if planned else result

    def keep(form, *arguments):
        result, tensors = anew(*arguments), [tensor for tensor in arguments[:3] if tensor is not None]
        if all(tensor.dtype == tensors[0].dtype for tensor in tensors) and not holds_tensor(arguments[3:]):
            if len(known) >= MOST_FORMS:
                known.clear()
            plan = planned and planned(*result[:-1], *arguments[:3])
            known[form] = result, (*result[:-1], run.alone(*plan, *arguments[:3]).__call__) if plan else result
        return result

    find = _C.forms(known, anew, keep, backends.current, CHANGES, LOOKS, FLAGS, [Tensor, nn.Parameter])

    @wraps(prepare)
    def look_up(input, weight, bias, *rest):
        if is_dynamo_compiling():
            return anew(input, weight, bias, *rest)
        return find(input, weight, bias, *rest)

    return look_up


# What a thread may be in: torch.compile and forward mode, by what a module says otherwise; transforms of torch.func and
# tracing; modes and autocast.
FLAGS = [(vars(torch.compiler), "_is_compiling_flag", False), (vars(forward_ad), "_current_level", -1)]
CHANGES = [torch._C._are_functorch_transforms_active, torch._C._is_tracing]
LOOKS = [torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack, torch._C._is_any_autocast_enabled]


def holds_tensor(values: tuple) -> bool:
    """Whether a value, or one inside a tuple, is a tensor, which may change and still be the same object."""
    return any(isinstance(v, Tensor) or (isinstance(v, tuple) and holds_tensor(v)) for v in values)


def check_tensor(
    name: str, x: object, dims: Container[int], like: Tensor | None = None, *, integers: bool = False
) -> None:
    """x is a dense floating-point tensor (or one of ``integers``) of so many dimensions, on ``like``'s device and of
    its dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() not in dims:
        wanted = f"at least {dims[0]}" if isinstance(dims, range) else " or ".join(str(d) for d in dims)
        raise ValueError(f"{name}: expected {wanted} dimensions, got {x.dim()} (shape {tuple(x.shape)})")
    if x.dtype not in FLOATS and not (integers and x.dtype in INTEGERS):
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


def check_linear(input: object, weight: object, bias: object) -> None:
    check_tensor("input", input, (1, 2))
    check_tensor("weight", weight, (2,), input)
    if input.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight: shape {tuple(weight.shape)} takes {weight.shape[1]} features, got {input.shape[-1]}")
    if bias is not None:
        check_bias(bias, weight.shape[0], input)


def integer(value: object) -> int | torch.SymInt | None:
    """``value`` as an int, if it is one as torch sees it: numpy's and a tensor of one integer count, floats do not."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None


def number(value: object) -> float | None:
    """``value`` as a float, if it is a number as torch sees it: numpy's and a tensor of one element count."""
    if type(value) is float:
        return value
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # a complex number, an array of several
        return None


def flag(name: str, value: object) -> bool:
    """``value`` as a bool, if it is one: numpy's, 0 and 1 and a tensor of one element count, words do not."""
    if isinstance(value, bool):
        return value
    if number(value) not in (0.0, 1.0):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def pair(name: str, value: object, least: int) -> list[int]:
    """[height, width] of an int or a pair of ints, each at least ``least``."""
    if type(value) is int and least <= value <= INT32_MAX:  # quickly what nearly all calls give, in every call
        return [value, value]
    if type(value) is tuple and len(value) == 2:
        a, b = value
        if type(a) is int and type(b) is int and least <= a <= INT32_MAX and least <= b <= INT32_MAX:
            return [a, b]
    values = [integer(v) for v in (value if isinstance(value, (tuple, list)) else [value, value])]
    if None in values:
        raise TypeError(f"{name}: expected an int or a pair of ints, got {value!r}")
    if len(values) == 1:
        values = [*values, *values]
    if len(values) != 2:
        raise ValueError(f"{name}: expected an int or a pair of ints, got {len(values)} values")
    for v in values:
        if not least <= v <= INT32_MAX:
            raise ValueError(f"{name}: expected at least {least} and at most {INT32_MAX}, got {value!r}")
    return values


def check_groups(groups: object, channels: int, whose: str) -> int:
    number = integer(groups)
    if number is None or number < 1 or channels % number:
        raise ValueError(f"groups: expected a divisor of {whose}, got {groups!r}")
    return number


def check_lrn(lrn: LRN, channels: int) -> LRN:
    """``lrn`` in ints and floats."""
    if not isinstance(lrn, LRN):
        raise TypeError(f"lrn: expected alexnet_fast.ops.LRN or None, got {lrn!r}")
    size = integer(lrn.size)
    if size is None or not 1 <= size <= INT32_MAX:
        raise ValueError(f"size: expected a positive int of at most {INT32_MAX}, got {lrn.size!r}")
    numbers = []
    for name in ("alpha", "beta", "k"):
        value = getattr(lrn, name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name}: expected a number, got a tensor that requires its gradient")
        numbers.append(number(value))
        if numbers[-1] is None:
            raise TypeError(f"{name}: expected a number, got {value!r}")
    return LRN(size, *numbers, check_groups(lrn.groups, channels, f"the {channels} channels"))


def cuda_refuses(lrn: LRN | None) -> str:
    """What of a normalization the CUDA kernels do not cover: they keep up to 16 channels in registers."""
    return f"windows of more than 16 channels (size={lrn.size})" if lrn and lrn.size > 16 else ""


def pool_window(pool: Pool, channels: int, height: int, width: int) -> Window:
    """The window of ``pool``, checked against the images it slides over."""
    if not isinstance(pool, Pool):
        raise TypeError(f"pool: expected alexnet_fast.ops.Pool or None, got {pool!r}")
    kernel = pair("kernel_size", pool.kernel_size, 1)
    left_out = pool.stride is None or (isinstance(pool.stride, (tuple, list)) and not pool.stride)  # () as in torch
    stride = kernel if left_out else pair("stride", pool.stride, 1)
    padding = pair("padding", pool.padding, 0)
    for p, side in zip(padding, kernel, strict=True):
        if 2 * p > side:
            raise ValueError(f"padding: expected at most half of kernel_size {pool.kernel_size}, got {pool.padding}")
    if 0 in (channels, height, width):
        raise ValueError(f"input: only the batch may be empty, got images of {channels} x {height} x {width}")
    window = Window(kernel, stride, padding, flag("ceil_mode", pool.ceil_mode))
    window.out(height, width)
    return window


def refuse_window(window: Window) -> str:
    """What of a pooling window only the reference covers: winners are stored as uint8, and 255 means none."""
    rows, columns = window.kernel
    return f"windows of more than 255 elements ({rows}x{columns})" if rows * columns > 255 else ""
