"""What a run tells: rows of metrics.jsonl, a progress bar on a terminal, plain lines elsewhere, trackers on request.

Kinds of row in metrics.jsonl: ``step`` (mean training loss and accuracy since the row before), ``epoch`` (training and
held-out figures), ``stop`` (held-out figures where --max-steps ended the run), ``bad file``.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from alexnet_fast.data.records import Count, fields, parse_json
from alexnet_fast.errors import InputError, needs
from alexnet_fast.terminal import one_line, say
from alexnet_fast.train.checkpoint import METRICS, check_writable
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.evaluate import Evaluation
from alexnet_fast.train.pictures import draw_confusion, draw_runs
from alexnet_fast.train.trackers import Tracker, opened

EVALUATED = {"step": Count, "val_loss": float, "val_top1": float}
KINDS: dict[str, dict[str, Any]] = {  # the fields of each kind of row that are read again
    "step": {"step": Count, "loss": float, "top1": float, "lr": float},
    "epoch": EVALUATED,
    "stop": EVALUATED,
    "bad file": {"set": Literal["training", "held-out"], "path": str, "reason": str},
}


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; raises :class:`InputError` with the line that is damaged."""
    rows, _, reason = whole_rows(run)
    if reason:
        raise InputError(f"{run / METRICS}: {reason}")
    return rows


def whole_rows(run: Path, length: int | None = None) -> tuple[list[dict[str, Any]], int, str]:
    """The rows in the first ``length`` bytes of metrics.jsonl up to the first that is damaged, the bytes that they
    take, and what is wrong behind them, or ''.
    """
    try:
        content = (run / METRICS).read_bytes()[:length]
    except FileNotFoundError:
        content = b""
    rows, size = [], 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        where = f"line {number}"
        try:
            row = parse_json(line, where)
            if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
                raise ValueError(f"{where}: expected an object with a kind")
            hints = KINDS.get(row["kind"], {})
            fields({name: value for name, value in row.items() if name in hints}, hints, where)
            if not line.endswith(b"\n"):
                raise ValueError(f"{where}: broken off")
        except ValueError as error:
            return rows, size, str(error)
        rows.append(row)
        size += len(line)
    return rows, size, f"ends after {size} bytes of {length}" if length is not None and size < length else ""


def read_curves(run: Path) -> list[dict[str, Any]]:
    """The rows of a run that was evaluated; raises :class:`InputError` where there are none."""
    rows = read_rows(run)
    kinds = {row["kind"] for row in rows}
    if "step" not in kinds or not kinds & {"epoch", "stop"}:
        raise InputError(f"{run}: no curves there (wanted: the folder of a run that was evaluated)")
    return rows


def compare(folders: list[Path], names: list[str], picture: Path) -> None:
    """Draws the curves of several runs, by ``names``, into one picture.

    Raises :class:`InputError` for a folder without a run that was evaluated, and without matplotlib.
    """
    needs("curves", "matplotlib")
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if picture.is_dir() or picture.suffix[1:].lower() not in known:
        raise InputError(f"--out: expected a file named .{', .'.join(sorted(known))}, got {picture}")
    check_writable(picture, "--out")
    runs = {name: read_curves(folder) for folder, name in zip(folders, names, strict=True)}
    if len(runs) < len(folders):
        raise InputError(f"--names: expected a name of its own for each run, got {', '.join(names)}")
    draw_runs(runs, picture)


def write_table(path: Path, columns: list[str], rows: list[list[Any]]) -> None:
    """A CSV file: a line of names, then the rows."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


class Report:
    """The main rank's. ``steps`` is how many the run is going to make in all, ``step`` where it stands."""

    def __init__(self, config: TrainConfig, console: Console, *, step: int, steps: int, metrics_bytes: int):
        self.config, self.console, self.steps = config, console, steps
        self.trackers = opened(config, step)
        run = Path(config.out)
        _, size, reason = whole_rows(run, metrics_bytes)
        if reason:
            say(console, f"warning: {run / METRICS}: {reason}; what was there is lost, and the run goes on")
        self.metrics = open(run / METRICS, "ab")  # noqa: SIM115  open as long as the run
        self.metrics.truncate(size)  # rows after the checkpoint that the run goes on from, and damaged ones
        self.bar = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=steps, completed=step, rate="", note="")
            self.bar.start()
        self._since = time.perf_counter()
        self._images = 0

    def line(self, text: str) -> None:
        """A line for the user; above the bar, if there is one."""
        say(self.console, text)

    def row(self, kind: str, **values: Any) -> None:
        self.metrics.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
        self.metrics.flush()

    def flushed(self) -> int:
        """The length of metrics.jsonl, once it is on the disk."""
        os.fsync(self.metrics.fileno())
        return self.metrics.tell()

    def restart_clock(self) -> None:
        """Leaves the time since the last call out of the rate: the run did something other than train."""
        self._since, self._images = time.perf_counter(), 0

    def step(self, epoch: int, step: int, images: int, log: dict[str, float] | None) -> None:
        """After each step; ``images`` counts all ranks; ``log`` holds loss, top1 and lr where a row is due."""
        self._images += images
        rate = self._images / max(1e-9, time.perf_counter() - self._since)
        name = f"epoch {epoch + 1}/{self.config.epochs}"
        if self.bar:
            note = {"note": f"loss {log['loss']:.3f}"} if log else {}
            self.bar.update(self.task, completed=step, description=name, rate=f"{rate:.0f} images/s", **note)
        if log is None:
            return
        self.row("step", step=step, epoch=epoch, **log, images_per_second=round(rate, 2))
        if not self.bar:
            seconds = round((self.steps - step) * self.config.step_images / rate)
            eta = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            figures = f"loss {log['loss']:.3f}  lr {log['lr']:.3g}  {rate:.1f} images/s  eta {eta}"
            self.line(f"{name}  step {step}/{self.steps}  {figures}")
        self._scalars(step, {"train/loss": log["loss"], "train/top1": log["top1"], "lr": log["lr"]})
        self.restart_clock()

    def evaluated(self, kind: str, row: dict[str, Any]) -> None:
        """``row``: as it goes into metrics.jsonl, with val_loss, val_top1, val_top5 and count, and for an epoch
        train_loss, train_top1.
        """
        self.row(kind, **row)
        trained = f"train loss {row['train_loss']:.4f} top-1 {row['train_top1']:.2%}  " if "train_loss" in row else ""
        held_out = f"held-out loss {row['val_loss']:.4f} top-1 {row['val_top1']:.2%}"
        if self.config.num_classes > 5:  # among five or fewer the first five are all
            held_out += f" top-5 {row['val_top5']:.2%}"
        self.line(f"epoch {row['epoch'] + 1}/{self.config.epochs}  {trained}{held_out}  ({row['count']} images)")
        self._scalars(row["step"], {f"val/{key}": row[f"val_{key}"] for key in ("loss", "top1", "top5")})

    def evaluating(self, images: int, of: int) -> None:
        """After a batch of an evaluation; ``images`` over all ranks."""
        if self.bar:
            self._images += images
            self.bar.update(self.task, rate=f"evaluating {min(self._images, of)}/{of}")

    def bad_files(self, files: dict[str, str], kind: str, step: int) -> None:
        """``kind``: ``training`` or ``held-out``."""
        for path, reason in files.items():
            self.row("bad file", set=kind, step=step, path=path, reason=reason)
            self.line(f"bad file {path}: {reason}")

    def finished(
        self, result: Evaluation, state: dict[str, Any], seconds: float, sent: dict[str, int], bad: dict[str, int]
    ) -> None:
        """The run's last lines, and summary.json: ``sent`` in bytes, by kind; ``bad`` counts files, by set."""
        if self.bar:
            self.bar.stop()
        run = self.config.out
        rate = state["trained_images"] / max(1e-9, state["trained_seconds"])
        summary = {
            **result._asdict(),
            "top1": result.top1,
            "top5": result.top5,
            "steps": state["step"],
            "seconds": round(seconds, 2),
            "images_trained": state["trained_images"],
            "images_per_second": round(rate, 2),
            "bytes_sent": sent,
            "bad_files": bad,
            "restarts": state["restarts"],
        }
        rows = [row for row in read_rows(Path(run)) if row["kind"] in ("step", "epoch", "stop")]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        write_table(Path(run) / "metrics.csv", columns, [[row.get(name, "") for name in columns] for row in rows])
        (Path(run) / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        hits, course = f"{result.top1_count} of {result.count}", f"{state['step']} steps in {seconds:.0f} s"
        self.line(f"held-out accuracy {result.top1:.2%} ({hits}) after {course}")
        if sum(bad.values()):
            found = f"{sum(bad.values())} bad files were replaced (training) or left out (held-out)"
            self.line(f"{found}; metrics.jsonl names them")
        traffic = ", ".join(f"{size / 1e6:.1f} MB of {kind}" for kind, size in sorted(sent.items()))
        restarts = f"; {state['restarts']} restarts" if state["restarts"] else ""
        self.line(f"trained at {rate:.1f} images/s; each rank sent {traffic or 'nothing'}{restarts}")
        # Without matplotlib there are no curves, and before the end of an epoch there is no best checkpoint.
        names = "curves.png", "conv1.png", "checkpoints/best", "checkpoints/last"
        made = [f"{run}/{name}" for name in names if (Path(run) / name).exists()]
        self.line(f"pictures and checkpoints: {' '.join(made)}")

    def confused(self, counts: Tensor, classes: list[str]) -> None:
        """confusion.csv and classes.csv of the last evaluation, and confusion.png where matplotlib is installed;
        ``counts`` int64 (labels, answers).
        """
        run, names = Path(self.config.out), classes + [f"class {n}" for n in range(len(classes), len(counts))]
        write_table(
            run / "confusion.csv", ["label", *names], [[n, *r] for n, r in zip(names, counts.tolist(), strict=True)]
        )
        images, hits = counts.sum(1).tolist(), counts.diagonal().tolist()
        rows = [[n, i, h, h / i if i else ""] for n, i, h in zip(names, images, hits, strict=True)]
        write_table(run / "classes.csv", ["class", "images", "hits", "top1"], rows)
        with contextlib.suppress(ImportError):
            draw_confusion(counts, names, run / "confusion.png")

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        self._track(lambda tracker: tracker.close())
        self.metrics.close()

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        self._track(lambda tracker: tracker.scalars(step, values))

    def _track(self, call: Callable[[Tracker], None]) -> None:
        """A tracker that fails, as for want of a network, is left out from then on: the run is worth more."""
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:  # of packages that talk to servers: anything
                self.trackers.remove(tracker)
                self.line(f"warning: --{tracker.name}: {one_line(error)}; the run goes on without it")
