"""What the command prepare prints."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alexnet_fast.data import prepare as making
from alexnet_fast.data.shards import PARTS, problems
from alexnet_fast.errors import InputError
from alexnet_fast.terminal import say

SECONDS = 10  # between two lines of progress where there is no terminal


class _Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, what: str):
        self.console, self.what = console, what
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.bar.add_task(what, total=None) if self.bar else None
        self.said = time.monotonic()

    def __enter__(self) -> _Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, done: int, total: int, bad: dict[str, str] | None = None) -> None:
        for name, reason in (bad or {}).items():
            self.line(f"bad file {name}: {reason}")
        if self.bar:
            self.bar.update(self.task, completed=done, total=total)
        elif time.monotonic() > self.said + SECONDS:
            self.said = time.monotonic()
            self.line(f"{self.what}  {done}/{total}")

    def line(self, text: str) -> None:
        say(self.console, text)


def prepare(source: Path, target: Path, **options: Any) -> int:
    """Raises what :func:`alexnet_fast.data.prepare.prepare` raises."""
    started = time.monotonic()
    with _Progress(Console(), "images") as progress:
        index = making.prepare(source, target, **options, tell=progress)
        for part in PARTS:
            bad = f", {index['bad'][part]} bad files left out" if index["bad"][part] else ""
            count, shards = index["images"][part], len(index["shards"][part])
            progress.line(f"{part:5} {count} images of {len(index['classes'])} classes in {shards} shards{bad}")
        mean = ", ".join(f"{value:.4f}" for value in index["mean"])
        deviations = ", ".join(f"{value:.4f}" for value in index["deviations"])
        progress.line(f"RGB   mean {mean}; deviations along its principal components {deviations}")
        progress.line(f"done  {target} in {time.monotonic() - started:.0f} s; alexnet-fast train {target}")
    return 0


def check(folder: Path, workers: int | None) -> int:
    """Prints what is wrong with a prepared folder; raises :class:`InputError` if anything is."""
    with _Progress(Console(), "shards") as progress:
        if workers is not None and not 1 <= workers <= 1024:
            raise InputError(f"--workers: expected from 1 to 1024, got {workers}")
        index, wrong = problems(folder, workers or len(os.sched_getaffinity(0)), progress)
        for line in wrong:
            progress.line(line)
        if wrong:
            raise InputError(
                f"{folder}: {len(wrong)} faults, named above; remove those files and prepare SRC {folder} again"
            )
        counts = " and ".join(f"{index['images'][part]} {part} images" for part in PARTS)
        progress.line(f"{folder}: {counts}, all whole")
    return 0
