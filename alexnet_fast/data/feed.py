"""Batches of stored pictures on the device that trains, uncropped.

Threads copy pictures from the memory map, for the copying leaves Python's lock free: indices are all that they are
sent. For a GPU they write to a ring of pinned buffers, whose copies to the card run on a stream of their own, under
the step before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.data.random import Draws
from alexnet_fast.data.stored import CachedImages, StoredImages
from alexnet_fast.data.transforms import random_box

AHEAD = 2  # batches that are read while one trains, besides one for each thread


def stored_batches(
    images: StoredImages, shares: list[list[int]], device: torch.device, workers: int
) -> Iterator[Tensor]:
    """uint8 (n, 3, size, size) channels_last on ``device`` for each list of numbers; ``workers`` 0 reads in between."""
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
    sent = [torch.cuda.Event() for _ in ring]  # recorded once the card has what the buffer held
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
            if number + len(ring) < len(shares):  # its buffer is this one, whose event has just been recorded
                waiting.append(pool.submit(read, number + len(ring)))
            current = torch.cuda.current_stream(device)
            current.wait_stream(stream)
            batch.record_stream(current)  # allocated on the copy stream: not to be reused before the step has read it
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


def resized_crops(images: Tensor, indices: Tensor, side: int, seed: int, epoch: int) -> Tensor:
    """:class:`alexnet_fast.data.Transform`'s ``resized-crop`` of stored pictures: uint8 (n, 3, side, side).

    Resampling rows and columns with the triangle filter that Pillow's BILINEAR is makes two matrix products an image.
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
    return _bytes(pixels)


def _triangles(start: Tensor, length: Tensor, size: int, side: int) -> Tensor:
    """(n, side, size): what each of ``size`` pixels gives to each of ``side`` over ``length`` from ``start``."""
    scale = (length / side)[:, None, None]
    target = torch.arange(side, device=start.device)[:, None] + 0.5
    source = torch.arange(size, device=start.device) + 0.5
    distance = (source - (start[:, None, None] + target * scale)).abs() / scale.clamp_min(1)
    weight = (1 - distance).clamp_min(0)
    return weight / weight.sum(2, keepdim=True)


ROTATION_KEY, JITTER_KEY = 0x726F74, 0x6A6974  # keep these draws apart from those of crops
GREY = (0.299, 0.587, 0.114)  # what red, green and blue give to brightness, as Pillow converts


def rotated(images: Tensor, indices: Tensor, degrees: float, seed: int, epoch: int) -> Tensor:
    """uint8 images (n, 3, h, w), each turned about its centre by up to ``degrees`` either way, with black corners, as
    torchvision's RandomRotation with bilinear interpolation.
    """
    drawn = [(2 * Draws(seed, epoch, index, ROTATION_KEY).unit() - 1) * degrees for index in indices.tolist()]
    angles = torch.tensor(drawn, dtype=torch.float32, device=images.device).deg2rad()
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    aspect = images.shape[2] / images.shape[3]  # of coordinates that reach from -1 to 1 on both sides
    rows = [torch.stack([cos, -sin * aspect, none], 1), torch.stack([sin / aspect, cos, none], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _bytes(turned)


def jittered(images: Tensor, indices: Tensor, share: float, seed: int, epoch: int) -> Tensor:
    """uint8 images (n, 3, h, w), each with its brightness, contrast and saturation multiplied by three draws from
    1 - ``share`` to 1 + ``share``, in this order, as torchvision's ColorJitter.
    """
    factors = []
    for index in indices.tolist():
        draws = Draws(seed, epoch, index, JITTER_KEY)
        factors.append([1 + (2 * draws.unit() - 1) * share for _ in range(3)])
    factors = torch.tensor(factors, dtype=torch.float32, device=images.device)
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    weights = torch.tensor(GREY, device=images.device).view(3, 1, 1)
    pixels = (images.float() * brightness).clamp(0, 255)
    mean = (pixels * weights).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    pixels = (mean + (pixels - mean) * contrast).clamp(0, 255)
    grey = (pixels * weights).sum(1, keepdim=True)
    return _bytes(grey + (pixels - grey) * saturation)


def _bytes(pixels: Tensor) -> Tensor:
    return pixels.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)
