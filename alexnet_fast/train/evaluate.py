"""Loss and accuracy over a whole set, each image counted once whatever the number of ranks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast import backends, ops, tuning
from alexnet_fast.data import NOT_COUNTED, Batch, Transform, evaluation_batches
from alexnet_fast.data.augmentation import erased, jittered, rand_augmented, rotated
from alexnet_fast.data.feed import resized_crops
from alexnet_fast.data.sources import Split
from alexnet_fast.errors import InputError
from alexnet_fast.geometry import fold_of
from alexnet_fast.nn import FusedSequential, input_fold
from alexnet_fast.ops.convolution import STRIDE_1, fold_weight
from alexnet_fast.parallel import Ranks
from alexnet_fast.train.config import TrainConfig

CONFUSION_CLASSES = 1000  # a table of more is too large to be looked at


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


def fold_for(model: nn.Module, config: TrainConfig, device: torch.device, training: bool) -> ops.SpaceToDepth | None:
    """The fold in which ``model`` is given images: its own, if ``config`` asks for it or, with auto, where that pays.

    That is on CUDA devices with bfloat16, where the first convolution is one of this package's kernels: they read
    images so, and would fold them in each call. With oneDNN it depends on dtype and processor, which
    benchmarks/bench_augment.py compares, and images stay as they are. Raises :class:`InputError` where training is
    asked to fold and cannot.
    """
    features = getattr(model, "features", None)
    fold = input_fold(features) if isinstance(features, FusedSequential) else None
    whole = training and (config.random_erase or config.cutmix)  # rectangles of images that are no longer uint8
    if fold is None or whole:
        if training and config.fold == "on":
            reason = "erasing and CutMix change images that are not folded" if fold else "no first convolution takes it"
            raise InputError(f"--fold: {reason}")
        return None
    if config.fold != "auto" or device.type != "cuda" or config.precision != "bf16":
        return fold if config.fold == "on" else None
    if config.backend != "auto":
        return fold if config.backend in ("cuda", "triton") else None
    conv = next(module for module in features if isinstance(module, nn.Conv2d))
    weight = tuple(fold_weight(conv.weight.detach(), conv.stride).shape)
    x = config.batch_size // config.nproc, weight[1], *fold_of(fold, (config.image_size,) * 2).sides
    form = tuning.Form("conv_relu", torch.bfloat16, x, weight, *STRIDE_1, "channels_last")
    return None if tuning.shipped(form, tuning.device_name(device)).startswith("cudnn") else fold


def normalized(
    images: Tensor, config: TrainConfig, device: torch.device, fold: ops.SpaceToDepth | None = None
) -> Tensor:
    """uint8 images (n, 3, h, w) as the net takes them, on ``device``: the centre of those that are larger,
    (image / 255 - mean) / std, bfloat16 where autocast would make them so; folded as ``fold`` says."""
    images = images.to(device, non_blocking=True)
    size = tuple(min(side, config.image_size) for side in images.shape[2:])
    return ops.augment(images, size, config.mean, config.std, dtype=_dtype(config), fold=fold)


def augmented(
    batch: Batch, config: TrainConfig, device: torch.device, epoch: int, fold: ops.SpaceToDepth | None = None
) -> Tensor:
    """A training batch as the net takes it: turned, jittered in colour, changed by RandAugment, with colour noise and
    an erased rectangle, as far as ``config`` asks for these. Images that are ``whole`` are cropped and mirrored at
    random; those that are not erased may be folded. What is drawn for an image depends on its number, the epoch and
    the seed.
    """
    images, crop = batch.images.to(device, non_blocking=True), batch.whole
    if crop and config.transform == "resized-crop":
        images, crop = resized_crops(images, batch.index, config.image_size, config.seed, epoch), False
    if config.rotation:
        images = rotated(images, batch.index, config.rotation, config.seed, epoch)
    if config.colour_jitter:
        images = jittered(images, batch.index, config.colour_jitter, config.seed, epoch)
    if config.auto_augment == "ra":
        images = rand_augmented(images, batch.index, config.ra_magnitude, config.seed, epoch)
    colour = torch.tensor(config.colour) * config.colour_noise if config.colour_noise else None
    std = [value * config.colour_divisor for value in config.std]
    drawn = {"index": batch.index, "epoch": epoch, "seed": config.seed, "mirror": crop, "colour": colour}
    images = ops.augment(images, config.image_size, config.mean, std, **drawn, dtype=_dtype(config), fold=fold)
    return erased(images, batch.index, config.random_erase, config.seed, epoch) if config.random_erase else images


def _dtype(config: TrainConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def scores(
    model: nn.Module,
    images: Tensor,
    config: TrainConfig,
    device: torch.device,
    ten_crop: bool,
    fold: ops.SpaceToDepth | None = None,
) -> Tensor:
    """float32 logits (n, classes) of images' centres; with ``ten_crop``, the logarithm of the softmax averaged over
    the four corners, the centre, and their mirror images.
    """
    if not ten_crop:
        with autocast(config, device):
            return model(normalized(images, config, device, fold)).float()
    side = config.image_size
    down, right = images.shape[2] - side, images.shape[3] - side
    views = []
    for top, left in ((0, 0), (0, right), (down, 0), (down, right), (down // 2, right // 2)):
        crop = images[:, :, top : top + side, left : left + side]
        for view in (crop, crop.flip(3)):
            with autocast(config, device):
                views.append(model(normalized(view, config, device, fold)).float().log_softmax(1))
    return torch.stack(views).logsumexp(0) - math.log(len(views))


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
    ten_crop: bool = False,
    confusion: Tensor | None = None,
) -> tuple[Evaluation, dict[str, str]]:
    """The evaluation of ``split`` over all ranks, and the files (path: reason) that could not be used and were left
    out.

    ``after_batch`` is called with the number of images of each of this rank's batches. Counts are whole numbers and
    exact; the loss is summed in float64. ``ten_crop`` as in :func:`scores`. To ``confusion``, int64 (classes, classes),
    is added how many images of each label got which answer, over all ranks.
    """
    model.eval()
    fold = fold_for(model, config, ranks.device, training=False)
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    bad: dict[str, str] = {}
    batches = evaluation_batches(
        split,
        Transform(config.transform, config.image_size, whole=ten_crop),
        batch_size=config.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        workers=config.workers,
        device=ranks.device,
    )
    with torch.no_grad(), contextlib.closing(batches):
        for batch in batches:
            logits = scores(model, batch.images, config, ranks.device, ten_crop, fold)
            labels = batch.labels.to(ranks.device)
            losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=NOT_COUNTED).double()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            counted = (labels != NOT_COUNTED).sum()
            sums += torch.stack([losses.sum(), hits[:, 0].sum(), hits.sum(), counted])
            if confusion is not None:
                pairs = labels * confusion.shape[1] + logits.argmax(1)
                counts = pairs[labels != NOT_COUNTED].bincount(minlength=confusion.numel())
                confusion += counts.view_as(confusion)
            bad.update(batch.bad)
            after_batch(len(labels))
    if confusion is not None:
        ranks.add(confusion)
    loss, top1, top5, count = ranks.add(sums).tolist()
    bad = {path: reason for record in ranks.gather(bad) for path, reason in record.items()}
    if count == 0:
        raise InputError(f"none of the {len(split)} held-out images could be used")
    return Evaluation(loss / count, round(top1), round(top5), round(count)), bad
