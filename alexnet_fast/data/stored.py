"""Pictures that were decoded before training: squares of one size, read by number as bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alexnet_fast.errors import InputError


class StoredImages(ABC):
    """``labels`` int (n,); pictures uint8 (``size``, ``size``, 3), ready to be cropped on the device that trains."""

    size: int
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """One picture, uint8 (size, size, 3); a view where that costs no copy."""

    def prefetch(self, indices: Sequence[int]) -> None:  # noqa: B027  what is in memory has nothing to do
        """Announces that these pictures will be read soon; returns at once."""

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels(index)), int(self.labels[index])


class SyntheticImages(StoredImages):
    """Noise from a pool of 64 pictures: a run with it times everything but the reading of files."""

    def __init__(self, length: int, num_classes: int, size: int):
        self.size, self.labels = size, np.arange(length) % num_classes
        self.pool = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)

    def pixels(self, index: int) -> np.ndarray:
        return self.pool[index % len(self.pool)]


class CachedImages(StoredImages):
    """Every ``world``-th picture of ``images`` from number ``rank`` on, in the memory of ``device``.

    Raises :class:`InputError` where they do not fit.
    """

    def __init__(self, images: StoredImages, device: torch.device, rank: int, world: int):
        self.size, self.labels, self.rank, self.world = images.size, images.labels, rank, world
        own = range(rank, len(images), world)
        shape = (len(own), self.size, self.size, 3)
        try:
            self.store = torch.empty(shape, dtype=torch.uint8, device=device)
        except RuntimeError:  # torch.OutOfMemoryError on a GPU
            size = np.prod(shape, dtype=object) / 1e9
            raise InputError(f"--cache: {device} has no {size:.1f} GB free, which the training set takes") from None
        for first in range(0, len(own), 256):
            part = own[first : first + 256]
            images.prefetch(part)
            pictures = np.stack([images.pixels(index) for index in part])
            self.store[first : first + len(part)] = torch.from_numpy(pictures)

    def pixels(self, index: int) -> np.ndarray:
        return self.store[index // self.world].cpu().numpy()

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 (n, size, size, 3) on the device."""
        rows = torch.tensor(indices) // self.world
        return self.store[rows.to(self.store.device, non_blocking=True)]
