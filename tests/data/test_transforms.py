"""Crops, mirrors and shifts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from alexnet_fast.data import Transform
from alexnet_fast.data.random import Draws
from tests.data.pictures import picture


def ramp(height: int, width: int) -> Image.Image:
    """Red grows to the right by 1 a pixel, green downwards."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = np.arange(width)
    pixels[:, :, 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(70, 90), (1, 1), (3, 2000), (64, 64), (500, 333)])
@pytest.mark.parametrize("kind", ["crop", "shift"])
def test_any_picture_becomes_the_square(size: tuple[int, int], kind: str):
    transform = Transform(kind, 64)
    for draws in (None, Draws(1)):
        out = transform(picture(*size), draws)
        assert out.shape == (64, 64, 3)
        assert out.dtype == np.uint8


def test_the_evaluated_crop_is_the_centre():
    # 80 is 8/7 of 70: nothing is resampled, so the window is an exact cut of the picture.
    image = ramp(80, 100)
    assert (Transform("crop", 70)(image) == np.asarray(image)[5:75, 15:85]).all()


def test_random_crops_reach_every_offset_and_mirror_half_the_time():
    image = np.asarray(ramp(80, 80))
    seen, mirrored = set(), 0
    for number in range(600):
        out = Transform("crop", 70)(ramp(80, 80), Draws(number))
        flipped = out[0, 0, 0] > out[0, -1, 0]
        out = out[:, ::-1] if flipped else out
        left, top = int(out[0, 0, 0]), int(out[0, 0, 1])
        assert (out == image[top : top + 70, left : left + 70]).all()
        seen.add((left, top))
        mirrored += bool(flipped)
    assert {left for left, _ in seen} == {top for _, top in seen} == set(range(11))
    assert 240 < mirrored < 360


def test_digits_move_by_up_to_a_sixteenth_and_are_never_mirrored():
    plain = np.asarray(ramp(64, 64)).astype(int) + 1
    image = Image.fromarray(plain.astype(np.uint8))
    offsets = set()
    for number in range(300):
        out = Transform("shift", 64)(image, Draws(number)).astype(int)
        right, down = 32 - (out[32, 32, 0] - 1), 32 - (out[32, 32, 1] - 1)
        expected = np.zeros_like(plain)
        rows, columns = (slice(max(0, d), 64 + min(0, d)) for d in (down, right))
        from_rows, from_columns = (slice(max(0, -d), 64 + min(0, -d)) for d in (down, right))
        expected[rows, columns] = plain[from_rows, from_columns]
        assert (out == expected).all()
        offsets.add((int(right), int(down)))
    assert {right for right, _ in offsets} == {down for _, down in offsets} == set(range(-4, 5))


def test_a_long_thin_picture_is_not_blown_up(monkeypatch: pytest.MonkeyPatch):
    """Shorter side to 256 first would make 256 x 51,200,000 pixels of this one."""
    largest = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: largest.append(size) or resize(self, size, *a, **k)
    )
    Transform("crop", 224)(Image.new("RGB", (200_000, 1)), Draws(0))
    assert largest == [(224, 224)]
