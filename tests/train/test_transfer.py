"""Transfer learning: pretrained weights on a folder of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alexnet_fast import AlexNet
from alexnet_fast.errors import InputError
from alexnet_fast.train import checkpoint, commands
from alexnet_fast.train.commands import train
from tests.data.pictures import write_folder

HEAD = ("classifier.6.weight", "classifier.6.bias")


@pytest.fixture
def pretrained(tmp_path: Path):
    """A file of weights for 1000 classes, in the form of torchvision's file."""
    path = tmp_path / "pretrained.safetensors"
    save_file(AlexNet(variant="torchvision").state_dict(), path)
    yield path
    shutil.rmtree(tmp_path)  # three quarters of a gigabyte


def test_the_head_is_made_for_the_folder_and_learns_at_its_own_rate(pretrained: Path, tmp_path: Path):
    data = write_folder(tmp_path / "set", train=6, val=2, classes=("cat", "dog", "emu"))
    given = {"data": str(data), "out": str(tmp_path / "run"), "weights": str(pretrained), "freeze_features": True}
    options = {
        "lr": 0.0,
        "lr_head": 0.1,
        "batch_size": 9,
        "image_size": 64,
        "max_steps": 2,
        "workers": 0,
        "dropout": 0.0,
    }
    assert train({**given, **options}) == 0
    before = load_file(pretrained)
    after = checkpoint.load(checkpoint.find(tmp_path / "run", "last"))
    assert after.config.num_classes == 3
    assert after.model["classifier.6.weight"].shape == (3, 4096)
    assert [key for key in before if key not in HEAD and not torch.equal(before[key], after.model[key])] == []
    assert all(after.momentum[key].abs().sum() > 0 for key in HEAD)
    assert not any(key.startswith("features") for key in after.momentum)
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["val_loss"] > 0
    # A run's folder stands for its best checkpoint, and tells the net, and the size and normalization of its images.
    told = commands.following_weights({"weights": str(tmp_path / "run"), "std": (1.0, 1.0, 1.0)})
    own = after.config
    expected = {"variant": own.variant, "image_size": 64, "mean": own.mean, "std": (1.0, 1.0, 1.0)}
    assert told == {**expected, "weights": str(after.path)}


def test_weights_bring_their_variant(tmp_path: Path):
    with torch.device("meta"):
        keys = AlexNet(2, variant="paper").state_dict()
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "paper.safetensors", metadata={"variant": "paper"})
    data = write_folder(tmp_path / "set", train=2, val=1)
    given = {"data": str(data), "out": str(tmp_path / "run"), "weights": str(tmp_path / "paper.safetensors")}
    with pytest.raises(InputError, match=r"--weights: .*paper.safetensors does not fit the net: .*\(96, 3, 11, 11\)"):
        train(given)  # conv1 of paper, not of torchvision
    with pytest.raises(InputError, match=r"--variant: .* is for 'paper', got 'caffe'"):
        train({**given, "variant": "caffe"})


def test_missing_weights_are_named(tmp_path: Path):
    data = write_folder(tmp_path / "set", train=2, val=1)
    with pytest.raises(InputError, match=r"none.safetensors"):
        train({"data": str(data), "out": str(tmp_path / "run"), "weights": str(tmp_path / "none.safetensors")})
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no checkpoint there"):
        train({"data": str(data), "out": str(tmp_path / "run"), "weights": str(tmp_path / "empty")})
