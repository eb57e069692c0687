"""Where labelled images come from.

``digits``             scikit-learn's 1,797 handwritten digits, 8x8; 1,438 to train on, always the same 359 held out
``fashion-mnist:DIR``  the four IDX files of Fashion-MNIST, gzipped or not
``DIR``                ImageFolder: DIR/train/CLASS/* and DIR/val/CLASS/*, classes in sorted order; or what the command
                       prepare made of one
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from alexnet_fast.data.images import read_image
from alexnet_fast.data.random import Draws
from alexnet_fast.data.shards import PARTS, ShardImages, is_prepared, read_index
from alexnet_fast.data.stored import SyntheticImages
from alexnet_fast.data.transforms import shorter_side
from alexnet_fast.errors import InputError

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".bmp",
        ".gif",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".pfm",
    ]
)
LITTER = frozenset(("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information"))  # beside hidden folders
IDX_LIMIT = 1 << 31  # bytes; Fashion-MNIST's largest file holds 47 million


class Split(Protocol):
    """Images by number."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """The picture and its label; raises :class:`alexnet_fast.data.BadImage`."""


@dataclass(frozen=True)
class ArrayImages:
    """Pictures in memory: uint8 (n, height, width[, 3]), and their labels (n,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class FolderImages:
    """Pictures in files."""

    paths: list[Path]
    labels: list[int]
    left_out: tuple[str, ...] = ()  # a line for each kind of thing there that is no picture
    exif: bool = True  # whether they are turned upright

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.paths[index], self.exif), self.labels[index]


@dataclass(frozen=True)
class Statistics:
    """The mean of a training set's RGB values in 0..1, and their principal components, in columns, each as long as the
    standard deviation along it.
    """

    mean: tuple[float, float, float]
    colour: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Data:
    """A training set and a held-out set over the same ``classes``; ``statistics`` if the command prepare made them."""

    classes: list[str]
    train: Split
    val: Split
    statistics: Statistics | None = None


def kind_of(data: str) -> str:
    """``digits``, ``fashion-mnist`` or ``folder``."""
    return "digits" if data == "digits" else "fashion-mnist" if data.startswith("fashion-mnist:") else "folder"


def open_data(data: str, exif: bool = True, held_out_alone: bool = False) -> Data:
    """The two sets behind a DATA argument; raises :class:`InputError` where they are missing or do not fit together.

    ``held_out_alone``: of a folder the images to train on need not be there; see :func:`image_folder`.
    """
    kind = kind_of(data)
    if kind == "digits":
        return _digits()
    if kind == "fashion-mnist":
        return _fashion_mnist(Path(data.removeprefix("fashion-mnist:")))
    return _prepared(Path(data)) if is_prepared(Path(data)) else image_folder(Path(data), exif, held_out_alone)


def synthetic_data(num_classes: int, side: int) -> Data:
    """12,800 noise pictures to train on, 1,280 held out."""
    names = [f"class {number}" for number in range(num_classes)]
    return Data(names, *(SyntheticImages(length, num_classes, shorter_side(side)) for length in (12_800, 1_280)))


def _digits() -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("digits: needs scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    held_out = np.zeros(len(images), bool)
    for digit in range(10):  # a fifth of each digit, drawn by a key of its own so that --seed does not move it
        members = np.flatnonzero(digits.target == digit).tolist()
        draws = Draws(digit)
        for _ in range(round(len(members) / 5)):
            held_out[members.pop(draws.below(len(members)))] = True
    train, val = (ArrayImages(images[rows], digits.target[rows]) for rows in (~held_out, held_out))
    return Data([str(digit) for digit in range(10)], train, val)


def _fashion_mnist(folder: Path) -> Data:
    splits = []
    for image_file, label_file in FASHION_FILES:
        images, labels = _read_idx(folder, image_file, 3), _read_idx(folder, label_file, 1)
        if len(images) != len(labels):
            raise InputError(f"{folder}: {image_file} holds {len(images)} images, {label_file} {len(labels)} labels")
        if len(labels) == 0 or labels.max() > 9:
            raise InputError(f"{folder / label_file}: expected labels from 0 to 9")
        splits.append(ArrayImages(images, labels))
    return Data(list(FASHION), *splits)


def _read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: 0, 0, 8 (unsigned byte), the number of dimensions; their lengths, big-endian; the bytes."""
    path = next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
    if path is None:
        raise InputError(f"{folder / name}: no such file, gzipped or not")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if file.read(4) != bytes((0, 0, 8, dimensions)):
                raise InputError(f"{path}: not an IDX file of bytes in {dimensions} dimensions")
            shape = tuple(np.frombuffer(file.read(4 * dimensions), ">u4").tolist())
            size = np.prod(shape, dtype=object)
            if len(shape) != dimensions or size > IDX_LIMIT:
                raise InputError(f"{path}: header asks for {size} bytes; the limit is {IDX_LIMIT}")
            content = file.read(size)
    except (OSError, EOFError, gzip.zlib.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {' '.join(str(error).split())}") from None
    if len(content) != size:
        raise InputError(f"{path}: truncated: {len(content)} bytes of {size}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _prepared(folder: Path) -> Data:
    index = read_index(folder)
    colour = np.array(index["components"]) * index["deviations"]
    statistics = Statistics(tuple(index["mean"]), tuple(map(tuple, colour.tolist())))
    return Data(index["classes"], *(ShardImages(folder, index, part) for part in PARTS), statistics)


def image_folder(folder: Path, exif: bool = True, held_out_alone: bool = False) -> Data:
    """An ImageFolder's pictures; raises :class:`InputError` where there is none.

    ``held_out_alone``: without a folder train/ the training set is empty; without val/ too, ``folder`` itself holds the
    classes.
    """
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {reason} (DATA is digits, fashion-mnist:DIR, or a folder with train/ and val/)")
    if held_out_alone and not (folder / "train").is_dir():
        held_out = folder / "val" if (folder / "val").is_dir() else folder
        names = sorted(_classes(held_out))
        return Data(names, FolderImages([], []), _files(held_out, names, exif))
    classes = {}
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise InputError(f"{folder}: has no folder {part}/ (wanted: train/CLASS/*.jpg and val/CLASS/*.jpg)")
        classes[part] = _classes(folder / part)
    for part, other in (("val", "train"), ("train", "val")):
        if missing := sorted(classes[other] - classes[part]):
            raise InputError(f"{folder / part}: class {', '.join(missing)} of {other}/ is missing")
    names = sorted(classes["train"])
    return Data(names, *(_files(folder / part, names, exif) for part in ("train", "val")))


def _classes(folder: Path) -> set[str]:
    found = {entry.name for entry in folder.iterdir() if entry.is_dir() and not _litter(entry.name)}
    if not found:
        raise InputError(f"{folder}: holds no class folders")
    return found


def _litter(name: str) -> bool:
    return name[0] == "." or name in LITTER


def _files(folder: Path, classes: list[str], exif: bool) -> FolderImages:
    """The pictures below each class, by their names' suffixes as torchvision's ImageFolder tells them; links are
    followed, but for those that lead back to where the walk has been.
    """
    paths, labels, others, left_out = [], [], 0, []
    for label, name in enumerate(classes):
        before = len(paths)
        above = {os.path.realpath(parent) for parent in (folder / name).resolve().parents}
        seen: set[str] = set()
        for parent, folders, files in os.walk(folder / name, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen or real in above:
                left_out.append(f"left out the link {parent}: it leads back to {real}")
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(entry for entry in folders if not _litter(entry))
            pictures = [file for file in sorted(files) if file[0] != "." and Path(file).suffix.lower() in SUFFIXES]
            others += len(files) - len(pictures)
            paths += [Path(parent, file) for file in pictures]
        if len(paths) == before:
            raise InputError(f"{folder / name}: holds no images (files named {' '.join(sorted(SUFFIXES))})")
        labels += [label] * (len(paths) - before)
    if others:
        left_out.append(f"left out {others} files below {folder} that are hidden or not named as pictures")
    return FolderImages(paths, labels, tuple(left_out), exif)
