"""What the commands eval and predict do with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from alexnet_fast import backends
from alexnet_fast.data import BadImage, Transform, read_image
from alexnet_fast.data.loader import worker_deaths_named
from alexnet_fast.errors import InputError
from alexnet_fast.parallel import Ranks, launch, plan_devices, ranks_given
from alexnet_fast.terminal import say, shown
from alexnet_fast.train import checkpoint
from alexnet_fast.train.checkpoint import Checkpoint
from alexnet_fast.train.commands import absolute, open_run_data
from alexnet_fast.train.config import TrainConfig, check, check_choices
from alexnet_fast.train.evaluate import autocast, evaluate, normalized, using
from alexnet_fast.train.model import build_model


def evaluate_checkpoint(path: str, data: str | None, options: dict[str, Any], as_json: bool) -> int:
    """Prints loss and accuracy of a checkpoint (a run's best, if ``path`` is a run) on the held-out images of ``data``.

    ``data`` None means the run's own. ``options`` holds batch_size, workers, precision, ten_crop or nproc where they
    differ from the run's, and backend where it differs from the one in force.
    """
    options = {"backend": backends.current(), **options}
    check_choices(options)
    found = checkpoint.load(checkpoint.find(path, "best", "last"))
    config = dataclasses.replace(
        found.config, **{"nproc": 1, **options}, weights=None, parallel="ddp", hybrid_scheme="a"
    )
    if data is not None:
        config = dataclasses.replace(config, data=absolute(data), synthetic=False)
    check(config, len(found.classes))
    classes = open_run_data(config).classes
    if classes != found.classes:
        raise InputError(
            f"DATA: its {len(classes)} classes are not the {len(found.classes)} that {found.path} was trained on"
        )
    if not ranks_given():
        plan_devices(config.nproc)
    return launch(_evaluate_rank, (config, found.path, as_json), config.nproc)


def _evaluate_rank(ranks: Ranks, config: TrainConfig, path: Path, as_json: bool) -> int:
    found = checkpoint.load(path, verify=False)
    model = model_of(found, ranks.device)
    split = open_run_data(config).val
    with using(config.backend), worker_deaths_named():
        result, bad = evaluate(model, split, config, ranks, ten_crop=config.ten_crop)
    if len(bad) > config.max_bad * len(split):
        raise InputError(
            f"{len(bad)} of {len(split)} files are unusable, such as {next(iter(bad))}: {next(iter(bad.values()))}"
        )
    if not ranks.main:
        return 0
    record = {
        "checkpoint": str(path),
        "step": found.state["step"],
        "loss": result.loss,
        "top1": result.top1,
        "top5": result.top5,
        "count": result.count,
        "crops": 10 if config.ten_crop else 1,
        "bad_files": bad,
    }
    if as_json:
        print(json.dumps(record))
        return 0
    table = Table("checkpoint", "loss", "top-1", "top-5", "images")
    table.add_row(
        escape(shown(path)), f"{result.loss:.4f}", f"{result.top1:.2%}", f"{result.top5:.2%}", str(result.count)
    )
    console = Console()
    console.print(table)
    for file, reason in bad.items():
        say(console, f"left out {file}: {reason}")
    return 0


def predict(paths: list[Path], weights: str, top: int, backend: str, as_json: bool) -> int:
    """Prints the ``top`` likeliest classes of each picture.

    Raises :class:`InputError` for files that hold no picture, once the others are printed.
    """
    check_choices({"backend": backend})
    found = checkpoint.load(checkpoint.find(weights, "best", "last"))
    device = torch.device(plan_devices(1))
    model = model_of(found, device)
    transform = Transform(found.config.transform, found.config.image_size)
    names = found.classes + [f"class {number}" for number in range(len(found.classes), found.config.num_classes)]
    predictions, bad = [], []
    for path in paths:
        try:
            pixels = transform(read_image(path))
        except BadImage as error:
            bad.append(str(error))
            continue
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        with torch.no_grad(), using(backend), autocast(found.config, device):
            logits = model(normalized(images, found.config, device)).float()
        likeliest = logits.softmax(1).topk(min(top, len(names)))
        classes = zip(likeliest.indices[0].tolist(), likeliest.values[0].tolist(), strict=True)
        predictions.append({"path": str(path), "classes": [{"name": names[k], "probability": p} for k, p in classes]})
    if as_json:
        print(json.dumps(predictions))
    else:
        table = Table("image", "class", "probability")
        for prediction in predictions:
            for rank, row in enumerate(prediction["classes"]):
                table.add_row(
                    escape("" if rank else shown(prediction["path"])),
                    escape(shown(row["name"])),
                    f"{row['probability']:.2%}",
                )
        Console().print(table)
    if bad:
        raise InputError(f"{len(bad)} of {len(paths)} images could not be read: {'; '.join(bad)}")
    return 0


def model_of(found: Checkpoint, device: torch.device) -> nn.Module:
    """The net of a checkpoint, for inference."""
    model = build_model(dataclasses.replace(found.config, weights=None))
    model.load_state_dict(found.model)
    return model.to(device, memory_format=torch.channels_last).eval()
