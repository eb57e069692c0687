"""What was built, for which processors, against which torch, and how setup.py decides about CUDA."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alexnet_fast import _C, backends
from tests.second_torch import TORCH

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_build_info():
    info = _C.build_info()
    assert set(info) == {"compiler", "cpu_isa", "stable_abi", "sources", "cuda"}
    assert re.fullmatch("[0-9a-f]{16}", info["sources"])
    assert info["stable_abi"] == "2.11"
    assert info["cpu_isa"] in {"baseline", "avx2", "avx512"}
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+ for sm_80 sm_86 sm_90.*", info["cuda"])
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
    """The narrower instruction sets, which otherwise run only on other people's processors."""
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


@pytest.fixture
def small_clone(build_tools, tmp_path, monkeypatch) -> Path:
    """setup.py and one short source, word.cpp, with a header of its own; the current folder."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "alexnet_fast").mkdir()
    shutil.copy(ROOT / "alexnet_fast" / "sources.py", tmp_path / "alexnet_fast")
    (tmp_path / "csrc" / "bindings").mkdir(parents=True)
    source = (
        '#include "word.h"\nextern "C" __attribute__((visibility("default"))) const char* word() { return WORD; }\n'
    )
    (tmp_path / "csrc" / "bindings" / "word.cpp").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "build_ext", "--inplace"])
    monkeypatch.setenv("ALEXNET_FAST_CUDA", "0")
    return tmp_path


def compiler(folder: Path, line: str) -> str:
    """A C++ compiler that is that line of sh."""
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n{line}\n")
    script.chmod(0o755)
    return str(script)


def build(root: Path, word: str) -> tuple[bytes, int]:
    """The library of that word, and when its object was made. The header is left as it is where it holds the word."""
    header, line = root / "csrc" / "word.h", f'#define WORD "{word}"\n'
    if not header.exists() or header.read_text() != line:
        header.write_text(line)
    runpy.run_path("setup.py")  # in this process, which has imported torch
    (library,), (made,) = (root / "alexnet_fast").glob("_C*.so"), root.rglob("word.o")
    return library.read_bytes(), made.stat().st_mtime_ns


def test_an_object_serves_until_something_it_was_made_of_changes(small_clone, monkeypatch):
    """A header, the command, or what the compiler says of its version; of others' headers the version, not the place. A
    library in place is linked anew then."""
    first, at_first = build(small_clone, "earlier")
    assert b"earlier" in first
    assert build(small_clone, "earlier")[1] == at_first
    second, later = build(small_clone, "later")
    assert b"later" in second
    assert later > at_first
    monkeypatch.setenv("CXX", compiler(small_clone, '[ "$1" = --version ] && echo "$VERSION" || exec c++ "$@"'))
    times = []
    for version in "112":
        monkeypatch.setenv("VERSION", version)
        times.append(build(small_clone, "later")[1])
    monkeypatch.setattr("pybind11.get_include", lambda: str(small_clone / "elsewhere"))
    times.append(build(small_clone, "later")[1])
    monkeypatch.setattr(torch, "__version__", "3.0")
    times.append(build(small_clone, "later")[1])
    assert later < times[0] == times[1] < times[2] == times[3] < times[4]


# ---- Clone, sdist, wheel -------------------------------------------------------------------------------------------

WHERE = "import alexnet_fast as a; print(a.__file__, a.native._C.__file__, a.backend is not None, sep=chr(10))"


@pytest.fixture
def clone(tmp_path) -> Path:
    """The sources as git has them: without a compiled module."""
    root = tmp_path / "clone"
    for name in ("alexnet_fast", "csrc"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    shutil.copy(ROOT / "setup.py", root)
    return root


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder like site-packages, with the package and this build of its compiled module."""
    target = tmp_path / "site-packages" / "alexnet_fast"
    shutil.copytree(ROOT / "alexnet_fast", target, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    shutil.copy(_C.__file__, target)
    return target.parent


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    """What is installed beside torch, but this package."""
    folder = tmp_path_factory.mktemp("libraries")
    for path in Path(torch.__file__).parents[1].iterdir():
        if "alexnet_fast" not in path.name:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def isolated(libraries) -> Callable[[str, Path, Path], subprocess.CompletedProcess[str]]:
    """isolated(code, cwd, path): Python in ``cwd``, as a stranger types it, with ``path`` for site-packages; what is
    installed for these tests is not seen."""

    def run_in(code: str, cwd: Path, path: Path) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "-S", "-c", code, cwd=cwd, PYTHONPATH=os.pathsep.join(map(str, (path, libraries))))

    return run_in


@pytest.fixture
def build_tools() -> None:
    """What pip brings to an isolated build."""
    for name, least in (("pybind11", "2.13"), ("setuptools", "77")):
        pytest.importorskip(name, least, reason=f"{name}>={least} is not installed: the extra dev brings it")


def test_a_clone_takes_the_installed_module(isolated, clone, installed):
    done = isolated(WHERE, clone, installed)
    assert done.returncode == 0, done.stderr
    package, module, _ = done.stdout.splitlines()
    assert Path(package).parent == clone / "alexnet_fast"
    assert Path(module).parent == installed / "alexnet_fast"
    assert done.stderr == ""


def test_another_folder_takes_all_that_is_installed(isolated, clone, installed, tmp_path):
    package, module, _ = isolated(WHERE, tmp_path, installed).stdout.splitlines()
    assert {Path(package).parent, Path(module).parent} == {installed / "alexnet_fast"}


def test_a_module_beside_the_sources_comes_before_the_installed_one(isolated, clone, installed):
    shutil.copy(_C.__file__, clone / "alexnet_fast")
    _, module, _ = isolated(WHERE, clone, installed).stdout.splitlines()
    assert Path(module).parent == clone / "alexnet_fast"


@pytest.mark.parametrize("file", ["csrc/cpu/lrn_fwd.cpp", "csrc/cuda/common/math.cuh", "setup.py"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_module_of_other_sources_is_said_in_one_line(isolated, clone, installed, file, beside):
    if beside:
        shutil.copy(_C.__file__, clone / "alexnet_fast")
    with (clone / file).open("a") as source:
        source.write("\n")
    done = isolated(WHERE, clone, installed)
    assert done.returncode == 0, done.stderr
    (notice,) = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    where = (clone if beside else installed) / "alexnet_fast" / Path(_C.__file__).name
    command = "pip install --no-build-isolation -e ." if beside else "pip install ."
    assert notice.endswith(f"{where} was not built from the sources in {clone}; build them there: {command}")


def test_doctor_shows_a_module_of_other_sources(isolated, clone, installed):
    told = "from alexnet_fast.cli import main; import sys; sys.argv[1:] = ['doctor', '--json']; main()"
    facts = json.loads(isolated(told, clone, installed).stdout)["facts"]
    module = installed / "alexnet_fast" / Path(_C.__file__).name
    assert facts["compiled module"] == f"{module}, built from sources {facts['built: sources']}"
    (clone / "csrc" / "params.h").write_text("// other")
    facts = json.loads(isolated(told, clone, installed).stdout)["facts"]
    assert facts["compiled module"].startswith(f"{module} was not built from the sources in {clone}; ")


def test_sources_for_tests_alone_do_not_count(isolated, clone, installed):
    with (clone / "csrc" / "host_simt" / "host_simt.h").open("a") as source:
        source.write("\n")
    assert isolated(WHERE, clone, installed).stderr == ""


def test_without_any_module_one_line_says_what_to_run(isolated, clone, tmp_path):
    done = isolated("import alexnet_fast", clone, tmp_path)
    assert done.returncode == 1
    expected = rf"ImportError: alexnet_fast: no compiled module \(_C\) .* was found; run: pip install {clone}"
    assert re.fullmatch(expected, done.stderr.splitlines()[-1])


def test_no_sources_is_an_error_of_one_line(build_tools, clone):
    shutil.rmtree(clone / "csrc")
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=clone)
    assert done.returncode == 1
    assert done.stderr == "alexnet_fast: there are no sources in csrc/ to build from\n"


def test_the_sdist_holds_what_git_holds(build_tools, tmp_path):
    """The sdist has every file that a build or a test needs; names are compared."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tree = tmp_path / "tree"  # not in the clone: setuptools writes beside setup.py
    kept = run("git", "ls-files").stdout.splitlines()
    for name in kept:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    done = run(sys.executable, "-c", SDIST, tmp_path, cwd=tree)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert {name for name in kept if not name.startswith(".")} <= held
    assert not {name for name in held if name.endswith((".so", ".o"))}


SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


@pytest.mark.soak  # a minute of compilers; what the sdist holds is the test above
def test_sdist_wheel_import(isolated, build_tools, tmp_path):
    """`python -m build` makes the wheel from the sdist; without isolation, that torch need not be downloaded twice, and
    without the optimizer, which takes six of seven seconds."""
    pytest.importorskip("build", reason="build is not installed: the extra dev brings it")
    tree, dist = tmp_path / "tree", tmp_path / "dist"
    run("git", "clone", "-q", ROOT, tree)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree]
    done = run(*command, cwd=tmp_path, ALEXNET_FAST_CUDA="0", CXX=compiler(tmp_path, 'exec c++ "$@" -O0'))
    assert done.returncode == 0, done.stderr
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site-packages")
    done = isolated(WHERE, tmp_path, tmp_path / "site-packages")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[1]).parent == tmp_path / "site-packages" / "alexnet_fast"
    assert done.stderr == ""


# ---- One library for many versions of torch ------------------------------------------------------------------------


def test_the_library_uses_torchs_stable_abi_alone():
    """Its undefined symbols hold no C++ name of torch, at or c10: those change from release to release."""
    if not (nm := shutil.which("nm")):
        pytest.skip("nm (binutils) is not installed")
    symbols = run(nm, "--dynamic", "--undefined-only", "--demangle", _C.__file__).stdout
    assert "aoti_torch_" in symbols
    assert re.findall(r"\b(?:at|c10|torch)::\S*", symbols) == []


@pytest.mark.slow
def test_the_one_library_runs_under_a_second_torch(second_torch):
    """Forward and backward of every CPU operator."""
    done = second_torch("tests.ops.check_all")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torch {TORCH}")
