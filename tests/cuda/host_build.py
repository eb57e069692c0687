"""Builds csrc/cuda/*.cu for the CPU and runs launchers in it, case by case.

Two builds of the same sources, each a program of its own, so that a fault ends that program and not pytest:

``threads``  the compiler announces each load and store to csrc/host_simt/races.cpp: races, uninitialized and misaligned
             accesses, and accesses outside of tensors and shared arrays
``address``  AddressSanitizer and UndefinedBehaviorSanitizer: what lies in the kernels' own arrays and arithmetic
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CACHE = Path(
    os.environ.get("ALEXNET_FAST_HOST_CACHE", Path(tempfile.gettempdir()) / f"alexnet_fast_host_{os.getuid()}")
)
CXX = os.environ.get("CXX", "g++")
COMMON = [
    "-std=c++17",
    "-g1",
    "-O1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-missing-field-initializers",
    "-DALEXNET_FAST_HOST_SIMT",
]
# What AddressSanitizer or the other build finds is not checked twice, and its checks are calls: a sixth to compile.
ADDRESS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=alignment,null,vptr,object-size,pointer-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fPIC",
]
BUILDS = ("threads", "address")
FAULT_EXIT = 70  # host_simt::kFaultExit
SANITIZER_EXIT = 71


class HostFaultError(AssertionError):
    """A kernel did something that it must not do; the message is the report."""


# ---- Build -----------------------------------------------------------------------------------------------------------


def flags(kind: str, source: Path) -> list[str]:
    """The compiler's flags for ``source``. host_simt's own sources watch for races, and are not watched themselves."""
    if kind == "address":
        return ADDRESS
    return ["-fsanitize=thread"] if source.suffix == ".cu" else []


def headers(source: Path, csrc: Path) -> list[Path]:
    """The headers that ``source`` may include: a kernel all of them, host_simt's sources none of the kernels'."""
    common = csrc.glob("cuda/common/*") if source.suffix == ".cu" else ()
    return sorted([*csrc.glob("*.h"), *csrc.glob("host_simt/*.h"), *common])


def compile_object(kind: str, source: Path, csrc: Path) -> Path:
    command = [CXX, *COMMON, *flags(kind, source), f"-I{csrc}", "-x", "c++", "-c", str(source)]
    key = hashlib.sha256(repr([CXX, COMMON, flags(kind, source)]).encode())
    for path in [*headers(source, csrc), source]:
        key.update(path.read_bytes())
    target = CACHE / f"{source.stem}.{kind}.{key.hexdigest()[:20]}.o"
    run_once([*command, "-o"], target)
    return target


def run_once(command: list[str], target: Path) -> None:
    """Runs a compiler unless its output is there; of two test runs at once the second waits for the first one's."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(target.suffix + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as scratch:
                done = subprocess.run([*command, scratch.name], capture_output=True, text=True)
            if done.returncode != 0:
                os.unlink(scratch.name)
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            os.chmod(scratch.name, 0o755)
            os.replace(scratch.name, target)


def kernel_files() -> list[Path]:
    """Everything that launches a kernel, those for one architecture after those for all."""
    return [path for path in sorted((CSRC / "cuda").rglob("*.cu")) if path.stem != "runtime"]


def unit(source: Path) -> str:
    return "::".join(source.with_suffix("").parts[len((CSRC / "cuda").parts) :])


def runtime_files(kind: str) -> list[Path]:
    names = ["scheduler", "clocks", "launches", "memory", "matrix", "bulk", "products", "approximate"]
    return [CSRC / f"host_simt/{name}.cpp" for name in names + (["races"] if kind == "threads" else [])]


def build(
    kind: str,
    kernels: list[Path] | None = None,
    main: Path | None = None,
    changed: dict[str, Path] | None = None,
) -> Path:
    """The program made of ``kernels`` (all of csrc/cuda), ``main`` (the runner) and host_simt, once per content.

    ``changed`` maps a kernel file's name below csrc/cuda, with :: for / and no suffix, to another csrc/ from which it
    alone is compiled, headers and all."""
    kernels = kernel_files() if kernels is None else kernels
    # First what is changed: of a header's functions that several files have, the linker takes the first file's.
    kernels = sorted(kernels, key=lambda source: unit(source) not in (changed or {}))
    sources = [*kernels, main or CSRC / "host_simt/runner.cpp", *runtime_files(kind)]

    def compile_one(source: Path) -> Path:
        csrc = (changed or {}).get(unit(source))
        return (
            compile_object(kind, csrc / source.relative_to(CSRC), csrc) if csrc else compile_object(kind, source, CSRC)
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:20]
    target = CACHE / f"{(main or sources[len(kernels)]).stem}.{kind}.{key}"
    # Fixed addresses let reports name source lines.
    link = ADDRESS if kind == "address" else ["-no-pie"]
    run_once([CXX, *link, *map(str, objects), "-o"], target)
    return target


@cache
def runner(kind: str) -> Path:
    return build(kind)


# ---- Run -------------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One call of a launcher.

    ``inputs`` and ``outputs`` name the pointers of ``params``; outputs lend their shape, dtype and strides. Tensors
    must be dense. ``workspace`` names the pointer to what ``launcher``_workspace_bytes asks for. ``offsets`` shifts a
    tensor by that many bytes from a 256-byte boundary.
    """

    launcher: str
    params: ctypes.Structure
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    workspace: str | None = None
    offsets: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    schedules: int = 1


@dataclass
class Result:
    error: int
    read: int  # bytes of global memory in the build `threads`; what a block reads again counts once
    written: int
    outputs: dict[str, Tensor]


def storage_bytes(tensor: Tensor) -> bytes:
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def like(template: Tensor, data: bytes) -> Tensor:
    if not data:
        return torch.empty_like(template)
    flat = torch.frombuffer(bytearray(data), dtype=template.dtype)
    return flat.as_strided(template.shape, template.stride())


def encode(case: Case) -> bytes:
    name, params = case.launcher.encode(), bytes(case.params)
    tensors = [(key, tensor, 0) for key, tensor in case.inputs.items()]
    tensors += [(key, tensor, 1) for key, tensor in case.outputs.items()]
    tensors += [(case.workspace, torch.empty(0), 2)] if case.workspace else []
    parts = [struct.pack("<I", len(name)), name, struct.pack("<I", len(params)), params]
    parts.append(struct.pack("<QII", case.seed, case.schedules, len(tensors)))
    for key, tensor, role in tensors:
        size = tensor.numel() * tensor.element_size()
        offset = getattr(type(case.params), key).offset
        parts.append(struct.pack("<IIQQ", offset, role, size, case.offsets.get(key, 0)))
        if role == 0:
            parts.append(storage_bytes(tensor))
    return b"".join(parts)


def run(kind: str, cases: list[Case], program: Path | None = None, timeout: float = 300) -> list[Result]:
    """Runs all cases in one process of the build ``kind``. A fault raises :class:`HostFaultError`, its report."""
    with tempfile.TemporaryDirectory() as folder:
        stream, results = Path(folder, "cases"), Path(folder, "results")
        stream.write_bytes(b"".join(map(encode, cases)))
        run_program([program or runner(kind), stream, results], timeout)
        data = results.read_bytes()
    found, at = [], 0
    for case in cases:
        error, read, written = struct.unpack_from("<iqq", data, at)
        at += 20
        outputs = {}
        for key, template in case.outputs.items():
            size = template.numel() * template.element_size()
            outputs[key] = like(template, data[at : at + size])
            at += size
        found.append(Result(error, read, written, outputs))
    return found


def run_program(command: list, timeout: float = 300) -> None:
    environment = os.environ | {
        "ASAN_OPTIONS": f"exitcode={SANITIZER_EXIT}:detect_leaks=0:malloc_context_size=1",
        "UBSAN_OPTIONS": f"exitcode={SANITIZER_EXIT}:print_stacktrace=1",
    }
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, timeout=timeout
    )
    if done.returncode != 0:
        *_, case, report = ["", *re.split(r"^(runner: case.*)$", done.stderr, flags=re.MULTILINE)]
        raise HostFaultError(f"exit {done.returncode}\n{case}\n" + "\n".join(report.splitlines()[:60]))
