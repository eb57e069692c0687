"""Where things are: every operator has its fixed set of files, imports point one way, and kernels know no torch."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alexnet_fast import backends, ops, reference
from tests.ops.samples import FUNCTIONS, SAMPLES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alexnet_fast"
CSRC = ROOT / "csrc"

SHARED_PAGES = {
    "__init__",
    "arguments",
    "convolution",
    "registry",
    "run",
    "second",
}  # of ops/: used by several operators' pages
STEMS = sorted({page.stem for page in (PACKAGE / "ops").glob("*.py")} - SHARED_PAGES)
# The passes that have a C++ kernel: forward and backward, but of these. A convolution or a matrix product is that of
# torch's library, and the rest epilogue's; images get no gradient, nor do int8 weights, beside which torch has all.
PASSES = {
    "conv_relu": (),
    "conv_stage": (),
    "linear_relu": (),
    "linear_relu_dropout": (),
    "augment": ("fwd",),
    "linear_int8": ("fwd",),
}
# Bytes in, and for them no gradient: their tests share nothing with the others'.
UNSAMPLED = {"augment", "linear_int8"}
# Files that are no operator's: the optimizer's step, packed weights, successions of layers with their guard, what
# kernels or module start by, LRN in ONNX, a kernel of two operators'.
OTHERS = {"sgd", "packed", "dispatch", "module", "runtime", "conv_prepare", "conv_first_fwd"}
OTHERS |= {"onnx", "run", "guard", "forms"}

# ---- One stem, fixed places ----------------------------------------------------------------------------------------


def files_of(stem: str) -> list[str]:
    files = [f"alexnet_fast/reference/{stem}.py", f"tests/ops/test_{stem}.py", f"benchmarks/bench_{stem}.py"]
    passes = PASSES.get(stem, ("fwd", "bwd"))
    return files + [f"csrc/cpu/{stem}_{name}.cpp" for name in passes] + [f"csrc/bindings/{stem}.cpp"] * bool(passes)


def public(stem: str) -> Callable:
    return getattr(ops, stem) if stem in UNSAMPLED else FUNCTIONS[stem]


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_has_all_its_files(stem):
    assert [file for file in files_of(stem) if not (ROOT / file).is_file()] == []


@pytest.mark.parametrize("stem", STEMS)
def test_an_operator_is_public_documented_and_sampled(stem):
    function = public(stem)
    assert function.__name__ in ops.__all__
    assert function.__name__ in reference.__all__
    assert all(parameter in function.__doc__ for parameter in inspect.signature(function).parameters)
    assert stem in UNSAMPLED or any(sample.stem == stem for sample in SAMPLES)
    assert all(stem in row for row in backends.AUTO.values())


@pytest.mark.parametrize("stem", STEMS)
def test_the_reference_has_the_same_signature(stem):
    """Minus ``backend``: names, order, defaults and what is by keyword."""
    name = public(stem).__name__

    def shape(function) -> list[tuple]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.default, p.kind) for p in parameters if p.name != "backend"]

    assert shape(getattr(ops, name)) == shape(getattr(reference, name))


def test_no_file_is_without_its_operator():
    """A kernel whose page is gone, or is called otherwise."""
    sources = [file.stem for folder in ("cpu", "cuda", "bindings") for file in (CSRC / folder).glob("*.c*")]
    references = [page.stem for page in (PACKAGE / "reference").glob("*.py")]
    assert {re.sub("_(fwd|bwd)$", "", name) for name in sources + references} - OTHERS - {"__init__"} <= set(STEMS)


@pytest.mark.parametrize(
    ("macro", "files"),
    [("CPU_KERNELS", "cpu/*.cpp"), ("CUDA_LAUNCHERS", "cuda/*.cu"), ("CUDA_SM90_LAUNCHERS", "cuda/sm90/*.cu")],
)
def test_the_contents_page_lists_every_kernel(macro, files):
    page = (CSRC / "launchers.h").read_text().replace("\\\n", " ")
    (definition,) = re.findall(rf"#define ALEXNET_FAST_{macro}\(X\)(.*)", page)
    listed = set(re.findall(r"\bX\((\w+), \w+\)", definition))
    assert listed - OTHERS == {file.stem for file in CSRC.glob(files)} - OTHERS


# ---- Imports point one way -----------------------------------------------------------------------------------------

LEVELS = [
    {"__main__"},
    {"cli"},
    {"train", "bench"},
    {"explain"},
    {"data", "parallel", "models", "optim"},
    {"graphs", "nn"},
    {"ops"},
    {"reference", "triton_kernels"},
    {"backends", "errors", "geometry", "malloc", "recording", "terminal", "tuning"},
    {"native", "_C"},
    {"sources", "interrupt"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(file: Path) -> list[str]:
    """Modules of the package that a file imports, wherever in the file, without the package's name."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            package = node.module == "alexnet_fast"
            found += [f"alexnet_fast.{alias.name}" for alias in node.names] if package else [node.module]
    ours = [name.removeprefix("alexnet_fast.") for name in found if name.startswith("alexnet_fast.")]
    return [name for name in ours if name != "__version__"]


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    if file == PACKAGE / "__init__.py":
        return
    top = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(file):
        target = name.split(".")[0]
        assert target == top or LEVEL[target] > LEVEL[top], f"{top} imports {name}"


def test_imports_are_seen():
    """The reader of imports finds those inside functions and of names from the package."""
    assert "triton_kernels" in imports(PACKAGE / "ops" / "registry.py")
    assert {"reference", "backends", "ops.registry"} <= set(imports(PACKAGE / "ops" / "lrn.py"))


# ---- Kernels know no torch -----------------------------------------------------------------------------------------

SOURCES = [file for file in CSRC.rglob("*") if file.suffix in {".h", ".cpp", ".cu", ".cuh"}]


@pytest.mark.parametrize("file", sorted(SOURCES), ids=lambda file: str(file.relative_to(CSRC)))
def test_headers(file):
    """torch is for the bindings, of torch only what its stable ABI offers, with the C functions that AOTInductor's
    models call, which keep their signatures too; kernels do not reach into the bindings."""
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', file.read_text(), re.MULTILINE)
    if file.parent.name == "bindings":
        torch_headers = [header for header in included if header.startswith(("torch/", "ATen/", "c10/"))]
        stable = "torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h"
        assert all(header.startswith(stable) for header in torch_headers)
    else:
        assert not [h for h in included if re.match("torch|ATen|c10|pybind11|Python|bindings/|.*torch_compat", h)]
