"""The data sets, and what is said where one is missing or does not fit."""

from __future__ import annotations

import builtins
import shutil
from pathlib import Path

import numpy as np
import pytest

from alexnet_fast.data import open_data
from alexnet_fast.data.sources import FASHION_FILES, synthetic_data
from alexnet_fast.errors import InputError
from tests.data.pictures import write_fashion, write_folder, write_idx


def test_digits_hold_out_a_fifth_of_each_class():
    pytest.importorskip("sklearn", reason="the extra demo is not installed")
    data, again = open_data("digits"), open_data("digits")
    assert (len(data.train), len(data.val)) == (1438, 359)
    held_out, trained = (np.bincount(split.labels, minlength=10) for split in (data.val, data.train))
    assert (np.abs(held_out * 4 - trained) <= 4).all()
    assert (data.val.images == again.val.images).all()
    together = np.concatenate([data.train.images, data.val.images])
    assert together.shape == (1797, 8, 8)
    assert together.max() == 255
    image, label = data.val.read(7)
    assert image.size == (8, 8)
    assert label == data.val.labels[7]


def test_digits_without_scikit_learn_name_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(InputError, match="pip install scikit-learn"):
        open_data("digits")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_is_read_gzipped_or_not(tmp_path: Path, suffix: str):
    data = open_data(f"fashion-mnist:{write_fashion(tmp_path, suffix=suffix)}")
    assert (len(data.train), len(data.val), len(data.classes)) == (20, 10, 10)
    blocks = data.train.images[:, :, :25].reshape(20, 2, 14, 5, 5).mean((2, 4)).reshape(20, 10)
    assert (blocks.argmax(1) == np.arange(20) % 10).all()  # as written, each picture in its place
    image, label = data.train.read(13)
    assert (np.asarray(image) == data.train.images[13]).all()
    assert label == 3


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


FASHION_FAULTS = {
    "missing file": (lambda folder: (folder / FASHION_FILES[1][0]).unlink(), "no such file"),
    "truncated": (lambda folder: _cut(folder / FASHION_FILES[0][0], 500), "truncated"),
    "truncated header": (lambda folder: _cut(folder / FASHION_FILES[0][0], 6), "."),
    "another format": (lambda folder: (folder / FASHION_FILES[0][1]).write_bytes(b"\x89PNG...."), "not an IDX file"),
    "a header that asks for too much": (
        lambda folder: (folder / FASHION_FILES[0][0]).write_bytes(bytes((0, 0, 8, 3)) + b"\xff" * 12),
        "limit",
    ),
    "labels of another length": (
        lambda folder: write_idx(folder / FASHION_FILES[0][1], np.zeros(19, np.uint8)),
        "20 images",
    ),
    "a label that is no class": (
        lambda folder: write_idx(folder / FASHION_FILES[0][1], np.full(20, 10, np.uint8)),
        "labels from 0 to 9",
    ),
}


@pytest.mark.parametrize("fault", FASHION_FAULTS)
def test_fashion_mnist_faults_are_named(tmp_path: Path, fault: str):
    spoil, said = FASHION_FAULTS[fault]
    spoil(write_fashion(tmp_path))
    with pytest.raises(InputError, match=said) as caught:
        open_data(f"fashion-mnist:{tmp_path}")
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip_file_is_named(tmp_path: Path):
    write_fashion(tmp_path, suffix=".gz")
    _cut(tmp_path / (FASHION_FILES[0][0] + ".gz"), 900)
    with pytest.raises(InputError, match=FASHION_FILES[0][0]):
        open_data(f"fashion-mnist:{tmp_path}")


def test_a_folder_gives_sorted_classes_and_all_its_files(tmp_path: Path):
    write_folder(tmp_path, train=3, val=2, classes=("zebra", "ant"))
    (tmp_path / "train" / "ant" / ".hidden").touch()
    deeper = tmp_path / "train" / "ant" / "more"
    deeper.mkdir()
    shutil.copy(tmp_path / "train" / "ant" / "000.jpg", deeper / "x.jpg")
    data = open_data(str(tmp_path))
    assert data.classes == ["ant", "zebra"]
    assert data.train.labels == [0] * 4 + [1] * 3
    assert data.val.labels == [0, 0, 1, 1]
    assert data.train.read(0)[0].size == (80, 70)


FOLDER_FAULTS = {
    "missing": (lambda root: shutil.rmtree(root), "no such folder"),
    "empty": (lambda root: [shutil.rmtree(root / part) for part in ("train", "val")], "no folder train/"),
    "no val": (lambda root: shutil.rmtree(root / "val"), "no folder val/"),
    "no classes": (lambda root: [shutil.rmtree(root / "train" / name) for name in ("cat", "dog")], "no class folders"),
    "class missing in val": (lambda root: shutil.rmtree(root / "val" / "dog"), "val: class dog of train/ is missing"),
    "class missing in train": (
        lambda root: shutil.rmtree(root / "train" / "cat"),
        "train: class cat of val/ is missing",
    ),
    "empty class": (lambda root: [path.unlink() for path in (root / "val" / "cat").iterdir()], "holds no images"),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_folder_faults_are_named(tmp_path: Path, fault: str):
    spoil, said = FOLDER_FAULTS[fault]
    spoil(write_folder(tmp_path / "set", train=1, val=1))
    with pytest.raises(InputError, match=said) as caught:
        open_data(str(tmp_path / "set"))
    assert str(tmp_path / "set") in str(caught.value)


def test_synthetic_images_have_the_asked_size_and_classes():
    data = synthetic_data(12, 64)
    image, label = data.train.read(25)
    assert image.size == (73, 73)  # 8/7 of the side: crops of 64 are cut from it
    assert label == 1
    assert len(data.classes) == 12


def test_litter_is_left_out_and_links_that_lead_back_are_named(tmp_path: Path):
    write_folder(tmp_path, train=2, val=1)
    cat = tmp_path / "train" / "cat"
    (cat / "Thumbs.db").touch()
    (cat / "000.json").touch()
    (cat / ".ipynb_checkpoints").mkdir()
    shutil.copy(cat / "000.jpg", cat / ".ipynb_checkpoints" / "0.jpg")
    (tmp_path / "val" / "__MACOSX").mkdir()
    (cat / "up").symlink_to("..")
    data = open_data(str(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (4, 2)
    said = "\n".join(data.train.left_out)
    assert f"the link {cat / 'up'}: it leads back" in said
    assert "left out 2 files" in said
