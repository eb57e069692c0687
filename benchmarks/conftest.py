"""pytest benchmarks --benchmark-only: pytest-benchmark's tables, then one of ours against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alexnet_fast import _C

from .timing import Row, keep_memory, race, spread

ROWS = pytest.StashKey[list[Row]]()
MEMORY = pytest.StashKey[str]()
OVERHEADS = pytest.StashKey[list[tuple[str, float, float, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-memory", action="store_true", help="leave malloc as it is: large tensors are mapped anew")


def pytest_configure(config: pytest.Config) -> None:
    kept = not config.getoption("--fresh-memory") and keep_memory()
    config.stash[MEMORY] = "freed memory is kept" if kept else "memory as malloc gives it"
    config.stash[ROWS] = []
    config.stash[OVERHEADS] = []


@pytest.fixture
def measure(benchmark, pytestconfig) -> Callable[..., None]:
    """race() with its row kept for the summary."""

    def measured(*case) -> None:
        if row := race(benchmark, *case):
            pytestconfig.stash[ROWS].append(row)

    return measured


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    if rows := config.stash[ROWS]:
        terminalreporter.section("against PyTorch")
        threads, kernels = torch.get_num_threads(), _C.build_info()["cpu_isa"]
        write(f"torch {torch.__version__}, {threads} threads, {kernels} kernels; {config.stash[MEMORY]}.")
        write(
            "Median [quartiles] in ms. GB/s: each input and output counted once. Saved: for backward, over the input's."
        )
        width = max(len(row.name) for row in rows)
        write(
            f"{'case':{width}} {'dtype':8} {'layout':13} {'passes':16} {'ours':>26} {'PyTorch':>26} {'ratio':>6} "
            f"{'GB/s':>6} {'saved':>5} PyTorch"
        )
        for row in rows:
            bandwidth = f"{row.gigabytes_per_s:.1f}" if row.gigabytes_per_s else ""
            saved = f"{row.saved[0]:5.2f} {row.saved[1]:7.2f}" if row.saved else ""
            what = f"{row.name:{width}} {row.dtype:8} {row.layout:13} {row.passes:16}"
            write(f"{what} {spread(row.ours)} {spread(row.torch)} {row.ratio:5.1f}x {bandwidth:>6} {saved}".rstrip())
    if overheads := config.stash[OVERHEADS]:
        terminalreporter.section("microseconds a call on a tiny tensor")
        write(f"{'operator':12} {'PyTorch':>8} {'operator':>9} {'function':>9}  function over operator")
        for stem, theirs, direct, function in overheads:
            write(f"{stem:12} {theirs:8.1f} {direct:9.1f} {function:9.1f} {function - direct:9.1f}")
