"""What the command train does: everything is checked before anything is written or a rank is started."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import alexnet_fast
from alexnet_fast.data import Data, open_data
from alexnet_fast.data.loader import steps_per_epoch
from alexnet_fast.data.records import Count, conform, read_json
from alexnet_fast.data.sources import kind_of, synthetic_data
from alexnet_fast.data.stored import StoredImages
from alexnet_fast.data.transforms import shorter_side
from alexnet_fast.errors import InputError
from alexnet_fast.models.weights import CHECKPOINT, read
from alexnet_fast.parallel import RESTARTED, Ranks, launch, plan_devices, ranks_given, ranks_of_launcher
from alexnet_fast.terminal import say
from alexnet_fast.train import checkpoint, trackers
from alexnet_fast.train.checkpoint import CONFIG, LOCK, Checkpoint, check_writable
from alexnet_fast.train.config import TrainConfig, check, check_choices, resolve, resumed, variant_of
from alexnet_fast.train.engine import Trainer
from alexnet_fast.train.model import build_model, skeleton
from alexnet_fast.train.report import write_table

WORKERS_A_CORE = 64  # more is a mistake


def train(
    given: dict[str, Any],
    resume: str | None = None,
    build: Callable[[TrainConfig], nn.Module] = build_model,
    dry_run: bool = False,
) -> int:
    """Starts a run, or goes on with the one at ``resume``, and returns the exit code.

    ``given`` holds fields of :class:`TrainConfig`; the others follow from DATA and the variant, or from the resumed
    run. ``build`` makes the net. With ``dry_run`` it says what would be trained, and writes nothing. Raises InputError
    and RunError.
    """
    given = dict(given)
    if ranks_given():
        given["nproc"] = ranks_of_launcher()[1]
    if "data" in given:
        given["data"] = absolute(given["data"])
    if resume is None and RESTARTED in os.environ and os.environ[RESTARTED] != "0":
        resume = _restarted(given)
    if resume is None:
        config, found = _new_run(given, build), None
    elif checkpoint.unsaved(Path(resume)):
        config, found = _run_anew(Path(resume), given), None
    else:
        found = checkpoint.find(resume, "last")
        config = _resumed_run(given, checkpoint.load(found), build)
    if config.quantization != "none":
        raise InputError(
            "train: the linear layers of this run are int8, which are not trained; train what it was made of"
        )
    trackers.wanted(config)
    check_workers(config)
    device = "" if ranks_given() else plan_devices(config.nproc)
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            _show(config, device or "this machine's devices", found, build)
        return 0
    return launch(train_rank, (config, found, build), config.nproc)


def train_rank(ranks: Ranks, config: TrainConfig, found: Path | None, build: Callable[[TrainConfig], nn.Module]) -> int:
    """One rank of :func:`train`, on a configuration that was checked."""
    data = open_run_data(config)
    resumed_from = checkpoint.load(found, verify=False) if found else None
    console, run = Console(), Path(config.out)
    with contextlib.ExitStack() as stack:
        restarts = 0
        if ranks.main:
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(run))
            restarts = _restarts(run, resumed_from)
            _announce(console, config, ranks.world, ranks.device.type, data, found)
        trainer = Trainer(config, ranks, data, resumed=resumed_from, restarts=restarts, build=build, console=console)
        if ranks.main:
            about = {**_about(ranks, data), "restarts": restarts}
            (run / CONFIG).write_text(json.dumps({**config.to_json(), "about": about}, indent=2) + "\n")
        return trainer.run()


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Refuses a folder that another process is training in. The lock ends with the process, however it ends."""
    with open(run / LOCK, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{run}: another run is writing there") from None
        yield


def _restarts(run: Path, found: Checkpoint | None) -> int:
    """How often the run has been resumed, this time included. The number is in config.json too, which each start
    writes, so that two resumes from one checkpoint count as two.
    """
    if found is None:
        return 0
    before = 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = conform(read_json(run / CONFIG)["about"]["restarts"], Count, CONFIG)
    return max(before, found.state["restarts"]) + 1


def _show(config: TrainConfig, device: str, found: Path | None, build: Callable[[TrainConfig], nn.Module]) -> None:
    """What :func:`train` would do with ``config``."""
    console, data = Console(), open_run_data(config)
    _announce(console, config, config.nproc, device, data, found)
    parameters = list(skeleton(config, build).parameters())
    count, trained = (sum(p.numel() for p in part) for part in (parameters, [p for p in parameters if p.requires_grad]))
    steps = steps_per_epoch(len(data.train), config.step_images) * config.epochs
    say(console, f"would train {trained:,} of {count:,} parameters for {min(steps, config.max_steps or steps)} steps")
    for name, value in config.to_json().items():
        say(console, f"  {name}: {json.dumps(value)}")
    say(console, "nothing was written")


def train_seeds(given: dict[str, Any], seeds: str, resume: str | None, dry_run: bool) -> int:
    """A run for each of ``seeds``, as in 0,1,2, in OUT/seed-N, one after the other; then seeds.json and seeds.csv with
    the mean and the deviation of their held-out accuracies. The same command goes on with what was begun.
    """
    parts = seeds.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise InputError(f"--seeds: expected different whole numbers separated by commas, got {seeds!r}")
    if resume is not None or "seed" in given or ranks_given():
        other = "--resume" if resume is not None else "--seed" if "seed" in given else "torchrun"
        raise InputError(f"--seeds: does not go with {other}; it goes on with what it finds in --out by itself")
    if "out" not in given:
        raise InputError("--seeds: needs --out, the folder for its runs")
    check_writable(Path(given["out"]), "--out")
    results = []
    for seed in map(int, parts):
        run = Path(given["out"]) / f"seed-{seed}"
        begun = run.exists() and checkpoint.newest_whole(run)
        own = {**given, "seed": seed, "out": str(run)}
        if code := train(own, str(begun) if begun else None, dry_run=dry_run):
            return code
        if not dry_run:
            summary = read_json(run / "summary.json")
            results.append({"seed": seed, **{name: summary[name] for name in ("top1", "loss", "steps")}})
    if dry_run:
        return 0
    record: dict[str, Any] = {"runs": results}
    for name in ("top1", "loss"):
        values = [result[name] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        record[name] = {"mean": statistics.fmean(values), "deviation": spread}
    folder = Path(given["out"])
    (folder / "seeds.json").write_text(json.dumps(record, indent=2) + "\n")
    write_table(folder / "seeds.csv", list(results[0]), [list(result.values()) for result in results])
    top1 = record["top1"]
    say(Console(), f"{len(results)} seeds: held-out accuracy {top1['mean']:.2%} ± {top1['deviation']:.2%} (deviation)")
    return 0


def _restarted(given: dict[str, Any]) -> str | None:
    """Where a run goes on that torchrun has started again after a rank failed; None if nothing had been saved."""
    if "out" not in given:
        raise InputError("--out: a run that torchrun restarts has to name its folder")
    found = checkpoint.newest_whole(Path(given["out"]))
    return str(found) if found else None


def _new_run(given: dict[str, Any], build: Callable[[TrainConfig], nn.Module]) -> TrainConfig:
    check_choices(given)
    given = {"data": "digits", **given}
    if "weights" in given:
        given = following_weights(given)
    variant = variant_of(given)
    synthetic = given.get("synthetic", False)
    if "out" not in given:
        name = "synthetic" if synthetic else Path(given["data"]).name.replace(":", "-")
        given["out"] = f"runs/{name}-{variant}-{time.strftime('%Y%m%d-%H%M%S')}"
    if synthetic:
        config = resolve(given, given.get("num_classes", 1000))
    else:
        data = open_data(given["data"], given.get("exif", True))
        config = resolve(given, len(data.classes), data.statistics)
        _check_stored(config, data)
    _check_memory(config, build)
    if config.weights is not None:
        build(config)
    if not config.out:
        raise InputError("--out: expected a folder, got ''")
    run = Path(config.out)
    check_writable(run, "--out")
    first = os.environ.get("RANK", "0") == "0"  # the other ranks of torchrun may find what the first one made
    occupied = run.exists() and not checkpoint.unsaved(run) and (not run.is_dir() or any(run.iterdir()))
    if first and os.environ.get(RESTARTED, "0") == "0" and occupied:
        raise InputError(f"--out: {run} is not an empty folder (to go on with a run: --resume {run})")
    return config


def _run_anew(run: Path, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a run that was stopped before its first checkpoint. ``given`` may change what a resume
    may."""
    try:
        record = read_json(run / CONFIG)
        if isinstance(record, dict):
            record.pop("about", None)
        config = TrainConfig.from_json(record, CONFIG)
    except OSError:
        raise InputError(f"{run}: no checkpoint there, and no {CONFIG} to start anew from") from None
    except ValueError as error:
        raise InputError(f"{run / CONFIG}: damaged: {error}") from None
    if "out" in given and Path(given.pop("out")).resolve() != run.resolve():
        raise InputError(f"--out: a resumed run goes on in its own folder, {run.resolve()}")
    config = dataclasses.replace(resumed(config, given), out=str(run.resolve()))
    check(config, len(open_run_data(config).classes))
    return config


def check_workers(config: TrainConfig) -> None:
    cores = len(os.sched_getaffinity(0))
    if config.workers * config.nproc > WORKERS_A_CORE * cores:
        raise InputError(
            f"--workers: {config.workers} for each of {config.nproc} ranks on {cores} cores; "
            f"at most {WORKERS_A_CORE} a core can be started"
        )


def _check_memory(config: TrainConfig, build: Callable[[TrainConfig], nn.Module]) -> None:
    """Refuses a net whose weights, gradients and momentum are more than this machine's memory."""
    needed = 3 * 4 * sum(parameter.numel() for parameter in skeleton(config, build).parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory:
        raise InputError(
            f"--num-classes: {config.num_classes} outputs at {config.image_size} pixels take {needed / 1e9:.1f} GB of "
            f"weights, gradients and momentum, and this machine has {memory / 1e9:.1f} GB"
        )


def following_weights(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with what its pretrained weights say about their net: the variant, and the size and normalization of
    the images if a run of this package made them. A run's folder stands for its best checkpoint.
    """
    folder = Path(given["weights"]).expanduser()
    if folder.is_dir() and not (folder / CHECKPOINT).exists():
        folder = checkpoint.find(folder, "best", "last")
    if (folder / "state.json").exists():
        found = checkpoint.load(folder)
        if found.config.quantization != "none":
            raise InputError(f"--weights: {folder}: its linear layers are int8; name the run that it was made of")
        names = ("variant", "image_size", "mean", "std", *(("widths",) if found.config.widths else ()))
        names += ("ranks",) if any(found.config.ranks) else ()
        told = {name: getattr(found.config, name) for name in names}
        return {**told, **given, "weights": str(folder)}
    try:
        variant = read(given["weights"]).variant
    except (ValueError, OSError) as error:
        raise InputError("--" + " ".join(str(error).split())) from None
    return {"variant": variant, **given} if variant else given


def _resumed_run(given: dict[str, Any], found: Checkpoint, build: Callable[[TrainConfig], nn.Module]) -> TrainConfig:
    if "out" in given and Path(given.pop("out")).resolve() != found.run:
        raise InputError(f"--out: a resumed run goes on in its own folder, {found.run}")
    config = dataclasses.replace(resumed(found.config, given), out=str(found.run))
    data = open_run_data(config)
    sizes = {"train": len(data.train), "val": len(data.val)}
    if data.classes != found.classes or sizes != found.state["sizes"]:
        raise InputError(
            f"--resume: DATA has changed: the run had {len(found.classes)} classes and {found.state['sizes']} images, "
            f"{config.data} now has {len(data.classes)} and {sizes}"
        )
    steps, state = steps_per_epoch(sizes["train"], config.step_images), found.state
    if state["position"] > steps or state["step"] != state["epoch"] * steps + state["position"]:
        raise InputError(
            f"{found.path}: damaged checkpoint: step {state['step']} is not batch {state['position']} of {steps} "
            f"in epoch {state['epoch']}"
        )
    found.check(skeleton(config, build))
    return config


def absolute(data: str) -> str:
    """A DATA argument that means the same from any folder."""
    kind = kind_of(data)
    if kind == "digits":
        return data
    prefix, folder = ("fashion-mnist:", data.removeprefix("fashion-mnist:")) if kind == "fashion-mnist" else ("", data)
    return prefix + os.path.abspath(folder)


def open_run_data(config: TrainConfig, held_out_alone: bool = False) -> Data:
    """The run's images; ``held_out_alone``: those to train on need not be there."""
    if config.synthetic:
        data = synthetic_data(config.num_classes, config.image_size)
    else:
        data = open_data(config.data, config.exif, held_out_alone)
    _check_stored(config, data)
    return data


def _check_stored(config: TrainConfig, data: Data) -> None:
    side, stored = config.image_size, isinstance(data.train, StoredImages) and config.transform != "shift"
    if stored and not side <= data.train.size <= side * 4 / 3:
        raise InputError(
            f"--image-size: {config.data} was prepared at {data.train.size} pixels, too "
            f"{'small' if data.train.size < side else 'large'} to cut {side} from "
            f"(prepare SRC DST --size {shorter_side(side)})"
        )
    if getattr(data.train, "exif", config.exif) != config.exif:
        made, wanted = ("--no-exif", "--exif") if config.exif else ("--exif", "--no-exif")
        raise InputError(f"{wanted}: {config.data} was prepared with {made} (prepare SRC DST {wanted})")
    if config.cache == "device":
        if not stored:
            raise InputError("--cache: only DATA that the command prepare made can be kept on the device")
        if config.step_images % config.nproc:
            raise InputError(f"--batch-size: {config.nproc} ranks that keep their part of DATA need a multiple of it")
        if len(data.train) < config.nproc:
            raise InputError(f"--cache: {len(data.train)} training images for {config.nproc} ranks")


def _about(ranks: Ranks, data: Data) -> dict[str, Any]:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    versions = {"alexnet_fast": alexnet_fast.__version__, "torch": torch.__version__}
    images = {"training_images": len(data.train), "held_out_images": len(data.val), "classes": len(data.classes)}
    return {**versions, "device": device, "threads_per_rank": torch.get_num_threads(), **images}


def _announce(console: Console, config: TrainConfig, world: int, device: str, data: Data, found: Path | None) -> None:
    steps = steps_per_epoch(len(data.train), config.step_images)
    sizes = f"{len(data.train)} training and {len(data.val)} held-out images of {len(data.classes)} classes"
    side, backend = config.image_size, config.backend
    spread = f"{world} {'rank' if world == 1 else 'ranks'} on {device}"
    lines = [
        f"data   {'synthetic' if config.synthetic else config.data}: {sizes}",
        f"net    {config.variant}, {side}x{side} pixels, {config.precision}, backend {backend}",
        f"run    {config.epochs} epochs of {steps} steps, batch {config.step_images} over {spread}",
        f"       lr {config.lr:g}, schedule {config.schedule}, in {config.out}",
        *([f"recipe {config.recipe}, but for what was given; config.json has every value"] if config.recipe else []),
    ]
    cores = len(os.sched_getaffinity(0))
    for count, what in ((world, "ranks"), (world * config.workers, "loader processes and threads")):
        if device == "cpu" and count > max(4, 2 * cores):
            lines.append(f"warning: {count} {what} share {cores} {'core' if cores == 1 else 'cores'}")
    for part in (data.train, data.val):
        lines += getattr(part, "left_out", ())
    if found:
        lines.append(f"resume {found}")
    elif (Path(config.out) / CONFIG).exists():
        lines.append(f"anew   {config.out} was left before its first checkpoint")
    for line in lines:
        say(console, line)
