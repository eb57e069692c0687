"""Finds ``_C``, the compiled module, and warns where it was not built from the sources beside this package.

``pip install .`` puts _C into site-packages. In the clone, python and pytest find the clone's alexnet_fast first, which
has none: it takes the installed one. A build in place or an editable install has its _C here.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  before _C, which needs torch's libraries

from alexnet_fast import interrupt
from alexnet_fast.sources import fingerprint

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent


def load() -> ModuleType:
    """``alexnet_fast._C``: the one beside this package, or else the first on ``sys.path``.

    Raises :class:`ImportError`, in one line with the remedy, where there is none.
    """
    folders = [PACKAGE, *(Path(entry, PACKAGE.name) for entry in sys.path)]
    spec = PathFinder.find_spec("alexnet_fast._C", [str(folder) for folder in folders])
    if spec is None:
        remedy = f"run: pip install {ROOT}" if (ROOT / "setup.py").is_file() else "install the package anew"
        version = ".".join(map(str, sys.version_info[:2]))
        raise ImportError(f"alexnet_fast: no compiled module (_C) for this Python {version} was found; {remedy}")
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def stale(module: ModuleType) -> str:
    """One line if ``module`` was built from other sources than the clone's that this package lies in; else ''."""
    wanted = fingerprint(ROOT)
    if not wanted or module.build_info().get("sources") == wanted:
        return ""
    beside = Path(module.__file__).resolve().parent == PACKAGE
    command = "pip install --no-build-isolation -e ." if beside else "pip install ."
    return f"{module.__file__} was not built from the sources in {ROOT}; build them there: {command}"


def describe() -> str:
    """Where the compiled module is from, in one line, with what is wrong about it: a row of `alexnet-fast doctor`."""
    return NOTICE or f"{_C.__file__}, built from sources {_C.build_info()['sources']}"


_C = load()
try:
    _C.build_info()
except RuntimeError as error:  # ALEXNET_FAST_ISA names an instruction set that is not there
    if not interrupt.IS_THE_COMMAND:
        raise
    print(f"error: {error}", file=sys.stderr)  # as the command says it, which comes to be after this import
    sys.exit(2)
if NOTICE := stale(_C):
    warnings.warn(NOTICE, RuntimeWarning, stacklevel=2)
