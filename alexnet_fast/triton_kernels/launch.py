"""What launchers do: register with the dispatcher, launch on their tensors' device, make inputs dense, tune.

ALEXNET_FAST_TUNE=0 turns tuning off: each tuned kernel then runs with the first configuration of its list.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
DEVICES = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
LIBRARY = torch.library.Library("alexnet_fast", "IMPL")  # of operators that alexnet_fast/ops has defined by now


def implements(name: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as ``alexnet_fast::NAME_triton``, run on the device of its first argument, a
    tensor: Triton itself launches on the current one."""

    def register(function: Callable) -> Callable:
        @wraps(function)
        def on_device(x: Tensor, *args):
            with torch.cuda.device_of(x):
                return function(x, *args)

        for device in DEVICES:
            LIBRARY.impl(f"{name}_triton", on_device, device)
        return function

    return register


def dense(form: torch.memory_format, *tensors: Tensor) -> list[Tensor]:
    """The tensors in layout ``form``, copied where they are not."""
    return [t.contiguous(memory_format=form) for t in tensors]


def accumulator(x: Tensor) -> tl.dtype:
    """The type that sums over x are made in: float32; float64 for gradient checks in the interpreter."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


class Tuned:
    """A kernel with a list of configurations, of which the fastest is found by timing all of them at the first call for
    a new ``key`` (names of arguments; dtypes count too). Triton keeps the winners in its cache folder, so that another
    process does not time them again. Where tuning is off, and in the interpreter, the first of the list runs.
    """

    def __init__(self, kernel, configurations: list[triton.Config], key: list[str]):
        self.kernel, self.configurations = kernel, configurations
        self.first = configurations[0].all_kwargs()
        self.tuner = None if INTERPRETED else triton.autotune(configurations, key, cache_results=True)(kernel)

    def launch(self, grid: Callable[[dict], tuple], *args, **constants) -> None:
        if self.tuner is None or os.environ.get("ALEXNET_FAST_TUNE") == "0":
            self.kernel[grid](*args, **constants, **self.first)
        else:
            self.tuner[grid](*args, **constants)
