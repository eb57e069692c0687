"""What the commands bench, tune and doctor print of this machine."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from alexnet_fast import _C, __version__, backends, bench, native, tuning
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS, AlexNet
from alexnet_fast.terminal import nearest, say


def look(batch: int | None, as_json: bool) -> None:
    """Times whole nets on this machine against PyTorch's own modules; raises :class:`InputError`."""
    _check_positive("--batch-size", batch)
    seen = bench.look(batch=batch)
    head = f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians, both sides channels_last"
    if as_json:
        print(json.dumps({"about": head, "rows": [{**row._asdict(), "ratio": row.ratio} for row in seen]}))
        return
    table = Table("case", "dtype", "ours, ms", "PyTorch, ms", "ratio", "images/s", title=head)
    for row in seen:
        times = f"{1e3 * row.ours:.2f}", f"{1e3 * row.eager:.2f}", f"{row.ratio:.2f}×"
        table.add_row(row.case, row.dtype, *times, f"{row.images_s:.0f}")
    Console().print(table)


def plan(
    batch: int | None,
    as_json: bool,
    variant: str = "paper",
    tflops: float = 400,
    link: float = 450,
    latency: float = 15,
) -> None:
    """Prints what a model says of a training step on two devices (:mod:`alexnet_fast.bench.plan`); raises
    :class:`InputError`."""
    _check_known("--variant", variant, VARIANTS)
    for name, value in (("--batch-size", batch), ("--tflops", tflops), ("--link", link)):
        _check_positive(name, value)
    if not 0 <= latency < math.inf:
        raise InputError(f"--latency: expected microseconds, 0 or more, got {latency}")
    if batch and batch % 2:
        raise InputError(f"--batch-size: expected an even number for two devices, got {batch}")
    batch = batch or 256
    plans = bench.plan(variant, batch, tflops, bench.Link(link, latency))
    head = f"{variant}, batch {batch}, assumed: {tflops:g} TFLOP/s, {link:g} GB/s, {latency:g} µs"
    if as_json:
        print(json.dumps({"about": head, "rows": [asdict(row) for row in plans]}))
        return
    # In lines, so that the table fits into 80 columns with no word cut off.
    sizes, times = ("gradients\nMB", "activations\nMB"), ("compute\nms", "exchange\nms", "not\nhidden\nms")
    table = Table("mode", *sizes, *times, "efficiency", title=head)
    for row in plans:
        megabytes = f"{row.gradients / 1e6:.1f}", f"{row.activations / 1e6:.1f}"
        milliseconds = f"{1e3 * row.compute:.3f}", f"{1e3 * row.exchange:.3f}", f"{1e3 * row.exposed:.3f}"
        table.add_row(row.mode, *megabytes, *milliseconds, f"{row.compute / row.step:.0%}")
    Console().print(table)


def tune(variant: str, batch: str, training: bool, precision: str) -> None:
    """Measures which ways of computing AlexNet's layers are fastest on this GPU, and prints and keeps that; raises
    :class:`InputError`."""
    _check_known("--variant", variant, VARIANTS)
    _check_known("--precision", precision, bench.PRECISIONS)
    batches = [int(part) if part.isdecimal() else 0 for part in batch.split(",")]
    if min(batches) < 1:
        raise InputError(f"--batch: expected positive numbers separated by commas, got {batch!r}")
    if reason := backends.missing("cuda"):
        raise InputError(f"tune: there is nothing to measure: {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    net = AlexNet(variant=variant).to(device)
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True) as bar:
        task = bar.add_task("measuring", total=bench.passes(net, batches, training))

        def heard(form: tuning.Form, _record: tuning.Record) -> None:
            bar.update(task, advance=1, description=form.operator)

        bench.tune(net, batches, precision, training, heard)
        bar.update(task, completed=bench.passes(net, batches, training))
    show_measured(Console(), device)


def show_measured(console: Console, device: torch.device) -> None:
    """What ``auto`` has measured on a device, why that was taken, and where it is kept."""
    records = tuning.measured(device)
    if not records:
        say(console, f"tuned: on {tuning.device_name(device)} nothing was measured: {_table_answers()}")
        return
    table = Table("convolution", "auto takes", "µs", "of", title=escape(str(tuning.file_of(device))))
    for form, record in records.items():
        others = [f"{name} {us:g}" for name, us in record.us.items() if name != record.candidate]
        others += [f"{name}: {reason}" for name, reason in record.refused.items()]
        cells = form, record.candidate, f"{record.us.get(record.candidate, 0):g}", "\n".join(others)
        table.add_row(*map(escape, cells))
    console.print(table)
    say(console, f"They count with torch.backends.cudnn.benchmark and in train; else {_table_answers()}.")


def _table_answers() -> str:
    devices = dict.fromkeys(row.device for row in tuning.table())
    return f"the nearest of {len(tuning.table())} shapes answers, measured on {', '.join(devices)}"


def doctor(trackers: Iterable[str], as_json: bool) -> None:
    """Prints what is installed, the packages ``trackers`` among it, and was built; which backends work here and why
    others do not; and what auto takes."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    extras = "scikit-learn", "matplotlib", "onnxruntime", *trackers, "pyyaml"
    facts: dict[str, Any] = {
        "alexnet_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "pillow", "safetensors")},
        **{f"{name} (extra)": _version(name) for name in extras},
        "cores": len(os.sched_getaffinity(0)),
        "gpus": ", ".join(gpus) or "none",
    }
    facts |= {f"built: {name}": value for name, value in _C.build_info().items()}
    facts["compiled module"] = native.describe()
    report = backends.report()
    if as_json:
        measured = {name: tuning.measured(torch.device("cuda", number)) for number, name in enumerate(gpus)}
        states = {status.name: {"available": status.available, "reason": status.reason} for status in report}
        tuned = {name: {form: one._asdict() for form, one in records.items()} for name, records in measured.items()}
        print(json.dumps({"facts": facts, "backends": states, "auto": backends.AUTO, "tuned": tuned}, default=str))
        return
    console = Console()
    about = Table(show_header=False)
    for name, value in facts.items():
        about.add_row(name, escape(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    console.print(about)
    table = Table("backend", "works here", "reason")
    for status in report:
        table.add_row(status.name, "yes" if status.available else "no", escape(status.reason))
    console.print(table)
    chosen = Table("auto takes", *(f"on {device}" for device in backends.AUTO))
    for operator in dict.fromkeys(name for rows in backends.AUTO.values() for name in rows):
        chosen.add_row(operator, *(rows.get(operator, "") for rows in backends.AUTO.values()))
    console.print(chosen)
    for number in range(len(gpus)):
        show_measured(console, torch.device("cuda", number))
    if not gpus:
        say(console, f"tuned: {_table_answers()}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _check_known(option: str, value: str, known: Any) -> None:
    if value not in known:
        raise InputError(f"{option}: expected one of {', '.join(known)}, got {value!r}{nearest(value, known)}")


def _check_positive(option: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"{option}: expected a positive number, got {value}")
