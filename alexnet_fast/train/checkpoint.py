"""Checkpoints: tensors in safetensors, everything else in JSON, written whole or not at all.

    OUT/checkpoints/
        step-00000120/
            model.safetensors        parameters, by state_dict key
            optimizer.safetensors    momentum, by the same keys
            state.json               position, sums, configuration, class names, sha256 of the two files and of itself
        last -> step-00000120        two links, each replaced in one rename
        best -> step-00000096

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so a kill or a full disk at any
moment leaves the ones before it as they were. Kept are the newest --keep-checkpoints and the best.

The tensors are those of the whole net, in the layout of one process, whatever ranks trained it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import schedule
from alexnet_fast.train.config import TrainConfig

FORMAT = 1
# Where a run stands, at its start. Sums are of loss, hits and images; JSON keeps every bit of a float.
START: dict[str, Any] = {
    "epoch": 0,
    "position": 0,  # batches of the epoch that are done
    "step": 0,
    "evaluate": False,  # whether an epoch has ended that was not evaluated yet
    "sums": [0.0, 0.0, 0.0],  # of the epoch
    "logged": [0.0, 0.0, 0.0],  # since the last row of metrics.jsonl
    "best": None,
    "plateau": schedule.START,
    "metrics_bytes": 0,
    "seconds": 0.0,
    "trained_images": 0,
    "trained_seconds": 0.0,  # of "seconds", those of steps
    "sent": {},  # bytes, by kind
    "restarts": 0,
    "sizes": {},  # images of the two sets
}
TENSORS = ("model.safetensors", "optimizer.safetensors")
UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole. ``state`` has the keys of ``START``."""

    path: Path
    config: TrainConfig
    classes: list[str]
    state: dict[str, Any]
    model: dict[str, Tensor]
    momentum: dict[str, Tensor]

    @property
    def run(self) -> Path:
        """The run's output folder."""
        return self.path.parent.parent


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    model: dict[str, Tensor],
    momentum: dict[str, Tensor],
    *,
    config: TrainConfig,
    classes: list[str],
    state: dict[str, Any],
) -> None:
    """Writes the checkpoint of ``step``, points ``last`` at it, and removes those that are no longer kept.

    If ``last`` is at ``step`` already, as after a resume, nothing is left to do. Raises :class:`RunError` where the
    disk is full or refuses; what was saved before stays.
    """
    folder = run / "checkpoints"
    name = folder_name(step)
    unfinished = folder / (UNFINISHED + name)
    before = os.readlink(folder / "last") if (folder / "last").is_symlink() else ""
    if before == name:
        return
    try:
        folder.mkdir(exist_ok=True)
        _clear_unfinished(folder)
        unfinished.mkdir()
        for file, tensors in zip(TENSORS, (model, momentum), strict=True):
            plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
            save_file(plain, unfinished / file, metadata={"variant": config.variant})
            _flush(unfinished / file)
        body = {
            "format": FORMAT,
            "files": {file: file_sha256(unfinished / file) for file in TENSORS},
            "config": config.to_json(),
            "classes": classes,
            "state": state,
        }
        (unfinished / "state.json").write_text(json.dumps({**body, "sha256": record_sha256(body)}, indent=1))
        _flush(unfinished / "state.json")
        _flush(unfinished)
        if (folder / name).exists():  # left by the same run before it was resumed from an earlier checkpoint
            shutil.rmtree(folder / name)
        os.rename(unfinished, folder / name)
        point(run, "last", name)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            _clear_unfinished(folder)
        reason = " ".join(str(error).split())
        raise RunError(f"cannot save {folder / name}: {reason}; earlier checkpoints are untouched") from error
    best = os.readlink(folder / "best") if (folder / "best").is_symlink() else ""
    newest = sorted(folder.glob("step-*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    # The one that a resumed run went on from can be older than what it leaves behind.
    newest.sort(key=lambda path: (path.name != name, path.name != before))
    for path in newest[config.keep_checkpoints :]:
        if path.name != best:
            shutil.rmtree(path, ignore_errors=True)


class Saver:
    """Saves checkpoints of ``run`` in a thread: a step waits while tensors are copied, not while they are written.

    One is written at a time, so memory holds one copy. The errors of :func:`save` are raised by the next call.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._executor = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def start(
        self,
        model: dict[str, Tensor],
        momentum: dict[str, Tensor],
        *,
        config: TrainConfig,
        classes: list[str],
        state: dict[str, Any],
    ) -> None:
        """As :func:`save`, of the tensors' and the state's present values."""
        self.finish()
        copies = [
            {key: tensor.detach().to("cpu", copy=True) for key, tensor in part.items()} for part in (model, momentum)
        ]
        rest = {"config": config, "classes": classes, "state": copy.deepcopy(state)}
        self._writing = self._executor.submit(save, self.run, state["step"], *copies, **rest)

    def finish(self) -> None:
        """Returns when what was started is on the disk."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def point(run: Path, link: str, name: str) -> None:
    """Makes ``link`` (``last`` or ``best``) lead to checkpoint ``name``."""
    folder = run / "checkpoints"
    new = folder / f"{UNFINISHED}{link}"
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    os.replace(new, folder / link)
    _flush(folder)


def find(path: str | Path, *links: str) -> Path:
    """The checkpoint that ``path`` names, or the first of ``links`` that the run in folder ``path`` has.

    Raises :class:`InputError` if there is none.
    """
    path = Path(path)
    own = (path / "state.json").exists() or path.absolute().parent.name == "checkpoints"
    candidates = [path] if own else [path / "checkpoints" / link for link in links]
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        raise InputError(f"{path}: no checkpoint there (wanted: a run's folder, or one of its checkpoints/step-*)")
    return found.resolve()


def newest_whole(run: Path) -> Path | None:
    """The checkpoint of ``run`` that it can go on from: ``last`` if that is whole, else the newest that is."""
    folder = run / "checkpoints"
    found = sorted(folder.glob("step-*"), reverse=True)
    if (folder / "last").exists():
        found.insert(0, (folder / "last").resolve())
    return next((path for path in found if _whole(path)), None)


def load(path: Path, verify: bool = True) -> Checkpoint:
    """Reads a checkpoint folder; ``verify`` compares hashes. A damaged one raises :class:`InputError`: what is wrong
    with it, and which other one is whole.
    """
    try:
        return _load(path, verify)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = error.args[0] if isinstance(error, KeyError) else error
        others = [
            other for other in sorted(path.parent.glob("step-*"), reverse=True) if other != path and _whole(other)
        ]
        hint = f"; {others[0]} is whole" if others else ""
        raise InputError(f"{path}: damaged checkpoint: {' '.join(str(reason).split())}{hint}") from None


def _whole(path: Path) -> bool:
    try:
        _load(path, True)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    return True


def _load(path: Path, verify: bool) -> Checkpoint:
    record = json.loads((path / "state.json").read_bytes())
    if not isinstance(record, dict):
        raise ValueError("state.json: expected an object")
    digest = record.pop("sha256", None)
    if digest != record_sha256(record):
        raise ValueError("state.json: sha256 differs from the one recorded")
    if record["format"] != FORMAT:
        raise ValueError(f"state.json: format {record['format']!r}; this version reads {FORMAT}")
    for file in TENSORS if verify else ():
        if file_sha256(path / file) != record["files"][file]:
            raise ValueError(f"{file}: sha256 differs from the one recorded")
    if missing := START.keys() - record["state"].keys():
        raise KeyError(f"state.json: without {', '.join(sorted(missing))}")
    model, momentum = (load_file(path / file) for file in TENSORS)
    config = TrainConfig.from_json(record["config"])
    return Checkpoint(path, config, record["classes"], record["state"], model, momentum)


def _clear_unfinished(folder: Path) -> None:
    for path in folder.glob(UNFINISHED + "*"):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems cannot flush a folder
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)
