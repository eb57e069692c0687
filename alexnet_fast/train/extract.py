"""The command features: layers' outputs for pictures, in one file of numpy's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from alexnet_fast.data import BadImage, Transform, shards
from alexnet_fast.data.sources import FolderImages, Split
from alexnet_fast.errors import InputError
from alexnet_fast.models.features import features
from alexnet_fast.parallel import plan_devices
from alexnet_fast.train.config import TrainConfig, check_choices
from alexnet_fast.train.evaluate import autocast, normalized, using
from alexnet_fast.train.inference import find, model_of
from alexnet_fast.train.outputs import check_out, written


class Picture(NamedTuple):
    """One of a set, by its number there; its class's name, or '' for a file by itself."""

    split: Split
    number: int
    path: str
    label: str

    def cut(self, config: TrainConfig) -> np.ndarray:
        """uint8 (image_size, image_size, 3), as the net of ``config`` takes it; raises :class:`BadImage`."""
        return Transform(config.transform, config.image_size)(self.split.read(self.number)[0])


def pictures_of(paths: list[Path], exif: bool) -> list[Picture]:
    """The pictures that ``paths`` name: files, and all pictures of folders that the command prepare wrote; raises
    :class:`InputError` for a damaged folder."""
    found = []
    for path in paths:
        if not shards.is_prepared(path):
            found.append(Picture(FolderImages([path], [0], exif=exif), 0, str(path), ""))
            continue
        index = shards.read_index(path)
        for part in shards.PARTS:
            split = shards.ShardImages(path, index, part)
            labels = [index["classes"][label] for label in split.labels]
            rows = zip(shards.names(path, index, part), labels, strict=True)
            found += [Picture(split, n, str(path / part / name), label) for n, (name, label) in enumerate(rows)]
    return found


def batches(
    pictures: list[Picture], config: TrainConfig, size: int, title: str, bad: list[str]
) -> Iterator[tuple[list[Picture], Tensor]]:
    """``pictures``, up to ``size`` at a time, with their pixels, uint8 (n, 3, image_size, image_size), as the net of
    ``config`` takes them. On a terminal a bar shows how far it is. For a file that is no picture the reason is added to
    ``bad``."""
    firsts, console = range(0, len(pictures), size), Console()
    for first in track(firsts, title, console=console, transient=True, disable=not console.is_terminal):
        kept, pixels = [], []
        for picture in pictures[first : first + size]:
            try:
                cut = picture.cut(config)
            except BadImage as error:
                bad.append(str(error))
                continue
            kept.append(picture)
            pixels.append(torch.from_numpy(cut.copy()).permute(2, 0, 1))
        if kept:
            yield kept, torch.stack(pixels)


def refuse(bad: list[str], total: int) -> None:
    """Raises :class:`InputError` if some could not be read."""
    if bad:
        raise InputError(f"{len(bad)} of {total} images could not be read: {'; '.join(bad)}")


def extract(
    paths: list[Path], weights: str, layers: list[str], out: Path, batch_size: int, overwrite: bool, backend: str
) -> int:
    """Writes ``out``, a .npz of an array for each layer, float32 (N, …) in the pictures' order, ``paths``, their names,
    and, if some came from prepared folders, ``classes``, the names of theirs.

    Raises :class:`InputError` for what cannot be used, and for files that hold no picture once the others are written.
    """
    check_choices({"backend": backend})
    check_out(out, ".npz", overwrite)
    found = find(weights)
    pictures = pictures_of(paths, found.config.exif)
    device = torch.device(plan_devices(1))
    try:
        net = features(model_of(found, device), layers)
    except ValueError as error:
        raise InputError(f"--{error}".replace("--layers:", "--layer:")) from None
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    names, classes, bad = [], [], []
    with torch.inference_mode(), using(backend):
        for kept, images in batches(pictures, found.config, batch_size, "features", bad):
            with autocast(found.config, device):
                seen = net(normalized(images, found.config, device))
            for layer, values in seen.items():
                parts[layer].append(values.float().cpu().numpy())
            names += [picture.path for picture in kept]
            classes += [picture.label for picture in kept]
    if names:
        arrays = {"paths": names, **({"classes": classes} if any(classes) else {})}
        with written(out) as file:
            np.savez(file, **arrays, **{layer: np.concatenate(part) for layer, part in parts.items()})
    refuse(bad, len(pictures))
    print(f"{len(names)} images, {', '.join(layers)}: {out}")
    return 0
