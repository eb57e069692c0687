"""Batches of stored pictures on the device that trains, uncropped.

Threads copy the pictures out of the memory map: copying does not hold Python's lock, and a thread needs to be sent
nothing but indices. For a GPU they write to a ring of pinned buffers, which are copied to the card on a stream of their
own while the step before is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from alexnet_fast.data.augmentation import to_bytes
from alexnet_fast.data.random import Draws
from alexnet_fast.data.stored import CachedImages, StoredImages
from alexnet_fast.data.transforms import random_box

AHEAD = 2  # batches that are ready or being read while one trains, beside one for each thread


def stored_batches(
    images: StoredImages, shares: list[list[int]], device: torch.device, workers: int
) -> Iterator[Tensor]:
    """uint8 (n, 3, size, size) channels_last on ``device`` for each list of numbers. With ``workers`` 0 each is read
    when it is asked for."""
    if isinstance(images, CachedImages):
        batches = map(images.batch, shares)
    elif device.type == "cuda":
        batches = _pinned(images, shares, device, max(1, workers))
    else:
        batches = _read_ahead(images, shares, workers)
    for batch in batches:
        yield batch.permute(0, 3, 1, 2)


def _read(images: StoredImages, share: list[int], buffer: Tensor) -> Tensor:
    """``buffer``'s first rows, filled."""
    images.prefetch(share)
    filled = buffer[: len(share)]
    for row, index in zip(filled.numpy(), share, strict=True):
        np.copyto(row, images.pixels(index))
    return filled


def _empty(images: StoredImages, length: int, pinned: bool = False) -> Tensor:
    return torch.empty((length, images.size, images.size, 3), dtype=torch.uint8, pin_memory=pinned)


def _read_ahead(images: StoredImages, shares: list[list[int]], workers: int) -> Iterator[Tensor]:
    def read(share: list[int]) -> Tensor:
        return _read(images, share, _empty(images, len(share)))

    if workers == 0:
        yield from map(read, shares)
        return
    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for share in shares:
            waiting.append(pool.submit(read, share))
            if len(waiting) == workers + AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pinned(images: StoredImages, shares: list[list[int]], device: torch.device, workers: int) -> Iterator[Tensor]:
    longest = max(map(len, shares), default=0)
    ring = [_empty(images, longest, pinned=True) for _ in range(min(workers + AHEAD, len(shares)))]
    sent = [torch.cuda.Event() for _ in ring]  # recorded behind the copy of each buffer to the card
    stream = torch.cuda.Stream(device)

    def read(number: int) -> Tensor:
        slot = number % len(ring)
        if number >= len(ring):
            sent[slot].synchronize()
        return _read(images, shares[number], ring[slot])

    pool = ThreadPoolExecutor(workers)
    try:
        waiting = deque(pool.submit(read, number) for number in range(len(ring)))
        for number in range(len(shares)):
            filled = waiting.popleft().result()
            with torch.cuda.stream(stream):
                batch = filled.to(device, non_blocking=True)
                sent[number % len(ring)].record(stream)
            if number + len(ring) < len(shares):  # it reuses this buffer, whose event has just been recorded
                waiting.append(pool.submit(read, number + len(ring)))
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            batch.record_stream(current)  # allocated on the copy stream: not to be reused before the step has read it
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def resized_crops(images: Tensor, indices: Tensor, side: int, seed: int, epoch: int) -> Tensor:
    """:class:`alexnet_fast.data.Transform`'s ``resized-crop`` of stored pictures: uint8 (n, 3, side, side).

    Pillow's BILINEAR is a triangle filter, so resampling the rows and the columns of an image is two matrix products.
    """
    size = images.shape[-1]
    boxes, mirrored = [], []
    for index in indices.tolist():
        draws = Draws(seed, epoch, index)
        boxes.append(random_box(size, size, draws))
        mirrored.append(bool(draws.below(2)))
    left, top, width, height = torch.tensor(boxes, dtype=torch.float32, device=images.device).unbind(1)
    columns, rows = _triangles(left, width, size, side), _triangles(top, height, size, side)
    mirrored = torch.tensor(mirrored, device=images.device)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    pixels = rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)
    return to_bytes(pixels)


def _triangles(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """(n, side, size): the weight of each of ``size`` pixels in each of the ``side`` pixels that the stretch of
    ``length`` pixels from ``start`` is resampled to."""
    scale = (length / side)[:, None, None]
    target = torch.arange(side, device=start.device)[:, None] + 0.5
    source = torch.arange(size, device=start.device) + 0.5
    distance = (source - (start[:, None, None] + target * scale)).abs() / scale.clamp_min(1)
    weight = (1 - distance).clamp_min(0)
    return weight / weight.sum(2, keepdim=True)
