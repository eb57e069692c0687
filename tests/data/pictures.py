"""Small picture files and folders that tests make."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from alexnet_fast.data.sources import FASHION_FILES


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture: JPEG keeps its colours."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def write_folder(root: Path, train: int = 6, val: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """An ImageFolder with so many 70x80 JPEG pictures a class."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture(70, 80, 100 * label + number).save(folder / f"{number:03}.jpg")
    return root


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be so large and holds almost nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def write_idx(path: Path, values: np.ndarray) -> None:
    """An IDX file of bytes, gzipped if ``path`` ends in .gz."""
    content = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, train: int = 20, val: int = 10, suffix: str = "") -> Path:
    """The four files of Fashion-MNIST with faint noise, and a bright block whose place gives the class away."""
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for count, (images, labels) in zip((train, val), FASHION_FILES, strict=True):
        classes = np.arange(count) % 10
        pixels = generator.integers(0, 60, (count, 28, 28), np.uint8)
        for picture, label in zip(pixels, classes, strict=True):
            picture[14 * (label // 5) :, 5 * (label % 5) :][:14, :5] += 180
        write_idx(folder / (images + suffix), pixels)
        write_idx(folder / (labels + suffix), classes.astype(np.uint8))
    return folder
