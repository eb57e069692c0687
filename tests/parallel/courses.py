"""Short runs of a small net of AlexNet's make, many of them in one start of the ranks.

In float64: two ranks round their sums otherwise than one process, and in float32 fifteen steps can make of that, as the
processor's way of adding has it, a difference as large as an error's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from alexnet_fast import AlexNet
from alexnet_fast.models.alexnet import _module
from alexnet_fast.models.variants import VARIANTS, Conv
from alexnet_fast.nn import FusedSequential
from alexnet_fast.parallel import Ranks
from alexnet_fast.train import checkpoint
from alexnet_fast.train.commands import train_rank
from alexnet_fast.train.config import TrainConfig, resolve, resumed
from tests.train import runs

WIDTH = 16  # of fc6 and fc7
CHANNELS = 8  # one for so many of the variant's
# 119 images: twelve steps an epoch, of which the last has nine.
STEPS = {"max_steps": 15, "checkpoint_steps": 5, "log_steps": 1, "lr": 0.02, "dropout": 0.5, "image_size": 64}


class Doubled(FusedSequential):
    """Takes images of any dtype to float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


class SmallNet(AlexNet):
    """A variant with an eighth of the channels, and ``WIDTH`` features in fc6 and fc7, in float64."""

    def __init__(self, num_classes: int, dropout: float, variant: str) -> None:
        nn.Module.__init__(self)
        self.variant = VARIANTS[variant]
        layers, channels = [], 3
        for layer in self.variant.features:
            if isinstance(layer, Conv):
                layer = layer._replace(channels=layer.channels // CHANNELS)
            layers.append(_module(layer, channels))
            channels = layer.channels if isinstance(layer, Conv) else channels
        self.features = Doubled(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        drops = [nn.Dropout(dropout), nn.Dropout(dropout)]
        one = [nn.Linear(4 * channels, WIDTH), nn.ReLU()]
        two = [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
        first = self.variant.dropout_first
        layers = [drops[0], *one, drops[1], *two] if first else [*one, drops[0], *two, drops[1]]
        self.classifier = nn.Sequential(*layers, nn.Linear(WIDTH, num_classes))


def build(config: TrainConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    net = SmallNet(config.num_classes, config.dropout, config.variant)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # or the loss would stay at ln 10 and show nothing
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    net.features.requires_grad_(not config.freeze_features)
    return net.double()


def course(ranks: Ranks, out: Path, **given: Any) -> int:
    """A run on the ranks that there are, in the folder ``out``; its data lies beside that."""
    data = f"fashion-mnist:{out.parent / 'set'}"
    options = {**runs.GIVEN, **STEPS, "data": data, "out": str(out), "nproc": ranks.world, **given}
    return _train(ranks, resolve(options, 10), None)


def go_on(ranks: Ranks, out: Path, step: int | None = None, **given: Any) -> int:
    """The run in ``out`` from its checkpoint of ``step``, or its last, on."""
    found = out / "checkpoints" / (checkpoint.folder_name(step) if step else "last")
    config = resumed(checkpoint.load(found).config, {"nproc": ranks.world, **given})
    return _train(ranks, config, found.resolve())


def _train(ranks: Ranks, config: TrainConfig, found: Path | None) -> int:
    ranks = Ranks(ranks.rank, ranks.world, ranks.device)  # its count of bytes starts at 0
    with mock.patch("alexnet_fast.train.pictures.draw_curves"):  # takes longer than the steps
        code = train_rank(ranks, config, found, build)
    ranks.wait()  # rank 0 has then written its last checkpoint
    return code


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in runs.rows(out) if row["kind"] == "step"]


def evaluations(out: Path) -> list[tuple[float, float, int]]:
    return [
        (row["val_top1"], row["val_top5"], row["count"]) for row in runs.rows(out) if row["kind"] in ("epoch", "stop")
    ]


def summary(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text())


def caught(function: Callable[..., int], *args: Any, **given: Any) -> str:
    """What the function's error says, with its type."""
    try:
        function(*args, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    runs.main(build)
