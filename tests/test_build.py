"""What was built, for which processors, against which torch, and how setup.py decides about CUDA."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_fast
from alexnet_fast import _C, backends

ROOT = Path(__file__).parents[1]
SECOND_TORCH = "2.14.1"


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "cpu_isa", "stable_abi", "cuda"}
    assert info["stable_abi"] == "2.11"
    assert info["cpu_isa"] in {"baseline", "avx2", "avx512"}
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+ for sm_80 sm_86 sm_89 sm_90.*", info["cuda"])
    assert (info["cuda"] is None) == backends.missing("cuda").startswith("built without CUDA")


# ---- Instruction sets ----------------------------------------------------------------------------------------------

NEEDED_FLAGS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def processor_flags() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


@pytest.mark.parametrize("isa", NEEDED_FLAGS)
def test_every_instruction_set_computes_the_same(isa):
    """The narrower ones run only on other people's processors."""
    if lacking := NEEDED_FLAGS[isa] - processor_flags():
        pytest.skip(f"this processor has no {', '.join(sorted(lacking))}")
    done = run(sys.executable, "-m", "tests.ops.check_all", ALEXNET_FAST_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert f", {isa}, " in done.stdout


def test_the_widest_instruction_set_is_taken():
    usable = [isa for isa, flags in NEEDED_FLAGS.items() if flags <= processor_flags()]
    done = run(
        sys.executable, "-c", "from alexnet_fast import _C; print(_C.build_info()['cpu_isa'])", ALEXNET_FAST_ISA=""
    )
    assert done.stdout.strip() == usable[-1]


def test_an_unknown_instruction_set_is_named():
    done = run(sys.executable, "-c", "import alexnet_fast", ALEXNET_FAST_ISA="mmx")
    assert done.returncode == 1
    assert "ALEXNET_FAST_ISA=mmx: not built, or not on this processor" in done.stderr.splitlines()[-1]


# ---- setup.py ------------------------------------------------------------------------------------------------------

# setup.py without its imports of torch and pybind11, which take seconds, and without its last statement.
FIND_NVCC = """
import runpy, setuptools, sys, types
setuptools.setup = lambda **arguments: None
sys.modules |= {name: types.ModuleType(name) for name in ("torch", "pybind11")}
print(runpy.run_path("setup.py")["find_nvcc"]())
"""


@pytest.fixture
def cuda_home(tmp_path) -> Path:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc.parents[1]


@pytest.mark.parametrize(
    ("wish", "home", "answer"),
    [
        ("auto", True, "nvcc"),
        ("1", True, "nvcc"),
        ("0", True, "None"),
        ("auto", False, "None"),
        ("1", False, "ALEXNET_FAST_CUDA=1, but there is no nvcc in {empty}/bin (CUDA_HOME)"),
        ("1", None, "ALEXNET_FAST_CUDA=1, but there is no nvcc in PATH"),
        ("yes", True, "ALEXNET_FAST_CUDA=yes: expected auto, 0 or 1"),
    ],
)
def test_cuda_is_decided_by_nvcc(wish, home, answer, cuda_home, tmp_path):
    """home: one with nvcc, one without, or none (and no nvcc in PATH). An error is one line."""
    empty = tmp_path / "empty"
    environment = {"ALEXNET_FAST_CUDA": wish, "PATH": str(empty), "CUDA_HOME": ""}
    if home is not None:
        environment["CUDA_HOME"] = str(cuda_home if home else empty)
    done = run(sys.executable, "-c", FIND_NVCC, **environment)
    if answer == "nvcc":
        answer = str(cuda_home / "bin" / "nvcc")
    failed = answer.startswith("ALEXNET_FAST_CUDA")
    assert done.returncode == int(failed)
    assert (done.stderr if failed else done.stdout) == answer.format(empty=empty) + "\n"


def test_a_library_in_place_is_linked_anew_when_a_header_has_changed(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "alexnet_fast").mkdir()
    (tmp_path / "csrc" / "bindings").mkdir(parents=True)
    source = (
        '#include "word.h"\nextern "C" __attribute__((visibility("default"))) const char* word() { return WORD; }\n'
    )
    (tmp_path / "csrc" / "bindings" / "word.cpp").write_text(source)
    for word in ("earlier", "later"):
        (tmp_path / "csrc" / "word.h").write_text(f'#define WORD "{word}"\n')
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        done = run(*command, cwd=tmp_path, ALEXNET_FAST_CUDA="0")
        assert done.returncode == 0, done.stderr
        (library,) = (tmp_path / "alexnet_fast").glob("_C*.so")
        assert word.encode() in library.read_bytes()


# ---- One library for many versions of torch ------------------------------------------------------------------------


def test_the_library_uses_torchs_stable_abi_alone():
    """Its undefined symbols hold no C++ name of torch, at or c10: those change from release to release."""
    if not (nm := shutil.which("nm")):
        pytest.skip("nm (binutils) is not installed")
    symbols = run(nm, "--dynamic", "--undefined-only", "--demangle", _C.__file__).stdout
    assert "aoti_torch_" in symbols
    assert re.findall(r"\b(?:at|c10|torch)::\S*", symbols) == []


@pytest.mark.slow
def test_the_one_library_runs_under_a_second_torch(tmp_path):
    """Forward and backward of every CPU operator, in a venv of its own. ALEXNET_FAST_TEST_CACHE names a folder in which
    the venv (about 5 GB) stays for the next time."""
    cache = Path(os.environ.get("ALEXNET_FAST_TEST_CACHE") or tmp_path)
    python = cache / f"torch-{SECOND_TORCH}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={SECOND_TORCH}"], check=True)
    copies = tmp_path / "copies"
    shutil.copytree(Path(alexnet_fast.__file__).parent, copies / "alexnet_fast")
    shutil.copytree(ROOT / "tests" / "ops", copies / "tests" / "ops")
    done = run(python, "-m", "tests.ops.check_all", cwd=copies, PYTHONPATH=str(copies))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torch {SECOND_TORCH}")
