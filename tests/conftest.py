"""Markers, options and seeds of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from tests.second_torch import second_torch

__all__ = ["second_torch"]  # a fixture

# Tests start pytest themselves, and those processes are no workers of a run with pytest-xdist.
for _name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[_name]

# Triton reads TRITON_INTERPRET once, when it is first imported, and other tests import it through torch's compiler.
# On a GPU its kernels need no interpreter.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available() else ["triton"]


def pytest_report_header() -> str:
    if collect_ignore:
        return "tests/triton: left out; TRITON_INTERPRET=1 pytest tests/triton"
    return "tests/triton: " + ("interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "on the GPU")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--soak", action="store_true", help="run the tests marked soak too, and fuzz ten times as long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    no_gpu = pytest.mark.skip(reason="TRITON_INTERPRET=1" if interpreted else "torch sees no CUDA device")
    not_asked = {
        "slow": pytest.mark.skip(reason="slow: takes minutes or downloads; --slow runs it"),
        "soak": pytest.mark.skip(reason="soak: minutes of kills or draws; make soak runs it"),
    }
    # What takes minutes begins first, so that no process of several has one left when the others have ended.
    items.sort(key=lambda item: "slow" not in item.keywords)
    for item in items:
        if "gpu" in item.keywords and (interpreted or not torch.cuda.is_available()):
            item.add_marker(no_gpu)
        for name, skip in not_asked.items():
            if name in item.keywords and not config.getoption(name):
                item.add_marker(skip)


# ---- Tables that tests leave for the end of the run ------------------------------------------------------------------

TABLES = pytest.StashKey[dict[str, list[str]]]()  # title -> lines


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: what a process hands to the one that tells the end
        session.config.workeroutput["tables"] = session.config.stash[TABLES]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[TABLES] |= getattr(node, "workeroutput", {}).get("tables", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in config.stash[TABLES].items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def operators() -> Callable[..., list[str]]:
    """operators(net, x): the names of this package's operators that net(x) runs, in order."""

    from alexnet_fast.nn.fusion import _Operators

    def run(net: torch.nn.Module, x: torch.Tensor) -> list[str]:
        with _Operators() as names:
            net(x)
        return names.seen

    return run
