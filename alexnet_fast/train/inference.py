"""What the commands eval and predict do with a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from alexnet_fast import backends
from alexnet_fast.data import BadImage, Transform, read_image
from alexnet_fast.data.loader import worker_deaths_named
from alexnet_fast.errors import InputError
from alexnet_fast.models import AlexNet_Weights
from alexnet_fast.models.weights import FILES, read
from alexnet_fast.parallel import Ranks, launch, plan_devices, ranks_given, ranks_of_launcher
from alexnet_fast.terminal import nearest, say, shown
from alexnet_fast.train import checkpoint
from alexnet_fast.train.commands import absolute, check_workers, open_run_data
from alexnet_fast.train.config import TrainConfig, check, check_choices, resolve
from alexnet_fast.train.deployed import open_onnx
from alexnet_fast.train.evaluate import autocast, evaluate, normalized, using
from alexnet_fast.train.model import build_model, skeleton


@dataclass(frozen=True)
class Found:
    """A net with its weights: a run's checkpoint, or weights from elsewhere. The latter have no ``step``, and only
    published ones know their ``classes``."""

    name: str
    config: TrainConfig
    classes: list[str] | None
    step: int | None
    read: Callable[[nn.Module], dict[str, Tensor]]  # the state_dict for a net like this, or InputError


def find(given: str, data: str | None = None, verify: bool = True) -> Found:
    """What ``given`` names: a run (its best checkpoint), a checkpoint, or weights as ``alexnet(weights=…)`` takes them,
    with the defaults for ``data`` and their variant. Raises :class:`InputError`."""
    path = Path(given)
    if path.suffix == ".onnx" and "://" not in given:
        raise InputError(f"{given}: an ONNX file is for predict; name the run, or the weights, that it was made of")
    elsewhere = given.removeprefix("AlexNet_Weights.") in AlexNet_Weights.__members__ or "://" in given
    own = (path / "state.json").exists() or path.absolute().parent.name == "checkpoints"
    of_a_run = own or (path / "checkpoints").exists()
    file = path.expanduser()
    elsewhere = elsewhere or file.is_file() or (not of_a_run and any((file / name).exists() for name in FILES))
    if not elsewhere and not path.exists():
        near = nearest(given, AlexNet_Weights.__members__)
        raise InputError(f"{given}: no such run, checkpoint or file of weights{near}")
    if not elsewhere:
        stored = checkpoint.load(checkpoint.find(path, "best", "last"), verify)
        return Found(
            str(stored.path), stored.config, stored.classes, stored.state["step"], lambda net: stored.read(net)[0]
        )
    try:
        weights = read(given)
    except (ValueError, OSError) as error:
        raise InputError(f"{error}") from None
    if weights.classes is None:
        raise InputError(f"weights: {weights.name} has no matrix {weights.head}.weight, so it is no AlexNet's")
    net = {"variant": weights.variant} if weights.variant else {}
    config = resolve({"data": data or ".", "out": "", "num_classes": weights.classes, **net}, 0)
    classes = AlexNet_Weights[weights.name].meta["categories"] if weights.name in AlexNet_Weights.__members__ else None
    try:
        weights.load_into(skeleton(config).to_empty(device="cpu"))
    except ValueError as error:
        raise InputError(str(error)) from None
    return Found(weights.name, config, classes, None, lambda net: weights.state)


def evaluate_checkpoint(path: str, data: str | None, options: dict[str, Any], as_json: bool) -> int:
    """Prints loss and accuracy of what :func:`find` finds at ``path`` on the held-out images of ``data``.

    ``data`` None means the run's own. ``options`` holds batch_size, workers, precision, ten_crop or nproc where they
    differ from the run's, and backend where it differs from the one in force.
    """
    options = {"backend": backends.current(), **options}
    check_choices(options)
    found = find(path, data)
    if data is None and found.step is None:
        raise InputError(f"DATA: {found.name} is of no run whose images would be known; name a folder")
    config = dataclasses.replace(
        found.config, **{"nproc": 1, **options}, weights=None, parallel="ddp", hybrid_scheme="a", fold="auto"
    )
    if data is not None:
        config = dataclasses.replace(config, data=absolute(data), synthetic=False)
    check(config, 0)
    check_workers(config)
    classes = open_run_data(config, held_out_alone=True).classes
    # Folders of ImageNet are called by numbers whose order is the labels'.
    known = found.classes if found.step is not None else None
    count = config.num_classes if known is None else len(known)
    if len(classes) != count or (known is not None and classes != known):
        raise InputError(f"DATA: its {len(classes)} classes are not the {count} that {found.name} was trained on")
    if ranks_given():
        ranks_of_launcher()
    else:
        plan_devices(config.nproc)
    return launch(_evaluate_rank, (config, found.name, as_json), config.nproc)


def _evaluate_rank(ranks: Ranks, config: TrainConfig, path: str, as_json: bool) -> int:
    found = find(path, config.data, verify=False)
    model = model_of(found, ranks.device)
    split = open_run_data(config, held_out_alone=True).val
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
        "step": found.step,
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
    cells = {"loss": f"{result.loss:.4f}", "top-1": f"{result.top1:.2%}", "top-5": f"{result.top5:.2%}"}
    if config.num_classes <= 5:  # the first five are all
        del cells["top-5"]
    table = Table(*cells, "images")
    table.add_row(*cells.values(), str(result.count))
    console = Console()
    say(console, f"checkpoint {path}")
    console.print(table)
    for file, reason in bad.items():
        say(console, f"left out {file}: {reason}")
    return 0


def predict(paths: list[Path], weights: str, top: int, backend: str, as_json: bool, exif: bool | None = None) -> int:
    """Prints the ``top`` likeliest classes of each picture.

    Raises :class:`InputError` for files that hold no picture, once the others are printed.
    """
    check_choices({"backend": backend})
    upright, transform, names, probabilities = _classifier(weights, backend)
    predictions, bad = [], []
    for path in paths:
        try:
            pixels = transform(read_image(path, upright if exif is None else exif))
        except BadImage as error:
            bad.append(str(error))
            continue
        likeliest = probabilities(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]).topk(min(top, len(names)))
        classes = zip(likeliest.indices[0].tolist(), likeliest.values[0].tolist(), strict=True)
        predictions.append({"path": str(path), "classes": [{"name": names[k], "probability": p} for k, p in classes]})
    if as_json:
        print(json.dumps(predictions))
    elif predictions:
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


def _classifier(weights: str, backend: str) -> tuple[bool, Transform, list[str], Callable[[Tensor], Tensor]]:
    """Whether pictures are turned upright, how they are cut, the classes' names, and a function that gives their
    probabilities (n, classes) for uint8 images (n, 3, h, w)."""
    if weights.endswith(".onnx") and "://" not in weights:
        record, probabilities = open_onnx(Path(weights).expanduser())
        return record["exif"], Transform(record["transform"], record["image_size"]), record["classes"], probabilities
    found = find(weights)
    device = torch.device(plan_devices(1))
    model = model_of(found, device)

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad(), using(backend), autocast(found.config, device):
            return model(normalized(images, found.config, device)).float().softmax(1)

    transform = Transform(found.config.transform, found.config.image_size)
    return found.config.exif, transform, names_of(found), answer


def names_of(found: Found) -> list[str]:
    """The classes' names, or their numbers where they have none."""
    names = list(found.classes or [])
    return names + [f"class {number}" for number in range(len(names), found.config.num_classes)]


def model_of(found: Found, device: torch.device) -> nn.Module:
    """What was found, for inference."""
    model = build_model(dataclasses.replace(found.config, weights=None))
    model.load_state_dict(found.read(model))
    return model.to(device, memory_format=torch.channels_last).eval()
