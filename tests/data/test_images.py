"""Files that hold pictures are read; others are refused with their reason before they cost memory or time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_fast.data import BadImage, read_image
from alexnet_fast.data.images import MAX_PIXELS
from tests.data.pictures import picture, png_header


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "webp", "tiff", "ppm"])
def test_every_format_is_read_as_rgb(tmp_path: Path, suffix: str):
    image = picture(9, 14)
    image.save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}")
    assert read.mode == "RGB"
    assert read.size == (14, 9)
    error = np.abs(np.asarray(read, int) - np.asarray(image, int)).mean()
    assert error < (30 if suffix in ("gif", "jpg", "webp") else 1e-9)  # palette and lossy formats


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_is_read_as_rgb(tmp_path: Path, mode: str):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture(8, 8).convert(mode).save(path)
    assert np.asarray(read_image(path)).shape == (8, 8, 3)


def test_grey_is_repeated_in_three_channels(tmp_path: Path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (np.asarray(read_image(tmp_path / "grey.png")) == grey[:, :, None]).all()


def test_sixteen_bits_a_pixel_keep_their_upper_eight(tmp_path: Path):
    """Pillow's own conversion clips values at 255, which leaves a white picture."""
    values = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert (np.asarray(read_image(tmp_path / "deep.png"))[:, :, 0] == values >> 8).all()


def _truncated(path: Path, suffix: str) -> None:
    picture(64, 64).save(path, suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    picture(64, 64).save(path, "PNG")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


BAD = {
    "empty": (lambda path: path.write_bytes(b""), "empty file"),
    "text": (lambda path: path.write_text("not a picture"), "not an image in a known format"),
    "truncated JPEG": (lambda path: _truncated(path, "JPEG"), "(?i)truncated"),
    "truncated PNG": (lambda path: _truncated(path, "PNG"), "truncated"),
    "truncated GIF": (lambda path: _truncated(path, "GIF"), "."),
    "flipped byte": (_flipped, "."),
    "format not in the list": (lambda path: picture(8, 8).save(path, "PCX"), "not an image in a known format"),
    "script": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not an image"),
    "huge dimensions": (lambda path: path.write_bytes(png_header(60_000, 60_000)), "larger than"),
    "dimensions past the limit": (lambda path: path.write_bytes(png_header(8193, 8192)), "larger than"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "folder": (lambda path: path.mkdir(), "not a regular file"),
    "pipe": (os.mkfifo, "not a regular file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_reason_on_one_line(tmp_path: Path, kind: str):
    make, reason = BAD[kind]
    path = tmp_path / "bad.jpg"
    make(path)
    with pytest.raises(BadImage, match=reason) as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dimensions_are_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "large.png"
    path.write_bytes(png_header(MAX_PIXELS // 1000 + 1, 1000))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(BadImage, match="larger than"):
        read_image(path)


def test_the_users_pillow_settings_are_left_alone(tmp_path: Path):
    limit = Image.MAX_IMAGE_PIXELS
    picture(8, 8).save(tmp_path / "a.png")
    read_image(tmp_path / "a.png")
    assert limit == Image.MAX_IMAGE_PIXELS


DEEP = {
    "floats in 0..1": ("tiff", np.float32([[0, 0.5], [0.25, 1]]), [0, 128, 64, 255]),
    "floats in 0..255": ("tiff", np.float32([[0, 128], [64, 255]]), [0, 128, 64, 255]),
    "12 of 16 bits": ("png", np.uint16([[0, 2048], [1024, 4095]]), [0, 128, 64, 255]),
    "8 of 32 bits": ("tiff", np.int32([[0, 128], [64, 255]]), [0, 128, 64, 255]),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_by_its_range(tmp_path: Path, kind: str):
    suffix, values, wanted = DEEP[kind]
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(values).save(path)
    assert np.asarray(read_image(path))[:, :, 0].ravel().tolist() == wanted


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[0.0, 1e6]], [[0.0, float("nan")]]])
def test_floats_of_no_known_range_are_named(tmp_path: Path, values: list):
    Image.fromarray(np.float32(values)).save(tmp_path / "a.tiff")
    with pytest.raises(BadImage, match=r"expected 0\.\.1 or 0\.\.255"):
        read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str):
    logo = Image.new(mode, (2, 1), (0,) * len(mode))
    logo.putpixel((0, 0), (*(0,) * (len(mode) - 1), 255))
    logo.save(tmp_path / "logo.png")
    assert np.asarray(read_image(tmp_path / "logo.png"))[0, :, 0].tolist() == [0, 255]


def test_a_picture_stands_as_its_orientation_says(tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6
    picture(48, 64).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (48, 64)
    assert read_image(tmp_path / "turned.jpg", exif=False).size == (64, 48)
