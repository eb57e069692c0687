"""A pytest plugin (``-p benchmarks.failures``) for runs that may be broken off: a failure is on disk when it happens.

``ALEXNET_FAST_FAILURES`` names a file of JSON lines, one a failure: ``test``, ``when``, ``message``, ``seconds``. The
traceback goes to a file beside it that ends in .txt. With pytest-xdist the process that hands out the tests writes.

Tests are ordered so that a run's first minute says the most: one case first of every test function, operator, dtype,
layout and backend; the rest follows in its own order.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

ORDERED = ("dtype", "layout", "gradient_layout", "backend", "training")


class Failures:
    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (path, path.with_suffix(".txt")):
            stale.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.note(report.nodeid, report.when, report.longreprtext, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note(report.nodeid, "collect", report.longreprtext, 0.0)

    def note(self, test: str, when: str, text: str, seconds: float) -> None:
        raised = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
        message = raised[0] if raised else text.strip().split("\n")[-1]
        row = {"test": test, "when": when, "message": message[:300], "seconds": round(seconds, 2)}
        with self.path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        with self.path.with_suffix(".txt").open("a") as file:
            file.write(f"==== {test} ({when})\n{text}\n\n")


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("ALEXNET_FAST_FAILURES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(Path(path)))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seen: set[tuple] = set()

    def again(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        stem = getattr(params.get("sample"), "stem", None)
        kind = (item.path, getattr(item, "originalname", item.name), stem, *(str(params.get(name)) for name in ORDERED))
        return kind in seen or seen.add(kind) is not None

    items.sort(key=again)  # stable
