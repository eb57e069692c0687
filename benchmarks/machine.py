"""What a run is measured on: the machine, the versions, the commit, and the machine's own ceilings."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from time import perf_counter

import torch

PACKAGES = ("torch", "triton", "numpy", "onnx", "onnxruntime", "openvino", "jax")
ROOT = Path(__file__).parents[1]
MEASURED = ("alexnet_fast", "csrc", "benchmarks", ":!benchmarks/results")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit, with a + where what is measured differs from it. A copy without .git names its own in
    ALEXNET_FAST_COMMIT; 'unknown' if it does not."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + "+" * bool(
            git("status", "--porcelain", "-uno", "--", *MEASURED)
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ALEXNET_FAST_COMMIT", "unknown")


def processor() -> str:
    try:
        (name,) = set(re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    except (OSError, ValueError):
        name = platform.processor() or platform.machine()
    return name


def facts() -> dict[str, object]:
    """The machine; of a GPU also its driver and limits as nvidia-smi states them."""
    from alexnet_fast import _C  # here: `make gpu-report` needs the other functions before it is built

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about: dict[str, object] = {
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "kernels": _C.build_info()["cpu_isa"],
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about |= _smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
    return about


def clocks() -> dict[str, str]:
    """A GPU's clocks at this moment."""
    return _smi("clocks.sm", "clocks.mem", "temperature.gpu") if torch.cuda.is_available() else {}


def _smi(*fields: str) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return dict(zip(fields, lines[0].split(", "), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return dict.fromkeys(fields, "unknown")


def folder(about: dict[str, object]) -> str:
    """The results' folder: the device's name in lower case, with the cores of a CPU."""
    name = str(about.get("gpu") or f"{about['processor']} {about['cores']} cores")
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _seconds(call, rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return min(times)


def ceilings() -> dict[str, float]:
    """Measured: GB/s of a large copy, reads and writes counted, and TFLOP/s of matrix products on random data.

    The product is the faster of torch.matmul and, on CPUs, oneDNN with a packed weight.
    """
    gpu = torch.cuda.is_available()
    device, side = ("cuda", 8192) if gpu else ("cpu", 2048)
    size = 2**30 if gpu else 2**28
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_s": 2 * size / _seconds(lambda: target.copy_(source), 7) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = _seconds(lambda a=a, b=b: a @ b, 5)
        if not gpu and torch.backends.mkldnn.is_available():
            packed = torch.ops.mkldnn._reorder_linear_weight(b, side)
            linear = torch.ops.mkldnn._linear_pointwise.default
            best = min(best, _seconds(lambda a=a, p=packed, f=linear: f(a, p, None, "none", [], ""), 5))
        found[f"{str(dtype).removeprefix('torch.')}_tflop_s"] = 2 * side**3 / best / 1e12
    return {name: float(f"{value:.4g}") for name, value in found.items()}
