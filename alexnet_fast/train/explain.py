"""The command explain: why a net answered as it did, what its channels look for, and its first filters, as pictures."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from alexnet_fast.errors import InputError, needs
from alexnet_fast.explain import grad_cam, guided_gradients, occlusion, peaks
from alexnet_fast.parallel import plan_devices
from alexnet_fast.terminal import nearest, shown
from alexnet_fast.train.config import check_choices
from alexnet_fast.train.evaluate import normalized, using
from alexnet_fast.train.extract import Picture, batches, pictures_of, refuse
from alexnet_fast.train.inference import Found, find, model_of, names_of
from alexnet_fast.train.outputs import check_out, written
from alexnet_fast.train.pictures import Explained, draw_explained, draw_filters, draw_strongest

ROWS, COLUMNS = 8, 9  # channels, and pictures of each, that --strongest draws
MOST = 32  # pictures that are explained in one file


def explain(
    paths: list[Path],
    weights: str,
    name: str | None,
    layer: str,
    strongest: str | None,
    filters: bool,
    out: Path,
    overwrite: bool,
    backend: str,
) -> int:
    """Draws into ``out`` for each picture Grad-CAM at ``layer``, what covering a part costs, and guided gradients, all
    of the class ``name`` or of the likeliest one; or else what the channels of the layer ``strongest`` answer to most,
    or the first layer's ``filters``.

    Raises :class:`InputError` for what cannot be used, and for files that hold no picture once the others are drawn.
    """
    check_choices({"backend": backend})
    check_out(out, ".png", overwrite)
    if filters and (strongest is not None or paths):
        raise InputError("--filters: goes with no pictures and not with --strongest: it shows the net alone")
    if not filters and not paths:
        raise InputError("IMAGES: expected one picture at least, or --filters")
    if not filters:
        needs("explain", "matplotlib")
    found = find(weights)
    number = None if name is None else _class(found, name)
    pictures, bad = pictures_of(paths, found.config.exif), []
    if strongest is None and len(pictures) > MOST:
        raise InputError(f"IMAGES: {len(pictures)} pictures; at most {MOST} have room in one file")
    net = model_of(found, torch.device(plan_devices(1)))
    if filters:
        with written(out) as file:
            draw_filters(net, found.step, file)
        print(f"the first layer's filters: {out}")
        return 0
    try:
        with using(backend):
            if strongest is not None:
                _draw_strongest(found, net, pictures, strongest, out, bad)
            else:
                _draw_explained(found, net, pictures, number, layer, out, bad)
    except ValueError as error:
        if not str(error).startswith("layer"):
            raise
        option = "--layer" if strongest is None else "--strongest"
        raise InputError(re.sub("^layers?:", f"{option}:", str(error))) from None
    refuse(bad, len(pictures))
    return 0


def _class(found: Found, name: str) -> int:
    names = names_of(found)
    if name in names:
        return names.index(name)
    raise InputError(f"--class: {found.name} knows no class {name!r}{nearest(name, names) or _all(names)}")


def _all(names: list[str]) -> str:
    return f"; it knows {', '.join(names[:10])}" + (" …" if len(names) > 10 else "")


def _draw_explained(
    found: Found, net: nn.Module, pictures: list[Picture], target: int | None, layer: str, out: Path, bad: list[str]
) -> None:
    config, names, rows = dataclasses.replace(found.config, precision="fp32"), names_of(found), []
    device = next(net.parameters()).device
    for (picture,), pixels in batches(pictures, config, 1, "explain", bad):
        images = normalized(pixels, config, device)
        with torch.no_grad():
            chances = net(images).softmax(1)[0]
        asked = int(chances.argmax()) if target is None else target
        cam = grad_cam(net, images, asked, layer)
        lost = occlusion(lambda covered: net(covered).softmax(1), images, asked)
        maps = cam, lost, guided_gradients(net, images, asked)
        said = f"{shown(names[asked])} {chances[asked]:.1%}"
        rows.append(Explained(said, pixels[0].permute(1, 2, 0).numpy(), *(one[0].float().cpu() for one in maps)))
        print(f"{shown(picture.path)}: {said}")
    if rows:
        with written(out) as file:
            draw_explained(rows, layer, file)
        print(f"Grad-CAM, covering and guided gradients: {out}")


def _draw_strongest(
    found: Found, net: nn.Module, pictures: list[Picture], layer: str, out: Path, bad: list[str]
) -> None:
    config = dataclasses.replace(found.config, precision="fp32")
    device = next(net.parameters()).device
    kept: list[Picture] = []
    best: list[Tensor] = []  # of each channel the COLUMNS largest values, their boxes, and their pictures' numbers
    for part, pixels in batches(pictures, config, 32, "activations", bad):
        seen = peaks(net, normalized(pixels, config, device), layer)
        numbers = torch.arange(len(kept), len(kept) + len(part))[:, None].expand(seen.values.shape)
        kept += part
        news = [tensor.cpu() for tensor in (*seen, numbers)]
        values, boxes, numbers = map(torch.cat, zip(best, news, strict=True)) if best else news
        values, order = values.topk(min(COLUMNS, len(values)), 0)
        best = [values, boxes.gather(0, order[..., None].expand(*order.shape, 4)), numbers.gather(0, order)]
    if not kept:
        return
    rows, strongest = {}, best[0][0]
    for channel in strongest.topk(min(ROWS, len(strongest))).indices.tolist():
        rows[f"channel {channel}"] = patches = []
        for value, box, number in zip(*(part[:, channel].tolist() for part in best), strict=True):
            top, left, bottom, right = box
            patches.append((value, kept[number].cut(config)[top:bottom, left:right]))
    with written(out) as file:
        draw_strongest(rows, file)
    print(f"of {len(kept)} images what {layer} answers to most, {len(rows)} of {len(strongest)} channels: {out}")
