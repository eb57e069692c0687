"""Which implementation of an operator runs: what is here, why one is missing, and what ``auto`` takes.

- ``reference``: plain PyTorch, everywhere
- ``cpu``: C++ of this package; convolutions through the oneDNN that torch carries
- ``cuda``: CUDA C++ of this package, convolutions included, where it was built with nvcc and torch sees a GPU
- ``triton``: Triton kernels of this package; on a CPU through its interpreter (TRITON_INTERPRET=1)
- ``auto``: the fastest of them for the operator and the device, by the table ``AUTO``; for convolutions and
  ``linear_relu`` on GPUs also for the shape, and with cuDNN or cuBLAS among them, by alexnet_fast/tuning.py

The choice, first wins: an operator's ``backend=`` argument, ``with alexnet_fast.backend(name):``, the environment
variable ALEXNET_FAST_BACKEND, ``auto``. A named backend never falls back: it raises :class:`BackendError` and says why.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.onnx
from torch import Tensor
from torch.autograd import forward_ad

from alexnet_fast import _C

NAMES = ("reference", "cpu", "cuda", "triton")
HALF = (torch.float16, torch.bfloat16)
DTYPES = {
    "reference": (torch.float32, torch.float64, *HALF),
    "cpu": (torch.float32, torch.float64, *HALF),
    "cuda": (torch.float32, *HALF),
    "triton": (torch.float32, *HALF),
    "tuned": (torch.float32, *HALF),
}

# What ``auto`` takes, per device type and operator. What changes here at run time counts after forget().
# "tuned": what alexnet_fast/tuning.py chooses for the shape; it has no name for callers.
#
# cpu: measured by `pytest benchmarks`. cuda: the pointwise kernels move fewer bytes. Which convolution is fastest,
# cuDNN's or ours, in one kernel or two, depends on shape and batch (benchmarks/results/*/layers.json).
AUTO = {
    "cpu": {
        "lrn": "cpu",
        "max_pool": "cpu",
        "epilogue": "cpu",
        "conv_relu": "cpu",
        "conv_stage": "cpu",
        "linear_relu": "cpu",
        "linear_relu_dropout": "reference",
        "linear_int8": "cpu",
        "augment": "cpu",
        "lpips_layer": "cpu",
        "sgd": "cpu",
    },
    "cuda": {
        "lrn": "cuda",
        "max_pool": "cuda",
        "epilogue": "cuda",
        "conv_relu": "tuned",
        "conv_stage": "tuned",
        "linear_relu": "tuned",
        "linear_relu_dropout": "triton",
        "linear_int8": "cuda",
        "augment": "triton",
        "lpips_layer": "cuda",
        "sgd": "triton",
    },
}


class BackendError(RuntimeError):
    """A named backend is unknown, missing here, or does not cover the call; the message says which and why."""


@dataclass(frozen=True)
class Status:
    """One row of :func:`report`: ``reason`` says why the backend is not ``available`` here ('' where it is)."""

    name: str
    available: bool
    reason: str


_build = _C.build_info()
_triton = importlib.util.find_spec("triton") is not None


class _Chosen(threading.local):
    name = os.environ.get("ALEXNET_FAST_BACKEND") or "auto"  # of threads that have chosen none


_chosen = _Chosen()
prepared: list[dict] = []  # what operators have chosen so far; forget() empties them


def _check_name(name: str) -> None:
    if name not in NAMES and name != "auto":
        raise BackendError(f"backend: unknown backend {name!r}; known are auto, {', '.join(NAMES)}")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block, operators called by this thread run on backend ``name``: one of ``NAMES``, or ``auto``.

    Backward runs on the backend that forward ran on, wherever it is called.
    """
    _check_name(name)
    before = current()
    _chosen.name = name
    try:
        yield
    finally:
        _chosen.name = before


def current() -> str:
    """The name in force in this thread."""
    return _chosen.name


def forget() -> None:
    """Lets operators choose anew. They choose once for each form of their arguments, and would not see a changed
    ``AUTO``."""
    for kept in prepared:
        kept.clear()


def missing(name: str) -> str:
    """Why backend ``name`` cannot run on this machine; '' if it can."""
    if name == "cuda":
        if _build["cuda"] is None:
            return "built without CUDA: no nvcc was found, or ALEXNET_FAST_CUDA=0"
        if torch.version.cuda is None:
            return "this torch is a build without CUDA"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
    if name == "triton":
        if not _triton:
            return "the package triton is not installed"
        if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
            return "torch sees no CUDA device (TRITON_INTERPRET=1 runs the kernels on a CPU, slowly)"
    return ""


def report() -> list[Status]:
    """All backends, with the reason for each that cannot run here."""
    return [Status(name, not (reason := missing(name)), reason) for name in NAMES]


def refuses_here() -> str:
    """What PyTorch is doing at this moment that operators registered from Python have no rules for; '' for nothing. A
    traced graph gets plain PyTorch because it may be called with gradients later."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.onnx.is_in_onnx_export():
        return "export to ONNX"
    return ""


def exports_plainly() -> bool:
    """Whether torch.export makes a program and no backend is named: modules that stand for torch's then go into it as
    torch's operators, which quantizers and other runtimes know. ``with backend("cpu"):`` keeps this package's."""
    return torch.compiler.is_exporting() and current() in ("auto", "reference")


def choose(operator: str, input: Tensor, named: str | None, refusal: str = "", *, cuda_refusal: str = "") -> str:
    """The backend that a call of ``operator`` (a stem, such as ``lrn``) on ``input`` runs on, or ``tuned``.

    ``named`` is the call's ``backend=``. ``refusal`` says what in its arguments only the reference covers, if anything,
    ``cuda_refusal`` what the CUDA kernels do not.
    """
    name = current() if named is None else named
    device = input.device.type
    refusal = refuses_here() or refusal
    if name == "auto":
        name = AUTO.get(device, {}).get(operator, "reference")
        native = name in ("cuda", "tuned")
        absent = (native and _build["cuda"] is None) or (name == "triton" and not _triton)
        if refusal or (native and cuda_refusal) or absent or input.dtype not in DTYPES[name]:
            return "reference"
        return name
    _check_name(name)
    if name == "reference":
        return name
    if name == "cuda":
        refusal = refusal or cuda_refusal
    if refusal:
        raise BackendError(f"{operator}: backend {name!r} does not cover {refusal}; 'reference' and 'auto' do")
    if device != name and not (name == "triton" and device in ("cuda", "cpu")):
        raise BackendError(f"{operator}: backend {name!r} does not run on {device} tensors")
    if reason := missing(name):
        raise BackendError(f"{operator}: backend {name!r} is missing: {reason}")
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(f"{operator}: backend 'triton' runs on cpu tensors under TRITON_INTERPRET=1 alone")
    if input.dtype not in DTYPES[name]:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES[name])
        raise BackendError(f"{operator}: backend {name!r} takes {wanted}, got {input.dtype}")
    return name
