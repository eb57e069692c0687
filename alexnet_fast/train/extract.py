"""The command features: layers' outputs for pictures, in one file of numpy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from alexnet_fast.data import BadImage, Transform, read_image
from alexnet_fast.errors import InputError
from alexnet_fast.models.features import features
from alexnet_fast.parallel import plan_devices
from alexnet_fast.train.config import check_choices
from alexnet_fast.train.evaluate import autocast, normalized, using
from alexnet_fast.train.inference import find, model_of
from alexnet_fast.train.outputs import check_out, written


def extract(
    paths: list[Path], weights: str, layers: list[str], out: Path, batch_size: int, overwrite: bool, backend: str
) -> int:
    """Writes ``out``, a .npz of an array for each layer, float32 (N, …) in the pictures' order, and ``paths``, their
    names.

    Raises :class:`InputError` for what cannot be used, and for files that hold no picture once the others are written.
    """
    check_choices({"backend": backend})
    check_out(out, ".npz", overwrite)
    found = find(weights)
    device = torch.device(plan_devices(1))
    try:
        net = features(model_of(found, device), layers)
    except ValueError as error:
        raise InputError(f"--{error}".replace("--layers:", "--layer:")) from None
    transform = Transform(found.config.transform, found.config.image_size)
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    names, bad = [], []
    with torch.inference_mode(), using(backend):
        for first in track(range(0, len(paths), batch_size), "features", transient=True):
            pictures = []
            for path in paths[first : first + batch_size]:
                try:
                    pixels = transform(read_image(path, found.config.exif))
                    pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
                    names.append(str(path))
                except BadImage as error:
                    bad.append(str(error))
            if pictures:
                with autocast(found.config, device):
                    seen = net(normalized(torch.stack(pictures), found.config, device))
                for layer, values in seen.items():
                    parts[layer].append(values.float().cpu().numpy())
    if names:
        with written(out) as file:
            np.savez(file, paths=np.array(names), **{layer: np.concatenate(part) for layer, part in parts.items()})
    if bad:
        raise InputError(f"{len(bad)} of {len(paths)} images could not be read: {'; '.join(bad)}")
    print(f"{len(names)} images, {', '.join(layers)}: {out}")
    return 0
