"""pytest benchmarks --benchmark-only: pytest-benchmark's tables, then one of ours against every peer.

--results DIR writes DIR/DEVICE/results.json, from which benchmarks/report.py makes tables and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alexnet_fast.malloc import keep_memory

from . import machine
from .results import write
from .tables import comparison
from .timing import race

ROWS = pytest.StashKey[list[dict[str, Any]]]()
MISSING = pytest.StashKey[dict[str, str]]()
HEADER = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-memory", action="store_true", help="leave malloc as it is: large tensors are mapped anew")
    parser.addoption("--results", metavar="DIR", type=Path, help="write what was measured to DIR/DEVICE/results.json")


def pytest_configure(config: pytest.Config) -> None:
    kept = not config.getoption("--fresh-memory") and keep_memory()
    header = {"machine": machine.facts(), "versions": machine.versions(), "commit": machine.commit()}
    header["machine"]["memory"] = "freed memory is kept" if kept else "memory as malloc gives it"
    config.stash[ROWS], config.stash[MISSING], config.stash[HEADER] = [], {}, header


@pytest.fixture(scope="session", autouse=True)
def ceilings(pytestconfig) -> Iterator[None]:
    """Measured before the first case and after the last: others on the machine may have slowed down either."""
    measures = not pytestconfig.getoption("--benchmark-disable")
    before = machine.ceilings() if measures else {}
    yield
    if measures:
        after = machine.ceilings()
        best = {name: max(value, after[name]) for name, value in before.items()}
        pytestconfig.stash[HEADER] |= {"ceilings": best, "clocks": machine.clocks()}


@pytest.fixture
def keep(pytestconfig) -> Callable[[dict[str, Any] | None], None]:
    """Keeps a row for the summary and the file."""

    def kept(row: dict[str, Any] | None) -> None:
        if row:
            pytestconfig.stash[ROWS].append(row)

    return kept


@pytest.fixture
def missing(pytestconfig) -> dict[str, str]:
    """The peers that are left out, and why."""
    return pytestconfig.stash[MISSING]


@pytest.fixture
def measure(benchmark, keep, missing) -> Callable[..., None]:
    """race() with its row kept; skips what a smaller GPU has no memory for."""

    def measured(*case) -> None:
        try:
            keep(race(benchmark, missing, *case))
        except RuntimeError as error:  # ours, through the stable ABI, have no type of their own
            if "CUDA out of memory" not in str(error):
                raise
            pytest.skip(f"the GPU's memory does not suffice: {str(error).splitlines()[0]}")

    return measured


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows, absent, header = config.stash[ROWS], config.stash[MISSING], config.stash[HEADER]
    if not rows:
        return
    terminalreporter.section("against every peer")
    for line in comparison({**header, "missing": absent, "rows": rows}):
        terminalreporter.write_line(line)
    if folder := config.getoption("--results"):
        path = folder / machine.folder(header["machine"]) / "results.json"
        write(path, header, rows, absent)
        terminalreporter.write_line(f"written: {path}")
