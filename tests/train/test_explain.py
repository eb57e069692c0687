"""The command explain: which pictures it draws, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from alexnet_fast import AlexNet
from alexnet_fast.data.prepare import prepare
from alexnet_fast.errors import InputError
from alexnet_fast.train import explain
from alexnet_fast.train.config import resolve
from alexnet_fast.train.inference import Found
from tests.data.pictures import write_folder

CLASSES = ["cat", "dog", "emu"]


@pytest.fixture
def call(monkeypatch, tmp_path):
    """call(images, …): the command with a small net."""
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    net = AlexNet(3).eval()
    net.classifier = nn.Sequential(nn.Linear(9216, 3))
    given = {"data": ".", "out": "", "image_size": 64, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = Found("net", resolve(given, 3), CLASSES, 7, lambda net: {})
    monkeypatch.setattr(explain, "find", lambda name: found)
    monkeypatch.setattr(explain, "model_of", lambda one, device: net)

    def run(*paths: Path, name=None, layer="relu5", strongest=None, filters=False, out=tmp_path / "x.png", over=False):
        return explain.explain(list(paths), "net", name, layer, strongest, filters, out, over, "auto")

    run.net = net
    return run


@pytest.fixture
def picture(tmp_path) -> Path:
    Image.effect_noise((90, 70), 80).convert("RGB").save(tmp_path / "a $noise.png")
    return tmp_path / "a $noise.png"


def test_pictures(call, picture, tmp_path, capsys, monkeypatch):
    seen = {}
    draw = explain.draw_explained
    monkeypatch.setattr(explain, "draw_explained", lambda rows, *rest: [seen.update(rows=rows), draw(rows, *rest)])
    assert call(picture, picture, name="emu", layer="conv4") == 0
    assert capsys.readouterr().out.count(f"{picture}: emu ") == 2
    row, _ = seen["rows"]
    assert row.pixels.shape == (64, 64, 3)
    assert [*row.grad_cam.shape, *row.occlusion.shape, *row.guided.shape] == [3, 3, 64, 64, 3, 64, 64]
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size == (1400, 720)
    assert call(filters=True, over=True) == 0
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size != (1400, 720)


def test_strongest(call, picture, tmp_path, capsys, monkeypatch):
    """Of files and of a prepared folder, over several batches."""
    prepare(write_folder(tmp_path / "set", 13, 5), tmp_path / "shards", size=64, workers=1)
    seen = {}
    draw = explain.draw_strongest
    monkeypatch.setattr(explain, "draw_strongest", lambda rows, *rest: [seen.update(rows), draw(rows, *rest)])
    assert call(picture, tmp_path / "shards", strongest="relu1") == 0
    assert "of 37 images what relu1 answers to most, 8 of 64 channels" in capsys.readouterr().out
    assert len(seen) == 8
    whole = 0
    for name, patches in seen.items():
        values = [value for value, _ in patches]
        assert len(values) == 9
        assert values == sorted(values, reverse=True)
        for value, pixels in patches:
            if pixels.shape == (11, 11, 3):  # conv1's window, where it is whole
                image = (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5
                conv1 = call.net.features[0]
                answer = F.conv2d(image, conv1.weight, conv1.bias)[0, int(name.removeprefix("channel "))].item()
                assert answer == pytest.approx(value, rel=1e-3)
                whole += 1
    assert whole > 5


def test_bad_input(call, picture, tmp_path, monkeypatch):
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    for said, options in (
        ("--class: net knows no class 'dgo'; did you mean dog", {"name": "dgo"}),
        ("--class: net knows no class '17'; it knows cat, dog, emu", {"name": "17"}),
        ("^--layer: there is no layer 'relu9'; did you mean relu", {"layer": "relu9"}),
        ("^--layer: expected one that gives maps", {"layer": "classifier"}),
        ("^--strongest: there is no layer 'conv9'; did you mean conv", {"strongest": "conv9"}),
        ("--filters: goes with no pictures", {"filters": True}),
        (r"--out: expected a file that ends in \.png", {"out": tmp_path / "x.jpg"}),
    ):
        with pytest.raises(InputError, match=said):
            call(picture, **options)
    with pytest.raises(InputError, match="IMAGES: expected one picture at least"):
        call()
    with pytest.raises(InputError, match="1 of 1 images could not be read"):
        call(bad)
    with pytest.raises(InputError, match="IMAGES: 33 pictures; at most 32"):
        call(*[picture] * 33)
    assert not (tmp_path / "x.png").exists()
    with pytest.raises(InputError, match=r"1 of 2 images could not be read: .*bad\.png"):
        call(bad, picture, strongest="conv1")
    with pytest.raises(InputError, match=r"x\.png is there already"):
        call(picture)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="explain: needs matplotlib: pip install matplotlib"):
        call(picture, over=True)
