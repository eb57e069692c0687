"""Batches for one rank. The order of images, their share-out and their augmentation depend on (seed, epoch, image)
alone.

A batch of the whole run is split over ranks by stride: rank r of w takes its images r, r + w, r + 2w and so on. No
image is dropped and none is counted twice, whatever the sizes: a place that must not count carries the label
``NOT_COUNTED``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import signal
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from alexnet_fast.data.feed import stored_batches
from alexnet_fast.data.images import BadImage
from alexnet_fast.data.random import Draws, mix
from alexnet_fast.data.sources import Split
from alexnet_fast.data.stored import CachedImages, StoredImages
from alexnet_fast.data.transforms import Transform
from alexnet_fast.errors import RunError

CPU = torch.device("cpu")
NOT_COUNTED = -100  # cross_entropy's default ignore_index: no loss, no gradient
REPLACEMENTS = 16  # where a tenth of the files is bad, sixteen bad ones in a row are drawn once in 10^16
WORKER_DIED = "a loader worker process died (killed, or out of memory)"
NO_ROOM = "/dev/shm is full, through which loader workers hand over batches: -j 0 does without, or make it larger"


class Batch(NamedTuple):
    """One rank's part of a batch.

    ``images`` uint8 (n, 3, side, side) channels_last, ``labels`` int64 (n,), ``counted`` images of the batch over all
    ranks, ``bad`` (path, reason) of files that could not be used, ``index`` int64 (n,) the images' numbers in their
    set. With ``whole`` the images are stored squares, larger than the net's, that are still to be cropped.
    """

    images: Tensor
    labels: Tensor
    counted: int
    bad: list[tuple[str, str]]
    index: Tensor
    whole: bool


class _Images(torch.utils.data.Dataset):
    """Decodes and crops. An unusable file is replaced while training, and left out of an evaluation."""

    def __init__(self, split: Split, transform: Transform, key: tuple[int, int] | None):
        self.split, self.transform, self.key = split, transform, key

    def __getitem__(self, index: int) -> tuple[np.ndarray, int, list[tuple[str, str]]]:
        bad = []
        draws = Draws(*self.key, index) if self.key else None
        for _ in range(REPLACEMENTS):
            try:
                image, label = self.split.read(index)
                return self.transform(image, draws), label, bad
            except BadImage as error:
                bad.append((error.path, error.reason))
            if draws is None:
                break
            index = draws.below(len(self.split))
        return np.zeros((self.transform.side, self.transform.side, 3), np.uint8), NOT_COUNTED, bad


def _collate(items: list[tuple[np.ndarray, int, list]]) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
    """uint8 images (n, side, side, 3), labels, bad files. A worker puts its images into shared memory here. torch would
    do that later, in another thread; where shared memory is full that thread loses the batch, and the rank waits for it
    for ever.
    """
    first = items[0][0]
    shape = (len(items), *first.shape)
    if torch.utils.data.get_worker_info() is None:
        images = torch.empty(shape, dtype=torch.uint8)
    else:
        storage = torch.UntypedStorage._new_shared(int(np.prod(shape)), device="cpu")
        images = torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)
    np.stack([image for image, _, _ in items], out=images.numpy())
    return images, [label for _, label, _ in items], [bad for _, _, bads in items for bad in bads]


def _begin(worker: int) -> None:
    # Ctrl-C reaches the whole process group, and the rank needs its workers until it has finished its step and saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # However the rank ends, Linux then ends the worker, even one that is stopped. PR_SET_PDEATHSIG is 1.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _load(
    split: Split,
    transform: Transform,
    key: tuple[int, int] | None,
    batches: list[list[int]],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor, list, Tensor, bool]]:
    """Images, labels, bad files, numbers, and whether the images are still whole, of each list of numbers."""
    if isinstance(split, StoredImages) and transform.kind != "shift":
        for index, images in zip(batches, stored_batches(split, batches, device, workers), strict=True):
            yield images, torch.from_numpy(split.labels[index]).long(), [], torch.tensor(index), True
        return
    for index, loaded in zip(batches, _decoded(_Images(split, transform, key), batches, workers), strict=True):
        yield *loaded, torch.tensor(index), False


def _decoded(images: _Images, batches: list[list[int]], workers: int) -> Iterator[tuple[Tensor, Tensor, list]]:
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_begin,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        loaded = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunError(NO_ROOM) from error  # not even for the locks of its queues
    try:
        for pictures, labels, bad in loaded:
            yield pictures.permute(0, 3, 1, 2), torch.tensor(labels), bad
    except (EOFError, ConnectionError, FileNotFoundError) as error:  # the worker died while handing over a batch
        _forget_workers()
        raise RunError(WORKER_DIED) from error
    except RuntimeError:  # of torch: a worker died, or raised
        _forget_workers()
        raise
    finally:
        if workers:  # at once: an error's traceback would keep the workers, which ignore SIGTERM
            loaded._shutdown_workers()


def _forget_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again while the loader is put away


@contextlib.contextmanager
def worker_deaths_named() -> Iterator[None]:
    """Turns torch's error about a dead loader worker, which a signal handler may raise anywhere, into a RunError."""
    try:
        yield
    except RuntimeError as error:
        if "No space left on device" in str(error):
            _forget_workers()
            raise RunError(NO_ROOM) from error
        if "DataLoader worker" not in str(error) or "Caught" in str(error):
            raise
        _forget_workers()
        raise RunError(WORKER_DIED) from error


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches in an epoch; the last one may be smaller."""
    return -(-images // batch_size)


def training_batches(
    split: Split,
    transform: Transform,
    *,
    seed: int,
    epoch: int,
    first: int,
    batch_size: int,
    rank: int,
    world: int,
    workers: int,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """The epoch's batches from number ``first`` on, in its own permutation; ``batch_size`` counts all ranks.

    A rank for which the last batch leaves no image gets one that does not count. Where each rank holds a part of the
    set (:class:`alexnet_fast.data.stored.CachedImages`), it gets images of its own part, so the order then depends on
    the number of ranks.
    """
    generator = torch.Generator().manual_seed(mix(seed, epoch) >> 1)
    order = torch.randperm(len(split), generator=generator)
    if isinstance(split, CachedImages):
        drawn, order = order, torch.empty_like(order)
        for holder in range(world):
            order[holder::world] = drawn[drawn % world == holder]
    whole = order.split(batch_size)[first:]
    shares = [part[rank::world].tolist() or [int(order[rank % len(order)])] for part in whole]
    loaded = _load(split, transform, (seed, epoch), shares, workers, device)
    for part, (images, labels, bad, index, uncut) in zip(whole, loaded, strict=True):
        if len(part) <= rank:
            labels = torch.full_like(labels, NOT_COUNTED)
        yield Batch(images, labels, len(part), bad, index, uncut)


def evaluation_batches(
    split: Split,
    transform: Transform,
    *,
    batch_size: int,
    rank: int,
    world: int,
    workers: int,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """The rank's share of the set, in order, ``batch_size`` / ``world`` images at a time."""
    share, size = list(range(rank, len(split), world)), max(1, batch_size // world)
    parts = [share[start : start + size] for start in range(0, len(share), size)]
    for images, labels, bad, index, uncut in _load(split, transform, None, parts, workers, device):
        yield Batch(images, labels, int((labels != NOT_COUNTED).sum()), bad, index, uncut)
