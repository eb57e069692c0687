"""Loss and accuracy over a whole set, each image counted once whatever the number of ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast import backends, ops
from alexnet_fast.data import NOT_COUNTED, Transform, evaluation_batches
from alexnet_fast.data.sources import Split
from alexnet_fast.errors import InputError
from alexnet_fast.parallel import Ranks
from alexnet_fast.train.config import TrainConfig


class Evaluation(NamedTuple):
    """Mean cross-entropy, and how many of ``count`` images have their label first, or among the first five."""

    loss: float
    top1_count: int
    top5_count: int
    count: int

    @property
    def top1(self) -> float:
        return self.top1_count / self.count

    @property
    def top5(self) -> float:
        return self.top5_count / self.count


def normalized(images: Tensor, config: TrainConfig, device: torch.device) -> Tensor:
    """uint8 images (n, 3, h, w) as the net takes them, on ``device``: (image / 255 - mean) / std, bfloat16 where
    autocast would make them so."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    images = images.to(device, non_blocking=True)
    return ops.augment(images, tuple(images.shape[2:]), config.mean, config.std, dtype=dtype)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Operators within the block run on ``backend``; where it cannot serve them, :class:`InputError` says why."""
    try:
        with backends.backend(backend):
            yield
    except backends.BackendError as error:
        raise InputError(f"--backend: {error}") from None


def evaluate(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    ranks: Ranks,
    after_batch: Callable[[int], None] = lambda images: None,
) -> tuple[Evaluation, dict[str, str]]:
    """The evaluation of ``split`` over all ranks, and the files (path: reason) that could not be used and were left
    out.

    ``after_batch`` is called with the number of images of each of this rank's batches. Counts are whole numbers and
    exact; the loss is summed in float64.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    bad: dict[str, str] = {}
    batches = evaluation_batches(
        split,
        Transform(config.transform, config.image_size),
        batch_size=config.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.workers,
    )
    with torch.no_grad():
        for batch in batches:
            with autocast(config, ranks.device):
                logits = model(normalized(batch.images, config, ranks.device)).float()
            labels = batch.labels.to(ranks.device)
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=NOT_COUNTED).double()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            counted = (labels != NOT_COUNTED).sum()
            sums += torch.stack([losses.sum(), hits[:, 0].sum(), hits.sum(), counted])
            bad.update(batch.bad)
            after_batch(len(labels))
    loss, top1, top5, count = ranks.add(sums).tolist()
    bad = {path: reason for record in ranks.gather(bad) for path, reason in record.items()}
    if count == 0:
        raise InputError(f"none of the {len(split)} held-out images could be used")
    return Evaluation(loss / count, round(top1), round(top5), round(count)), bad
