"""The command features: what it writes, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_fast import backends
from alexnet_fast.data.prepare import prepare
from alexnet_fast.errors import InputError
from alexnet_fast.models.features import features
from alexnet_fast.train import checkpoint
from alexnet_fast.train.config import resolve
from alexnet_fast.train.extract import extract
from alexnet_fast.train.inference import find, model_of
from alexnet_fast.train.model import build_model
from tests.data.pictures import write_folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a checkpoint of a net as it starts."""
    folder = tmp_path_factory.mktemp("run")
    config = resolve({"data": "digits", "out": str(folder)}, 10)
    state = build_model(config).state_dict()
    named = {"config": config, "classes": list("0123456789"), "state": checkpoint.START}
    checkpoint.save(folder, 0, state, {}, **named)
    return folder


def picture(path: Path, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (40, 30), colour).save(path)
    return path


def call(run: Path, paths: list[Path], out: Path, layers: tuple[str, ...] = ("fc7",), overwrite: bool = False) -> int:
    return extract(paths, str(run), list(layers), out, 2, overwrite, backends.current())


def test_what_is_written(run, tmp_path, capsys):
    """A row for each picture that can be read, in their order, of the net's own outputs."""
    paths = [picture(tmp_path / f"{n}.png", (80 * n, 10, 99)) for n in range(3)]
    out = tmp_path / "seen.npz"
    assert call(run, paths, out, ("fc7", "conv1")) == 0
    assert "3 images, fc7, conv1" in capsys.readouterr().out
    with np.load(out) as file:
        assert file["paths"].tolist() == list(map(str, paths))
        assert file["fc7"].shape == (3, 4096)
        assert file["conv1"].shape[:2] == (3, 64)
        whole = file["fc7"]
    assert np.ptp(whole, 0).max() > 0
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".npz"] == ["seen.npz"]
    found = find(str(run))
    net = features(model_of(found, torch.device("cpu")), "fc8")
    assert net(torch.zeros(1, 3, 64, 64))["fc8"].shape == (1, 10)

    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    with pytest.raises(InputError, match=r"1 of 2 images could not be read: .*bad\.png"):
        call(run, [bad, paths[1]], out, overwrite=True)
    with np.load(out) as file:
        assert file["paths"].tolist() == [str(paths[1])]
        np.testing.assert_allclose(file["fc7"][0], whole[1], rtol=1e-3, atol=1e-5)


def test_prepared_folders(run, tmp_path, capsys):
    """All that they hold, with paths and classes, as the same pictures in files give it."""
    prepare(write_folder(tmp_path / "set", 2, 1, classes=("cat", "dog")), tmp_path / "shards", size=64, workers=1)
    single = picture(tmp_path / "single.png", (9, 80, 200))
    assert call(run, [tmp_path / "shards", single], tmp_path / "seen.npz", ("conv1",)) == 0
    assert capsys.readouterr().out.startswith("7 images")
    with np.load(tmp_path / "seen.npz") as file:
        assert file["classes"].tolist() == ["cat", "cat", "dog", "dog", "cat", "dog", ""]
        paths, conv1 = file["paths"].tolist(), file["conv1"]
    assert paths[4] == str(tmp_path / "shards" / "val" / "cat" / "000.jpg")
    for place, path in ((3, tmp_path / "set" / "train" / "dog" / "001.jpg"), (6, single)):
        assert call(run, [path], tmp_path / "one.npz", ("conv1",), overwrite=True) == 0
        with np.load(tmp_path / "one.npz") as file:
            assert "classes" not in file
            # Files go from their own size to 64 pixels in one step, prepared ones by a stored 64.
            assert np.corrcoef(file["conv1"].ravel(), conv1[place].ravel())[0, 1] > 0.9


def test_bad_input(run, tmp_path):
    """Nothing is written, and what is there stays."""
    good, out = picture(tmp_path / "good.png", (1, 2, 3)), tmp_path / "seen.npz"
    with pytest.raises(InputError, match=r"--layer: there is no layer 'fc9'; did you mean fc\d"):
        call(run, [good], out, ("fc9",))
    with pytest.raises(InputError, match=r"--out: expected a file that ends in \.npz, got .*seen\.txt"):
        call(run, [good], tmp_path / "seen.txt")
    prepare(write_folder(tmp_path / "set", 1, 1), tmp_path / "shards", size=64, workers=1)
    (tmp_path / "shards" / "train" / "00000.json").write_text("{")
    with pytest.raises(InputError, match=r"00000\.json: damaged shard|00000\.u8: damaged shard"):
        call(run, [tmp_path / "shards"], out)
    with pytest.raises(InputError, match="--out: there is no folder"):
        call(run, [good], tmp_path / "missing" / "seen.npz")
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(InputError, match=r"--out: .*seen\.npz is there already \(--overwrite replaces it\)"):
        call(run, [good], out)
    assert out.read_text() == "precious"
