"""The CUDA backend's operators on CPU tensors: csrc/bindings linked with the launchers, AddressSanitizer watching.

What runs is what a GPU would run, public function, dispatcher, autograd formula, binding, launcher and kernel, but for
the device guard and the stream. The sanitizer has to be in a process from its start, so checks are modules of their
own, run by :func:`run` and beginning with :func:`take_over`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from alexnet_fast import backends
from alexnet_fast.ops import convolution
from alexnet_fast.ops.registry import LIBRARY

from . import host_build

TORCH = Path(torch.__file__).parent
ROOT = host_build.CSRC.parent
STEMS = ("lrn", "max_pool", "epilogue", "conv_relu", "conv_stage", "lpips_layer", "linear_int8", "linear_relu")
BINDINGS = (*STEMS, "conv_prepare")
FLAGS = [
    *("-std=c++17", "-g1", "-O1", "-Wall", "-Wextra", "-Werror", *host_build.ADDRESS),
    *("-DALEXNET_FAST_HOST_SIMT", "-DALEXNET_FAST_CUDA=1", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"),
    *(f"-I{host_build.CSRC}", f"-isystem{TORCH / 'include'}"),
]


def compile_binding(source: Path) -> Path:
    key = hashlib.sha256(repr([host_build.CXX, FLAGS, torch.__version__]).encode())
    for path in [*host_build.CSRC.glob("*.h"), *host_build.CSRC.glob("bindings/*.h"), source]:
        key.update(path.read_bytes())
    target = host_build.CACHE / f"{source.stem}.binding.{key.hexdigest()[:20]}.o"
    host_build.run_once([host_build.CXX, *FLAGS, "-c", str(source), "-o"], target)
    return target


def library() -> Path:
    """The bindings as a shared library that registers them for CPU tensors; built once per content."""
    compiled = [*host_build.kernel_files(), *host_build.runtime_files("address")]
    objects = [host_build.compile_object("address", source, host_build.CSRC) for source in compiled]
    sources = [*(host_build.CSRC / f"bindings/{stem}.cpp" for stem in BINDINGS), host_build.HERE / "bindings.cpp"]
    objects += [compile_binding(source) for source in sources]
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:20]
    target = host_build.CACHE / f"bindings.{key}.so"
    torch_libraries = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    command = [host_build.CXX, "-shared", *host_build.ADDRESS, *map(str, objects), *torch_libraries, "-o"]
    host_build.run_once(command, target)
    return target


def run(module: str, *arguments: str) -> str:
    """The output of ``python -m module``; a fault raises :class:`host_build.HostFaultError`."""
    # With libstdc++ beside it: the sanitizer looks for what throws exceptions once, at the start.
    preloaded = [
        subprocess.run([host_build.CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(preloaded),
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:malloc_context_size=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", module, str(library()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise host_build.HostFaultError(f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def take_over(path: str) -> None:
    """From now on ``auto`` takes the CUDA kernels for CPU tensors in this process, without TF32."""
    torch.ops.load_library(path)
    for name in ("conv_relu", "conv_relu_backward", "conv_stage"):
        LIBRARY.impl(f"{name}_cuda", convolution.own_kernel(name), "CPU")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    backends._build["cuda"] = "on a CPU"
    backends.AUTO["cpu"] = dict.fromkeys(STEMS, "cuda")
