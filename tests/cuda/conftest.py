"""Tables that tests leave for the end of the run."""

from __future__ import annotations

import pytest

TABLES = pytest.StashKey[dict[str, list[str]]]()  # title -> lines


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = {}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for title, lines in config.stash[TABLES].items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
