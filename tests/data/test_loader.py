"""Which images each rank sees, in which order, and what stands in for those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_fast.data import NOT_COUNTED, Transform, evaluation_batches, open_data, training_batches
from alexnet_fast.data.loader import steps_per_epoch
from alexnet_fast.data.sources import ArrayImages
from tests.data.pictures import write_folder

TRANSFORM = Transform("shift", 16)


def numbered(count: int) -> ArrayImages:
    """Pictures whose label is their number."""
    pixels = np.random.default_rng(0).integers(1, 256, (count, 8, 8), np.uint8)
    return ArrayImages(pixels, np.arange(count))


def trained(split, *, epoch=0, first=0, batch=8, rank=0, world=1, workers=0, seed=5, transform=TRANSFORM):
    options = {"seed": seed, "epoch": epoch, "first": first, "batch_size": batch}
    return list(training_batches(split, transform, **options, rank=rank, world=world, workers=workers))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 23])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_shows_each_image_once_over_all_ranks(count: int, world: int):
    ranks = [trained(numbered(count), rank=rank, world=world) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {steps_per_epoch(count, 8)}
    seen = []
    for parts in zip(*ranks, strict=True):
        labels = [label for part in parts for label in part.labels.tolist() if label != NOT_COUNTED]
        assert all(part.counted == len(labels) for part in parts)
        assert all(len(part.labels) > 0 for part in parts)
        seen += labels
    assert sorted(seen) == list(range(count))


def test_ranks_see_the_pictures_that_one_process_sees():
    alone = trained(numbered(23))
    for step, parts in enumerate(zip(*(trained(numbered(23), rank=rank, world=2) for rank in range(2)), strict=True)):
        for rank, part in enumerate(parts):
            assert torch.equal(part.images, alone[step].images[rank::2])
            assert torch.equal(part.labels, alone[step].labels[rank::2])


def test_an_epoch_can_begin_at_any_batch():
    whole = trained(numbered(23), epoch=3)
    for first in range(4):
        rest = trained(numbered(23), epoch=3, first=first)
        assert len(rest) == len(whole) - first
        for a, b in zip(rest, whole[first:], strict=True):
            assert torch.equal(a.images, b.images)


def test_epochs_and_seeds_differ_in_order_and_in_augmentation():
    def picture_of(image: int, **options):
        for batch in trained(numbered(23), **options):
            if image in batch.labels.tolist():
                return batch.images[batch.labels.tolist().index(image)]
        return None

    orders = {tuple(trained(numbered(23), **o)[0].labels.tolist()) for o in ({}, {"epoch": 1}, {"seed": 6})}
    assert len(orders) == 3
    pictures = [picture_of(4, epoch=epoch) for epoch in range(6)]
    assert any(not torch.equal(pictures[0], other) for other in pictures[1:])


def test_worker_processes_change_nothing():
    for a, b in zip(trained(numbered(23)), trained(numbered(23), workers=2), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_batches_are_channels_last():
    assert trained(numbered(8))[0].images.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def spoiled(tmp_path: Path) -> tuple[Path, list[str]]:
    """Twelve pictures of which two cannot be used."""
    root = write_folder(tmp_path, train=6, val=6)
    bad = [root / "train" / "cat" / "002.jpg", root / "train" / "dog" / "004.jpg"]
    bad[0].write_bytes(bad[0].read_bytes()[:200])
    bad[1].write_text("no picture")
    return root, [str(path) for path in bad]


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_files_are_replaced_by_others_and_named(spoiled: tuple[Path, list[str]], workers: int):
    root, bad = spoiled
    split = open_data(str(root)).train
    batches = trained(split, workers=workers, transform=Transform("crop", 32))
    assert sorted(path for batch in batches for path, _ in batch.bad) == bad
    assert sum(batch.counted for batch in batches) == 12
    assert all((batch.labels >= 0).all() for batch in batches)
    assert all((batch.images.flatten(1).float().std(1) > 0).all() for batch in batches)


def test_the_replacement_is_the_same_on_any_ranks_and_after_a_resume(spoiled: tuple[Path, list[str]]):
    root, _ = spoiled
    split, transform = open_data(str(root)).train, Transform("crop", 32)
    whole = trained(split, batch=4, transform=transform)
    for first in (1, 2):
        for rank in range(2):
            part = trained(split, batch=4, first=first, rank=rank, world=2, transform=transform)
            assert torch.equal(part[0].images, whole[first].images[rank::2])
            assert torch.equal(part[0].labels, whole[first].labels[rank::2])


def test_a_set_with_no_good_file_gives_images_that_do_not_count(tmp_path: Path):
    root = write_folder(tmp_path, train=2, val=1)
    for path in (root / "train").glob("*/*"):
        path.write_text("no picture")
    batch = trained(open_data(str(root)).train, transform=Transform("crop", 32))[0]
    assert (batch.labels == NOT_COUNTED).all()
    assert len({path for path, _ in batch.bad}) == 4


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 11])
def test_an_evaluation_counts_each_image_once(count: int, world: int):
    seen = []
    for rank in range(world):
        options = {"batch_size": 4, "rank": rank, "world": world, "workers": 0}
        for batch in evaluation_batches(numbered(count), TRANSFORM, **options):
            seen += batch.labels.tolist()
    assert sorted(seen) == list(range(count))


def test_an_evaluation_leaves_bad_files_out(spoiled: tuple[Path, list[str]]):
    root, bad = spoiled
    split, transform = open_data(str(root)).train, Transform("crop", 32)
    batches = list(evaluation_batches(split, transform, batch_size=5, rank=0, world=1, workers=0))
    assert sum(batch.counted for batch in batches) == 10
    assert [path for batch in batches for path, _ in batch.bad] == bad
