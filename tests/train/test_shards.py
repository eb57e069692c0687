"""Runs on what the command prepare wrote."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from alexnet_fast.data.prepare import prepare
from alexnet_fast.errors import InputError
from tests.data.pictures import write_folder
from tests.train import runs

GIVEN = {"image_size": 64, "batch_size": 8, "epochs": 3, "recipe": "paper", "variant": "torchvision", "workers": 2}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    prepare(write_folder(folder / "source", train=18, val=4), folder / "out", size=73, shard_size=10, workers=1)
    return str(folder / "out")


@pytest.mark.parametrize("transform", ["crop", "resized-crop"])
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(shards: str, tmp_path: Path, transform: str):
    given = {**GIVEN, "data": shards, "transform": transform, "checkpoint_steps": 2}
    killed = runs.start(tmp_path / "killed", **given)
    runs.wait_for_step(tmp_path / "killed", 7, killed)  # of 15: in the middle of the second epoch
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert runs.train(tmp_path / "killed", resume=tmp_path / "killed") == 0
    assert runs.train(tmp_path / "whole", **given) == 0
    runs.assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    assert runs.rows(tmp_path / "killed") == runs.rows(tmp_path / "whole")


def test_a_run_is_the_same_cached_read_by_threads_or_in_between(shards: str, tmp_path: Path):
    for name, given in {"threads": {}, "alone": {"workers": 0}, "cached": {"cache": "device"}}.items():
        assert runs.train(tmp_path / name, **{**GIVEN, "data": shards, **given, "max_steps": 6}) == 0
        runs.assert_same_bits(tmp_path / name, tmp_path / "threads")


def test_two_ranks_that_hold_half_the_pictures_each_see_all(shards: str, tmp_path: Path):
    given = {**GIVEN, "data": shards, "nproc": 2, "cache": "device", "epochs": 1}
    assert runs.train(tmp_path / "run", **given) == 0
    assert runs.rows(tmp_path / "run")[-1]["count"] == 8


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"image_size": 80}, r"--image-size: .* was prepared at 73 pixels, too small to cut 80 from .*--size 91"),
        ({"image_size": 54, "variant": "owt"}, "prepared at 73 pixels, too large to cut 54 from"),
        ({"cache": "device", "nproc": 3}, "--batch-size: 3 ranks that keep their part of DATA need a multiple of it"),
        ({"cache": "device", "transform": "shift", "ten_crop": False}, "--cache: only DATA that the command prepare"),
    ],
)
def test_what_does_not_fit_the_shards_is_refused(shards: str, tmp_path: Path, given: dict, said: str):
    with pytest.raises(InputError, match=said):
        runs.train(tmp_path / "run", **{**GIVEN, "data": shards, **given})
