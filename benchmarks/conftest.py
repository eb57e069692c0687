"""pytest benchmarks --benchmark-only: pytest-benchmark's tables, then one of ours against every peer.

Without more, the cases of FIRST_LOOK: a minute or two on two cores. --all takes all; so do a file's name, -k and -m, of
what they select. A line is printed as each case ends, and Ctrl-C leaves the tables of what was measured until then.
--results DIR writes DIR/DEVICE/results.json, from which benchmarks/report.py makes tables and pictures.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alexnet_fast import native
from alexnet_fast.malloc import keep_memory

from . import machine
from .results import write
from .tables import case_line, comparison
from .timing import race

ROWS = pytest.StashKey[list[dict[str, Any]]]()
MISSING = pytest.StashKey[dict[str, str]]()
HEADER = pytest.StashKey[dict[str, Any]]()
HERE = Path(__file__).parent

# Of each file, the cases that stand for the others: float32, the 2012 net, and a batch that keeps the device busy.
_BUSY = "float32-contiguous-.*-(cpu-32|cuda-128)"
FIRST_LOOK = {
    "bench_alexnet": "(cpu-32|cuda-128)-float32",
    "bench_augment": "float32",
    "bench_conv_relu": f"2012 conv4-{_BUSY}",
    "bench_conv_stage": f"2012 conv2, LRN, pool-{_BUSY}",
    "bench_epilogue": f"bias, ReLU, LRN, pool-{_BUSY}",
    "bench_linear_int8": r"fc6-1\]",
    "bench_linear_relu": r"float32-fc6-1\]",
    "bench_lpips_layer": "test_layer.*192",
    "bench_lrn": f"after conv1-{_BUSY}",
    "bench_max_pool": f"after conv1-{_BUSY}",
    "bench_sgd": "",
    "bench_train_step": "paper-.*-float32",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="every benchmark, not only those of a first look")
    parser.addoption("--fresh-memory", action="store_true", help="leave malloc as it is: large tensors are mapped anew")
    parser.addoption("--results", metavar="DIR", type=Path, help="write what was measured to DIR/DEVICE/results.json")


def pytest_configure(config: pytest.Config) -> None:
    kept = not config.getoption("--fresh-memory") and keep_memory()
    header = {"machine": machine.facts(), "versions": machine.versions(), "commit": machine.commit()}
    header["machine"]["memory"] = "freed memory is kept" if kept else "memory as malloc gives it"
    config.stash[ROWS], config.stash[MISSING], config.stash[HEADER] = [], {}, header


def pytest_report_header() -> str | None:
    return native.NOTICE or None


def of_first_look(item: pytest.Item) -> bool:
    pattern = FIRST_LOOK.get(item.path.stem)
    return pattern is not None and re.search(pattern, item.name) is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--all") or config.option.keyword or config.option.markexpr
    if chosen or not all(Path(argument).is_dir() for argument in config.args):
        return
    left_out = [item for item in items if item.path.parent == HERE and not of_first_look(item)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str | None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if all(item.path.parent == HERE for item in items):
        reporter.showfspath = False  # each case has a line of its own
    left_out = len(reporter.stats.get("deselected", []))
    chosen = config.option.keyword or config.option.markexpr
    return None if chosen or not left_out else f"a first look: {left_out} cases are left out; --all runs them too"


@pytest.fixture(scope="session", autouse=True)
def ceilings(pytestconfig) -> None:
    """Measured before the first case and after the last: others on the machine may have slowed down either."""
    if not pytestconfig.getoption("--benchmark-disable"):
        pytestconfig.stash[HEADER]["ceilings"] = machine.ceilings()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    header = session.config.stash[HEADER]
    if "ceilings" not in header or exitstatus == pytest.ExitCode.INTERRUPTED:
        return
    with contextlib.suppress(KeyboardInterrupt):  # who presses Ctrl-C, earlier or now, waits for nothing more
        after = machine.ceilings()
        header["ceilings"] = {name: max(value, after[name]) for name, value in header["ceilings"].items()}
        header["clocks"] = machine.clocks()


@pytest.fixture
def keep(pytestconfig) -> Callable[[dict[str, Any] | None], None]:
    """Keeps a row for the summary and the file, and prints its line."""
    plugins = pytestconfig.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")

    def kept(row: dict[str, Any] | None) -> None:
        if row:
            pytestconfig.stash[ROWS].append(row)
            with capture.global_and_fixture_disabled():
                reporter.ensure_newline()
                reporter.write_line(case_line(row))

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


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    """No letters for cases that have a line, and for those that the summary lists."""
    here = Path(report.location[0]).parent.name == HERE.name
    if config.option.verbose or not here or report.failed or not (report.skipped or report.when == "call"):
        return None
    return report.outcome, "", report.outcome.upper()


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
