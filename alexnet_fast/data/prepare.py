"""From an ImageFolder to shards (:mod:`alexnet_fast.data.shards`): decoded once, for every training to come.

Each shard is made by one process from a fixed stretch of the sources. Each of its files appears under its name by a
rename, the list last. So a command that was killed goes on with the shards that are missing, and the result depends
neither on how often it was interrupted nor on the number of processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.data.images import BadImage, read_image
from alexnet_fast.data.shards import (
    FORMAT,
    INDEX,
    LIST,
    MAX_SIZE,
    MEAN,
    PARTS,
    PICTURES,
    SUFFIXES,
    SUM,
    UNFINISHED,
    read_list,
)
from alexnet_fast.data.sources import FolderImages, image_folder
from alexnet_fast.data.transforms import centre
from alexnet_fast.errors import InputError, RunError

WORKER_DIED = "a process of prepare died (killed, or out of memory); whole shards are kept: give the same command again"


@dataclass(frozen=True)
class Plan:
    """A shard that is to be made: the file of its pictures, their side, and its sources as (path, name below SRC/part,
    class)."""

    path: Path
    size: int
    sources: list[tuple[Path, str, int]]
    exif: bool

    def file(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)


def prepare(
    source: Path,
    target: Path,
    *,
    size: int = 256,
    shard_size: int = 1000,
    workers: int | None = None,
    max_bad: float = 0.05,
    exif: bool = True,
    tell: Callable[[int, int, dict[str, str]], None] = lambda done, total, bad: None,
) -> dict[str, Any]:
    """Writes the shards of ImageFolder ``source`` to ``target``, or goes on with them, and returns index.json's record.

    Args:
        size: side of the pictures: the shorter side is scaled to it, the centre kept.
        shard_size: sources of a shard.
        workers: processes; as many as cores if None.
        max_bad: share of a part's sources that may be no usable picture.
        exif: turn pictures upright as their EXIF orientation says.
        tell: called after each shard with the sources done, of how many, and the bad ones found (path: reason).

    Raises:
        InputError: an argument is wrong; ``source`` is no ImageFolder, or more of it than ``max_bad`` is unusable;
            ``target`` cannot be written (full, read-only, no folder, another process writes there).
        RunError: a process died.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    limits = {"size": (size, MAX_SIZE), "shard-size": (shard_size, 1_000_000), "workers": (workers, 1024)}
    for name, (value, most) in limits.items():
        if not 1 <= value <= most:
            raise InputError(f"--{name}: expected from 1 to {most}, got {value}")
    if not 0 <= max_bad <= 1:
        raise InputError(f"--max-bad: expected from 0 to 1, got {max_bad:g}")
    outer, inner = os.path.realpath(source), os.path.realpath(target)
    if os.path.commonpath((outer, inner)) in (outer, inner):
        raise InputError(f"{target}: DST has to lie beside SRC, neither inside the other")
    data = image_folder(source, exif)
    sizes = {part: len(getattr(data, part)) for part in PARTS}
    plans = {part: _plans(getattr(data, part), source / part, target / part, size, shard_size) for part in PARTS}
    with _writing(target), _locked(target):
        _check_own(target)
        for part in PARTS:
            (target / part).mkdir(exist_ok=True)
            for left in (target / part).glob(UNFINISHED + "*"):
                left.unlink()
        bad: dict[str, dict[str, str]] = {part: {} for part in PARTS}
        todo = []
        for part in PARTS:
            for plan in plans[part]:
                if (found := _made_before(plan)) is None:
                    todo.append(plan)
                else:
                    bad[part] |= found
        if todo:
            (target / INDEX).unlink(missing_ok=True)  # until all shards are there
        _check_room(target, sum(len(plan.sources) for plan in todo) * size * size * 3)
        done, total = sum(sizes.values()) - sum(len(plan.sources) for plan in todo), sum(sizes.values())
        _check_bad(bad, sizes, max_bad)
        tell(done, total, {})
        for plan in _made(todo, workers):
            part, found = plan.path.parent.name, _bad(_read(plan))
            bad[part] |= found
            done += len(plan.sources)
            tell(done, total, found)
            _check_bad(bad, sizes, max_bad)
        return _finish(target, data.classes, size, exif, plans)


def _plans(split: FolderImages, source: Path, target: Path, size: int, shard_size: int) -> list[Plan]:
    rows = [
        (path, path.relative_to(source).as_posix(), label)
        for path, label in zip(split.paths, split.labels, strict=True)
    ]
    parts = [rows[first : first + shard_size] for first in range(0, len(rows), shard_size)]
    return [Plan(target / f"{number:05}{PICTURES}", size, part, split.exif) for number, part in enumerate(parts)]


# ---- One shard, in a process of its own ----------------------------------------------------------------------------


def _make(plan: Plan) -> Plan:
    rows, bad = [], []
    total = np.zeros((plan.size, plan.size, 3), np.uint32)
    products = np.zeros((3, 3))
    hashed = hashlib.sha256()
    with _appearing(plan.path) as file:
        for path, name, label in plan.sources:
            row = [name, label, *_stamp(path)]
            try:
                pixels = np.ascontiguousarray(centre(read_image(path, plan.exif), plan.size, plan.size))
            except BadImage as error:
                bad.append([*row, error.reason])
                continue
            rows.append(row)
            file.write(pixels.data)
            hashed.update(pixels.data)
            total += pixels
            rgb = pixels.reshape(-1, 3).astype(np.float64)
            products += rgb.T @ rgb  # sums of whole numbers under 2^53: exact, in whatever order they are added
    with _appearing(plan.file(SUM)) as file:
        file.write(total.data)
    record = {
        "size": plan.size,
        "exif": plan.exif,
        "rows": rows,
        "bad": bad,
        "products": products.astype(np.int64).tolist(),
        "sha256": {"u8": hashed.hexdigest(), "sum": hashlib.sha256(total.data).hexdigest()},
    }
    with _appearing(plan.file(LIST)) as file:
        file.write(json.dumps(record).encode())
    return plan


def _stamp(path: Path) -> tuple[int, int]:
    """When the source was last changed, in ns, and its length in bytes; zeros where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which appears at ``path`` when it is whole and on the disk, and never otherwise."""
    unfinished = path.with_name(UNFINISHED + path.name)
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def _read(plan: Plan) -> dict[str, Any]:
    return read_list(plan.file(LIST))


def _bad(record: dict[str, Any]) -> dict[str, str]:
    """The sources that are no pictures, by name, with the reason."""
    return {row[0]: row[4] for row in record["bad"]}


def _made_before(plan: Plan) -> dict[str, str] | None:
    """The bad sources of a shard that was made before, of these same sources; None if it has to be made."""
    try:
        record = _read(plan)
        pixels = plan.size * plan.size * 3
        lengths = [plan.path.stat().st_size, plan.file(SUM).stat().st_size]
        listed = {row[0]: list(row[1:4]) for row in record["rows"] + record["bad"]}
        whole = lengths == [len(record["rows"]) * pixels, 4 * pixels]
        whole = whole and (record["size"], record["exif"]) == (plan.size, plan.exif)
    except (OSError, ValueError):
        return None
    if not whole or listed != {name: [label, *_stamp(path)] for path, name, label in plan.sources}:
        return None
    bad = _bad(record)
    for path, name, _ in plan.sources if bad else ():
        with contextlib.suppress(BadImage):
            if name in bad and read_image(path):  # its mode, or the target of its link, has changed since
                return None
    return bad


# ---- All shards -----------------------------------------------------------------------------------------------------


def _made(todo: list[Plan], workers: int) -> Iterator[Plan]:
    """Shards as they are done, in any order."""
    if workers == 1:
        yield from map(_make, todo)
        return
    context = multiprocessing.get_context("fork")  # as torch's DataLoader: a spawned process would import torch first
    lifeline, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (lifeline, held))
    try:
        for future in as_completed([pool.submit(_make, plan) for plan in todo]):
            yield future.result()
    except BrokenProcessPool:
        raise RunError(WORKER_DIED) from None
    finally:
        held.close()  # ends the processes at once, in the middle of shards that nobody wants any more
        pool.shutdown(cancel_futures=True)


def _begin(lifeline: Connection, held: Connection) -> None:
    held.close()  # the parent's end, which closes when the parent dies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()


def _end_with_parent(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _check_bad(bad: dict[str, dict[str, str]], sizes: dict[str, int], max_bad: float) -> None:
    for part, found in bad.items():
        if len(found) > max_bad * sizes[part]:
            name, reason = next(iter(found.items()))
            share = f"more than the share --max-bad {max_bad:g}"
            raise InputError(
                f"{len(found)} of {sizes[part]} {part} files are unusable, {share}; the first: {part}/{name}: {reason}"
            )


def _check_room(target: Path, size: int) -> None:
    free = shutil.disk_usage(target).free
    if size > free:
        raise InputError(f"{target}: the pictures take {size / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free")


def _check_own(target: Path) -> None:
    """Refuses a folder that holds anything but what prepare writes, since prepare removes shards that it does not
    want."""
    files = "|".join([re.escape(INDEX), re.escape(MEAN), *(rf"\d+{re.escape(suffix)}" for suffix in SUFFIXES)])
    own = re.compile(rf"({re.escape(UNFINISHED)})?({files})|{'|'.join(PARTS)}")
    for path in (target, *(target / part for part in PARTS)):
        for entry in path.iterdir() if path.is_dir() else ():
            if not own.fullmatch(entry.name):
                raise InputError(f"{target}: expected an empty folder or one that prepare wrote, found {entry}")


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Turns what the disk refuses into one line."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise InputError(f"cannot write {error.filename or target}: {reason}; whole shards are kept") from error


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Refuses a folder that another process is preparing. The lock ends with the process, however it ends."""
    handle = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise InputError(f"{target}: another process is preparing it") from None
    finally:
        os.close(handle)


def _finish(target: Path, classes: list[str], size: int, exif: bool, plans: dict[str, list[Plan]]) -> dict[str, Any]:
    """Writes the mean picture and index.json, and removes shards of sources that are gone."""
    total = np.zeros((size, size, 3), np.uint64)
    products = np.zeros((3, 3), object)
    shards: dict[str, list[dict[str, Any]]] = {}
    bad: dict[str, int] = {}
    for part in PARTS:
        shards[part], bad[part] = [], 0
        for plan in plans[part]:
            record = _read(plan)
            bad[part] += len(record["bad"])
            hashes = {**record["sha256"], "json": file_sha256(plan.file(LIST))}
            shards[part].append({"name": plan.path.stem, "images": len(record["rows"]), "sha256": hashes})
            if part == "train":
                total += np.frombuffer(plan.file(SUM).read_bytes(), np.uint32).reshape(total.shape)
                products += np.array(record["products"], object)
        kept = {plan.path.stem for plan in plans[part]}
        for path in (target / part).iterdir():
            if path.stem not in kept and path.suffix in (PICTURES, LIST, SUM):
                path.unlink()
    images = {part: sum(shard["images"] for shard in shards[part]) for part in PARTS}
    if not all(images.values()):
        raise InputError(f"{target}: no usable picture in {' and '.join(part for part in PARTS if not images[part])}")
    mean_image = (total / images["train"]).astype(np.float32)
    file = io.BytesIO()
    np.save(file, mean_image)
    with _appearing(target / MEAN) as appearing:
        appearing.write(file.getvalue())
    pixels = images["train"] * size * size
    mean = total.sum((0, 1), dtype=np.uint64).astype(np.float64) / pixels / 255
    covariance = products.astype(np.float64) / pixels / 255**2 - np.outer(mean, mean)
    variances, components = np.linalg.eigh(covariance)
    order = variances.argsort()[::-1]
    components = components[:, order]
    components *= np.sign(components[np.abs(components).argmax(0), range(3)])  # the sign is free: the largest positive
    record = {
        "format": FORMAT,
        "size": size,
        "exif": exif,
        "classes": classes,
        "images": images,
        "bad": bad,
        "shards": shards,
        "mean_image": hashlib.sha256(file.getvalue()).hexdigest(),
        "mean": mean.tolist(),
        "components": components.tolist(),
        "deviations": np.sqrt(variances[order].clip(0)).tolist(),
    }
    with _appearing(target / INDEX) as appearing:
        appearing.write(json.dumps({**record, "sha256": record_sha256(record)}, indent=1).encode())
    return record
