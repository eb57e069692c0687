"""Builds the one extension, alexnet_fast._C.

Torch-free sources are compiled here, file by file: csrc/cpu/*.cpp once per instruction set, csrc/cuda/*.cu by nvcc, and
csrc/cuda/sm90/*.cu for that one architecture.
csrc/bindings/*.cpp alone include torch, and of torch only its stable ABI, so one build serves torch 2.11 and newer.

ALEXNET_FAST_CUDA = auto (default: CUDA kernels if nvcc is found) | 0 (without) | 1 (nvcc is required)
CUDA_HOME         = where bin/nvcc is, before PATH
ALEXNET_FAST_SANITIZE = sanitizers to compile csrc/bindings with, such as address,undefined; see `make asan`
MAX_JOBS          = compilers at a time
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 11)  # the stable ABI of that version has all that the bindings call

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISAS = {"baseline": []} | ({"avx2": AVX2, "avx512": AVX512} if platform.machine() == "x86_64" else {})

SANITIZE = os.environ.get("ALEXNET_FAST_SANITIZE")
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"] if SANITIZE else []

# By virtual architecture, whose PTX serves all of its processors: of what they differ in, the kernels use what 90 has.
# sm_89 runs code of sm_86.
ARCHITECTURES = {"80": ["80", "86"], "90": ["90"]}
HOPPER = "90a"  # with wgmma, for compute capability 9.0 and no other
COMMON = ["-std=c++17", "-O3", "-Icsrc"]
HOST = [*COMMON, "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-math-errno", "-fno-trapping-math"]


def find_nvcc() -> str | None:
    """The nvcc to build with, or None. GPUs do not matter: builders often have none."""
    wish = os.environ.get("ALEXNET_FAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"ALEXNET_FAST_CUDA={wish}: expected auto, 0 or 1")
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if wish == "1" and nvcc is None:
        sys.exit(f"ALEXNET_FAST_CUDA=1, but there is no nvcc in {home + '/bin (CUDA_HOME)' if home else 'PATH'}")
    return None if wish == "0" else nvcc


def is_current(target: Path, read: Path, made: Path, told: str) -> bool:
    """Whether ``target`` was made by the command in ``told`` and no file listed in ``read`` is newer."""
    if not (target.exists() and read.exists() and made.exists() and made.read_text() == told):
        return False
    files = read.read_text().partition(":")[2].replace("\\\n", " ").split()
    return all(os.path.exists(file) and os.stat(file).st_mtime_ns < made.stat().st_mtime_ns for file in files)


class Build(build_ext):
    """Compiles the objects that are not there yet, in parallel, then lets setuptools link all of them."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        print(f"alexnet_fast: CUDA kernels {'by ' + nvcc if nvcc else 'off'}; CPU kernels for {', '.join(ISAS)}")
        torch_include = Path(torch.__file__).parent / "include"
        major, minor = OLDEST_TORCH
        define = [
            f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}ULL",
            f'-DALEXNET_FAST_STABLE_ABI="{major}.{minor}"',
            f"-DALEXNET_FAST_CUDA={int(bool(nvcc))}",
        ]
        includes = [f"-isystem{path}" for path in (torch_include, pybind11.get_include(), *self.compiler.include_dirs)]
        cxx = os.environ.get("CXX", "c++")

        jobs = [(source, "", [cxx, *HOST, *SANITIZERS, *define, *includes]) for source in glob("csrc/bindings/*.cpp")]
        if not jobs:
            sys.exit("alexnet_fast: there are no sources in csrc/ to build from")
        for source in glob("csrc/cpu/*.cpp"):
            isas = {"": []} if source.endswith("dispatch.cpp") else ISAS
            jobs += [(source, isa, [cxx, *HOST, *flags, f"-DALEXNET_FAST_ISA={isa}"]) for isa, flags in isas.items()]
        if nvcc:
            codes = {virtual: [f"sm_{real}" for real in reals] for virtual, reals in ARCHITECTURES.items()}
            names = f'-DALEXNET_FAST_ARCHITECTURES="{" ".join(chain(*codes.values(), [f"sm_{HOPPER}"]))}"'
            codes["90"].append("compute_90")  # cards to come compile this when they are first used
            targets = [f"-gencode=arch=compute_{virtual},code=[{','.join(code)}]" for virtual, code in codes.items()]
            strict = ["-Werror=all-warnings", "-Xptxas=-warn-spills,-Werror", "-Xcompiler=-fPIC,-fvisibility=hidden"]
            jobs += [(s, "cuda", [nvcc, *COMMON, *strict, *targets, names]) for s in glob("csrc/cuda/*.cu")]
            targets = [f"-gencode=arch=compute_{HOPPER},code=sm_{HOPPER}"]
            jobs += [(s, "cuda", [nvcc, *COMMON, *strict, *targets]) for s in glob("csrc/cuda/sm90/*.cu")]
        jobs.sort(key=lambda job: -Path(job[0]).stat().st_size)

        # For the one file that answers questions about the build: the others need not be compiled anew with each edit.
        sources = runpy.run_path("alexnet_fast/sources.py")["fingerprint"](Path())
        for source, _, command in jobs:
            if source.endswith("module.cpp"):
                command.append(f'-DALEXNET_FAST_SOURCES="{sources}"')

        # An object serves until its command, its compiler or a file that it was made from changes, whether pip builds
        # the clone in isolation or in place: headers of others, wherever they lie, are known by their versions.
        others = f"Python {sys.version}, torch {torch.__version__}, pybind11 {pybind11.__version__}"
        versions = {
            compiler: subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
            for compiler in {command[0] for _, _, command in jobs}
        }

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, variant, command = job
            target = Path("build/objects", variant, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            read, made = target.with_suffix(".d"), target.with_suffix(".txt")  # headers; the command that succeeded
            told = "\n".join([*(word for word in command if word not in includes), versions[command[0]], others])
            if is_current(target, read, made, told):
                return str(target)
            began = time.time_ns()
            command = [*command, "-c", source, "-o", str(target), "-MMD", "-MF", str(read)]
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            sys.stderr.write(done.stderr)
            # ptxas only mentions it where it lets every wgmma wait for the one before (C7510 and its like).
            if done.returncode != 0 or re.search(r"\(C75\d\d\)", done.stderr):
                sys.exit(f"alexnet_fast: {source} does not compile as it should")
            made.write_text(told)
            os.utime(made, ns=(began, began))  # what is edited meanwhile is newer
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            ext.extra_objects = list(pool.map(compile_one, jobs))
        ext.depends = ext.extra_objects  # newer than a library that an earlier build left in place: it is linked anew
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        if nvcc:  # static: the library then needs no CUDA runtime of any version beside it
            told = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
            libraries += [*re.findall(r'"(-L[^"]+)"', told), "-lcudart_static"]
        ext.extra_link_args = [*SANITIZERS, *libraries, "-lrt", "-lpthread", "-ldl"]
        super().build_extension(ext)


setup(ext_modules=[Extension("alexnet_fast._C", sources=[], language="c++")], cmdclass={"build_ext": Build})
