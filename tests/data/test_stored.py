"""Training from shards: which pictures come, in which order, cut how, and held where."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_fast.data import NOT_COUNTED, Transform, evaluation_batches, open_data, training_batches
from alexnet_fast.data.feed import resized_crops
from alexnet_fast.data.prepare import prepare
from alexnet_fast.data.random import Draws
from alexnet_fast.data.shards import ShardImages
from alexnet_fast.data.stored import CachedImages, StoredImages
from alexnet_fast.errors import InputError
from tests.data.pictures import picture, write_folder

CPU = torch.device("cpu")


class Numbered(StoredImages):
    """Pictures whose every byte is their number."""

    def __init__(self, count: int, size: int = 8):
        self.size, self.labels = size, np.arange(count)

    def pixels(self, index: int) -> np.ndarray:
        return np.full((self.size, self.size, 3), index, np.uint8)


class Endless(StoredImages):
    """A set of 3.5 exabytes."""

    def __init__(self):
        self.size, self.labels = 1 << 20, range(1 << 20)

    def pixels(self, index: int) -> np.ndarray:
        raise AssertionError("nothing is read before there is room")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardImages:
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_folder(folder / "source", train=8, val=3), folder / "out", size=32, shard_size=5, workers=1)
    return open_data(str(folder / "out")).train


def trained(split, *, epoch=0, first=0, batch=8, rank=0, world=1, workers=0, seed=5):
    options = {"seed": seed, "epoch": epoch, "first": first, "batch_size": batch}
    return list(training_batches(split, Transform("crop", 7), **options, rank=rank, world=world, workers=workers))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_are_whole_pictures_by_number(workers: int, shards: ShardImages):
    seen = []
    for batch in trained(shards, workers=workers, batch=3):
        assert batch.whole
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for image, label, index in zip(batch.images, batch.labels, batch.index.tolist(), strict=True):
            assert (image.permute(1, 2, 0).numpy() == shards.pixels(index)).all()
            assert label == shards.labels[index]
            seen.append(index)
    assert sorted(seen) == list(range(16))


def test_order_is_that_of_pictures_from_files(shards: ShardImages):
    options = {"seed": 5, "epoch": 3, "first": 1, "batch_size": 5, "rank": 1, "world": 2, "workers": 0}
    stored = training_batches(shards, Transform("crop", 28), **options)
    files = training_batches(shards, Transform("shift", 28), **options)
    for a, b in zip(stored, files, strict=True):
        assert a.index.tolist() == b.index.tolist()
        assert not b.whole


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [6, 7, 24, 25])
def test_ranks_that_hold_their_part_show_each_picture_once(count: int, world: int):
    ranks = [
        trained(CachedImages(Numbered(count), CPU, rank, world), batch=6, rank=rank, world=world)
        for rank in range(world)
    ]
    assert {len(batches) for batches in ranks} == {-(-count // 6)}
    seen = []
    for parts in zip(*ranks, strict=True):
        for rank, part in enumerate(parts):
            assert (part.index % world == rank).all()
            assert (part.images[:, 0, 0, 0] == part.index).all()
        labels = [label for part in parts for label in part.labels.tolist() if label != NOT_COUNTED]
        assert all(part.counted == len(labels) for part in parts)
        seen += labels
    assert sorted(seen) == list(range(count))


def test_one_process_sees_the_same_cached_or_not():
    for a, b in zip(trained(Numbered(25)), trained(CachedImages(Numbered(25), CPU, 0, 1)), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.index, b.index)


def test_a_set_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"--cache: cpu has no \d+\.\d GB free"):
        CachedImages(Endless(), CPU, 0, 1)


def test_an_evaluation_reads_each_picture_once(shards: ShardImages):
    seen = []
    for rank in range(3):
        for batch in evaluation_batches(shards, Transform("crop", 28), batch_size=4, rank=rank, world=3, workers=2):
            seen += batch.index.tolist()
    assert sorted(seen) == list(range(16))


def test_a_closed_feed_leaves_no_thread(shards: ShardImages):
    before = threading.active_count()
    batches = training_batches(
        shards, Transform("crop", 28), seed=0, epoch=0, first=0, batch_size=2, rank=0, world=1, workers=2
    )
    next(batches)
    batches.close()
    assert threading.active_count() == before


def test_resized_crops_are_pillows():
    """Pillow rounds weights and the result of each of its two passes: up to two levels."""
    pictures = [np.asarray(picture(40, 40, seed)) for seed in range(6)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    found = resized_crops(images, torch.arange(10, 16), 28, seed=3, epoch=2).permute(0, 2, 3, 1).numpy()
    for number, pixels in enumerate(pictures):
        expected = Transform("resized-crop", 28)(Image.fromarray(pixels), Draws(3, 2, 10 + number))
        assert np.abs(found[number].astype(int) - expected).max() <= 2
