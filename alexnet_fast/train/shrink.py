"""The command shrink: fewer channels, and fc6 and fc7 of low rank, as a run of its own that is trained further.

Channels of conv1 … conv5 and outputs of fc6 and fc7 that stay are those whose weights have the largest L1 norm (Li,
Kadav, Durdanovic, Samet and Graf, "Pruning filters for efficient ConvNets", 2017), as many in each part of a layer that
is in groups; what is left of a filter is scaled to the norm that it had. A matrix W of rank r is up · down, with up's
columns the first r singular vectors (Denton, Zaremba, Bruna, LeCun and Fergus, 2014): of all matrices of this rank the
nearest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from alexnet_fast.data import Data
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.alexnet import AlexNet
from alexnet_fast.terminal import say
from alexnet_fast.train import checkpoint
from alexnet_fast.train.commands import absolute, open_run_data, train
from alexnet_fast.train.config import TrainConfig, check
from alexnet_fast.train.inference import Found, find, model_of
from alexnet_fast.train.model import build_model, widths_of
from alexnet_fast.train.smaller import compare, net_of, show

RESULT = "smaller.json"


def shrink(
    path: str,
    out: Path,
    svd: float | None = None,
    prune: float = 0.0,
    width: float = 1.0,
    finetune: int = 0,
    data: str | None = None,
    lr: float | None = None,
) -> int:
    """Writes to folder ``out`` a smaller net of what ``path`` names, trains it for ``finetune`` epochs on ``data``, and
    prints both nets' size, accuracy and speed; they are in ``out``/smaller.json too.

    ``svd``: the rank of fc6 and fc7, or, below 1, the share of the squared singular values that stays. ``prune``: the
    share of each convolution's channels that goes; ``width``: what they, and the outputs of fc6 and fc7, are multiplied
    by. ``lr``: of the training; the run's own if None. Raises :class:`InputError`.
    """
    _check_numbers(svd, prune, width, finetune, lr)
    check_folder(out)
    found = find(path, data)
    config, loaded = opened(found, data)
    net = model_of(found, torch.device("cpu"))
    if not isinstance(net, AlexNet) or net.variant.linear_groups > 1:
        raise InputError(f"{found.name}: the linear layers of {config.variant} are split over towers")
    weights = smaller(net, widths_of(net.variant, prune, width), svd, config.image_size)
    variant = VARIANTS[config.variant]
    widths = tuple(len(bias) for _, bias in weights[:-1])
    ranks = tuple(0 if isinstance(weight, Tensor) else len(weight[0]) for weight, _ in weights[5:7])
    small = dataclasses.replace(
        config,
        out=str(out.absolute()),
        widths=None if widths == variant.widths else widths,
        ranks=ranks,
        **({"epochs": finetune, "schedule": "cosine", "warmup": 0.0} if finetune else {}),
        **({} if lr is None else {"lr": lr}),
    )
    check(small, 1)
    write(out, small, fill(build_model(small), weights), found.classes or loaded.classes, loaded)
    del net, weights
    if finetune and (code := train({}, str(out))):
        return code
    rows = compare({"before": net_of(found, config), "after": net_of(find(str(out)), small)}, loaded.val)
    show(rows)
    record = {name: row._asdict() for name, row in rows.items()}
    (out / RESULT).write_text(json.dumps(record, indent=1) + "\n")
    say(Console(), f"{out}: alexnet-fast train --resume, eval, predict and export take it")
    return 0


def _check_numbers(svd: float | None, prune: float, width: float, finetune: int, lr: float | None) -> None:
    if svd is not None and not (0 < svd < 1 or (svd >= 1 and svd.is_integer())):
        raise InputError(f"--svd: expected a rank, or a share of the energy between 0 and 1, got {svd:g}")
    if not 0 <= prune < 1:
        raise InputError(f"--prune: expected a share from 0 to less than 1, got {prune:g}")
    if not 0 < width <= 1:
        raise InputError(f"--width: expected a factor above 0, at most 1, got {width:g}")
    if svd is None and not prune and width == 1:
        raise InputError("shrink: expected --svd, --prune or --width; without them the net stays as it is")
    if finetune < 0:
        raise InputError(f"--finetune: expected a number of epochs, got {finetune}")
    if lr is not None and not finetune:
        raise InputError("--lr: is for --finetune, which was not given")


def check_folder(out: Path) -> None:
    """Raises :class:`InputError` unless a run can be written there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is there already")
    checkpoint.check_writable(out, "--out")


def opened(found: Found, data: str | None) -> tuple[TrainConfig, Data]:
    """The configuration of a run on ``data``, or on the images of the run that was found; and these, opened."""
    if data is None and found.step is None:
        raise InputError(f"--data: {found.name} is of no run whose images would be known")
    if found.config.quantization != "none":
        raise InputError(f"{found.name}: its linear layers are int8 already; begin with the run that it was made of")
    plain = {"nproc": 1, "parallel": "ddp", "hybrid_scheme": "a", "gradients": "fp32", "choices": {}, "cache": "none"}
    plain |= {"weights": None, "max_steps": None, "model_ema": False, "early_stopping": None}
    config = dataclasses.replace(found.config, **plain)
    if data is not None:
        config = dataclasses.replace(config, data=absolute(data), synthetic=False)
    loaded = open_run_data(config)
    known = found.classes if found.step is not None else None
    count = config.num_classes if known is None else len(known)
    if len(loaded.classes) != count or (known is not None and loaded.classes != known):
        raise InputError(f"--data: its {len(loaded.classes)} classes are not the {count} of {found.name}")
    return config, loaded


Weight = Tensor | tuple[Tensor, Tensor]  # a matrix, or those of which it is made: the first to be applied, the second


@torch.no_grad()
def smaller(net: AlexNet, widths: list[int], svd: float | None, image_size: int) -> list[tuple[Weight, Tensor]]:
    """Weights and biases of conv1 … conv5 and fc6 … fc8 that stay of ``net``'s, for images of ``image_size``."""
    layers, kept = [], torch.arange(3)
    convolutions = [module for module in net.features if isinstance(module, nn.Conv2d)]
    for conv, width, parts in zip(convolutions, widths, net.variant.parts, strict=False):
        stay = _strongest(conv.weight, width, parts)
        inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        own = [kept[kept // inputs == group] - group * inputs for group in range(conv.groups)]
        filters = torch.stack([conv.weight[k, own[k // outputs]] for k in stay])
        layers.append((_as_strong(filters, conv.weight[stay]), conv.bias[stay]))
        kept = stay
    matrices = _matrices(net)
    six, bias = matrices[0]
    pixels = net.avgpool.output_size[0] ** 2
    six = six.view(len(six), -1, pixels) @ _seen(net, image_size)
    matrices[0] = _as_strong(six[:, kept].flatten(1), six.flatten(1)), bias
    kept = None
    for place, (name, (matrix, bias)) in enumerate(zip(("fc6", "fc7", "fc8"), matrices, strict=True)):
        matrix = matrix if kept is None else _as_strong(matrix[:, kept], matrix)
        if name != "fc8":
            kept = _strongest(matrix, widths[5 + place])
            matrix, bias = matrix[kept], bias[kept]
            matrix = matrix if svd is None else _of_low_rank(name, matrix, svd)
        layers.append((matrix, bias))
    return layers


def _strongest(weight: Tensor, count: int, parts: int = 1) -> Tensor:
    """The numbers of the ``count`` outputs with the largest L1 norm, equally many of each part, in order."""
    norms = weight.flatten(1).abs().sum(1).view(parts, -1)
    best = norms.topk(count // parts, 1).indices + torch.arange(parts)[:, None] * norms.shape[1]
    return best.flatten().sort().values


def _as_strong(left: Tensor, whole: Tensor) -> Tensor:
    """What is left of each output's weights, scaled to the norm that they had whole: signals would fade from layer to
    layer, and with them what is learnt."""
    now, then = (part.flatten(1).norm(dim=1) for part in (left, whole))
    factor = then / now.clamp(min=1e-30)
    return left * factor.clamp(max=1e3).view(-1, *[1] * (left.dim() - 1))


def _matrices(net: AlexNet) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of fc6, fc7 and fc8, multiplied out where they are of low rank."""
    found, before = [], None
    for module in net.classifier:
        if isinstance(module, nn.Linear):
            weight = module.weight if before is None else module.weight @ before
            if module.bias is None:
                before = weight
            else:
                found.append((weight, module.bias))
                before = None
    return found


def _seen(net: AlexNet, image_size: int) -> Tensor:
    """What of fc6's weights for the pixels of one channel images of this size can tell apart, as a projection: where
    the last feature map is smaller than fc6 expects, avgpool repeats its pixels, and only sums of weights count."""
    side = net.variant.feature_side(image_size)
    pooled = net.avgpool(torch.eye(side * side).view(-1, 1, side, side)).flatten(1)
    return torch.linalg.pinv(pooled) @ pooled


def _of_low_rank(name: str, matrix: Tensor, svd: float) -> Weight:
    """The matrix as two, or as it is where these would be no smaller. Raises :class:`InputError`."""
    rows, columns = matrix.shape
    if svd > min(rows, columns):
        raise InputError(
            f"--svd: {name} takes {columns} to {rows}, so its rank is {min(rows, columns)} at most, got {svd:g}"
        )
    wide = matrix.double()
    # Left singular vectors and squared singular values, in ascending order.
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares = squares.clamp(min=0)
    shares = squares.flip(0).cumsum(0) / squares.sum().clamp(min=1e-300)
    rank = int(svd) if svd >= 1 else min(len(shares), int((shares < svd).sum()) + 1)
    if rank * (rows + columns) >= rows * columns:
        return matrix
    left = vectors[:, -rank:].flip(1)
    root = squares[-rank:].flip(0).clamp(min=1e-30).pow(0.25)  # both halves are as large, and learn alike
    return ((left.T @ wide) / root[:, None]).float(), (left * root).float()


@torch.no_grad()
def fill(net: nn.Module, layers: list[tuple[Weight, Tensor]]) -> nn.Module:
    """``net``, of the widths and ranks of ``layers``, with their numbers."""
    modules = (module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
    for weight, bias in layers:
        for part in (weight,) if isinstance(weight, Tensor) else weight:
            module = next(modules)
            module.weight.copy_(part)
        module.bias.copy_(bias)
    return net


def write(out: Path, config: TrainConfig, net: nn.Module, classes: list[str], data: Data) -> None:
    """The run ``out``, whole or not at all, at step 0."""
    state = {**checkpoint.START, "sizes": {"train": len(data.train), "val": len(data.val)}}
    unfinished = out.absolute().with_name(f".unfinished-{out.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        checkpoint.save(unfinished, 0, net.state_dict(), {}, config=config, classes=classes, state=state)
        (unfinished / checkpoint.CONFIG).write_text(json.dumps(config.to_json(), indent=2) + "\n")
        os.rename(unfinished, out)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(unfinished)
