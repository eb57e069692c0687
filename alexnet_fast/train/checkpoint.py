"""Checkpoints: tensors in safetensors, everything else in JSON, written whole or not at all.

    OUT/checkpoints/
        step-00000120/
            model.safetensors        parameters, by state_dict key; their moving average if the run keeps one
            optimizer.safetensors    the momentum of SGD, by the same keys; AdamW's averages, as exp_avg:KEY and
                                     exp_avg_sq:KEY; and beside a moving average the parameters, as weight:KEY
            state.json               position, sums, configuration, class names, sha256 of the two files and of itself
        last -> step-00000120        two links, each replaced in one rename
        best -> step-00000096

A checkpoint is written under a temporary name, flushed to the disk and then renamed, so a kill or a full disk at any
moment leaves the ones before it as they were. The newest --keep-checkpoints are kept, and the best.

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
from typing import Annotated, Any, Literal, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.data.records import Count, Range, conform, read_json
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import schedule
from alexnet_fast.train.config import TrainConfig, check
from alexnet_fast.train.optimizer import SLOTS

FORMAT = 1
MODEL, OPTIMIZER = TENSORS = ("model.safetensors", "optimizer.safetensors")
STATE = "state.json"
LOCK, CONFIG, METRICS = ".lock", "config.json", "metrics.jsonl"  # in the run's folder
UNFINISHED = ".unfinished-"
WEIGHT = "weight:"  # before the keys of the weights themselves in optimizer.safetensors, with --model-ema
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int8: "I8"}
UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)  # what reading a damaged checkpoint raises

Sums = Annotated[list[float], Range(3, 3)]
Share = Annotated[float, Range(0, 1)]


class Best(TypedDict):
    step: Count
    val_top1: Share


class Plateau(TypedDict):
    best: Share | None
    stale: Count
    cuts: Count


class State(TypedDict):
    """Where a run stands. Sums are of loss, hits and images; JSON keeps every bit of a float."""

    epoch: Count
    position: Count  # batches of the epoch that are done
    step: Count
    evaluate: bool  # whether an epoch has ended that was not evaluated yet
    sums: Sums  # of the epoch
    logged: Sums  # since the last row of metrics.jsonl
    best: Best | None
    stale: Count  # epochs since the best
    plateau: Plateau
    metrics_bytes: Count
    seconds: Annotated[float, Range(0)]
    trained_images: Count
    trained_seconds: Annotated[float, Range(0)]  # the part of "seconds" that steps took
    sent: dict[str, Count]  # bytes, by kind
    restarts: Count
    sizes: dict[str, Count]  # images of the two sets


Files = TypedDict("Files", {MODEL: str, OPTIMIZER: str})


class Record(TypedDict):
    """state.json, without its own sha256."""

    format: Literal[1]
    files: Files
    config: dict[str, Any]
    classes: Annotated[list[str], Range(1)]
    state: State


START: State = {
    "epoch": 0,
    "position": 0,
    "step": 0,
    "evaluate": False,
    "sums": [0.0, 0.0, 0.0],
    "logged": [0.0, 0.0, 0.0],
    "best": None,
    "stale": 0,
    "plateau": schedule.START,
    "metrics_bytes": 0,
    "seconds": 0.0,
    "trained_images": 0,
    "trained_seconds": 0.0,
    "sent": {},
    "restarts": 0,
    "sizes": {},
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole. Its tensors are read when they are asked for."""

    path: Path
    config: TrainConfig
    classes: list[str]
    state: State

    @property
    def run(self) -> Path:
        """The run's output folder."""
        return self.path.parent.parent

    @property
    def model(self) -> dict[str, Tensor]:
        return load_file(self.path / MODEL)

    @property
    def momentum(self) -> dict[str, Tensor]:
        return load_file(self.path / OPTIMIZER)

    def check(self, net: nn.Module) -> None:
        """Raises :class:`InputError` where the stored tensors are not those of ``net``, which may be on the meta
        device.

        Only the headers of the files are read, so a file that claims to be huge costs no memory.
        """
        wanted = {key: (list(tensor.shape), tensor.dtype) for key, tensor in net.state_dict().items()}
        prefixes = (*SLOTS[self.config.optimizer], *([WEIGHT] if self.config.model_ema else []))
        try:
            for file in TENSORS:
                with safe_open(self.path / file, "pt") as stored:
                    keys = list(stored.keys())
                    for key in keys:
                        prefix, colon, name = key.rpartition(":")
                        if name not in wanted or prefix + colon not in (prefixes if file == OPTIMIZER else ("",)):
                            raise ValueError(f"{file}: {key} is not in the net")
                        shape, dtype = wanted[name]
                        part = stored.get_slice(key)
                        if part.get_shape() != shape or DTYPES[dtype] != part.get_dtype():
                            raise ValueError(
                                f"{file}: {key} is {part.get_dtype()} {part.get_shape()}, "
                                f"the net's is {DTYPES[dtype]} {shape}"
                            )
                    needed = wanted if file == MODEL else self._kept(net)
                    if missing := [key for key in needed if key not in keys]:
                        raise ValueError(f"{file}: without {', '.join(missing[:3])}")
        except UNREADABLE as error:
            raise _damaged(self.path, error) from None

    def _kept(self, net: nn.Module) -> list[str]:
        """The keys that optimizer.safetensors has to have."""
        config, keys = self.config, []
        if self.state["step"] and (config.optimizer != "sgd" or config.momentum or config.rule != "torch"):
            trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
            keys += [prefix + name for prefix in SLOTS[config.optimizer] for name in trained]
        if config.model_ema:
            keys += [WEIGHT + name for name in net.state_dict()]
        return keys

    def read(self, net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and momentum, once they are known to be ``net``'s and finite; raises :class:`InputError`."""
        self.check(net)
        parts = self.model, self.momentum
        for file, part in zip(TENSORS, parts, strict=True):
            for key, tensor in part.items():
                if not tensor.isfinite().all():
                    raise _damaged(self.path, ValueError(f"{file}: {key} has numbers that are not finite"))
        return parts


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
        (unfinished / STATE).write_text(json.dumps({**body, "sha256": record_sha256(body)}, indent=1))
        _flush(unfinished / STATE)
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
    # A run that was resumed from an early checkpoint leaves later ones behind: they are not what it goes on with.
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
    try:
        own = (path / STATE).exists() or path.absolute().parent.name == "checkpoints"
        candidates = [path] if own else [path / "checkpoints" / link for link in links]
        found = next((candidate for candidate in candidates if candidate.exists()), None)
        if found:
            return found.resolve()
    except (OSError, RuntimeError) as error:  # a name too long, a folder closed to us, links in a circle
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    raise InputError(f"{path}: no checkpoint there (wanted: a run's folder, or one of its checkpoints/step-*)")


def unsaved(run: Path) -> bool:
    """Whether ``run`` is the folder of a run that was stopped before its first checkpoint: nothing in it is lost by
    starting anew.
    """
    made = {LOCK, CONFIG, METRICS, "tensorboard", "wandb", "mlflow.id", "checkpoints"}
    return (
        run.is_dir()
        and {path.name for path in run.iterdir()} <= made
        and not any((run / "checkpoints").glob("step-*"))
        and (run / LOCK).exists()
    )


def check_writable(path: Path, name: str) -> None:
    """Raises :class:`InputError`, from the option ``name`` on, where ``path`` cannot be made or written."""
    try:
        there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        reason = "" if there.is_dir() or there == path.absolute() else f"{there} is no folder"
        if not reason and not os.access(there, os.W_OK):
            reason = f"{there} is read-only, or closed to this user"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise InputError(f"{name}: cannot write {path}: {reason}")


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
    except UNREADABLE as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    others = (other for other in sorted(path.parent.glob("step-*"), reverse=True) if other != path and _whole(other))
    whole = next(others, None)
    hint = f"; {whole} is whole" if whole else ""
    return InputError(f"{path}: damaged checkpoint: {' '.join(str(error).split())}{hint}")


def _whole(path: Path) -> bool:
    try:
        _load(path, True)
    except UNREADABLE:
        return False
    return True


def _load(path: Path, verify: bool) -> Checkpoint:
    record = read_json(path / STATE)
    if not isinstance(record, dict):
        raise ValueError(f"{STATE}: expected an object")
    digest = record.pop("sha256", None)
    if digest != record_sha256(record):
        raise ValueError(f"{STATE}: sha256 differs from the one recorded")
    if record.get("format") != FORMAT:
        raise ValueError(f"{STATE}: format {record.get('format')!r}; this version reads {FORMAT}")
    if isinstance(record.get("state"), dict):
        record["state"].setdefault("stale", 0)  # of a version that had no --early-stopping
    record = conform(record, Record, STATE)
    config = TrainConfig.from_json(record["config"], f"{STATE}: config")
    check(config, len(record["classes"]))
    for file in TENSORS if verify else ():
        if file_sha256(path / file) != record["files"][file]:
            raise ValueError(f"{file}: sha256 differs from the one recorded")
    return Checkpoint(path, config, record["classes"], record["state"])


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
