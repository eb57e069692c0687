"""From a picture of any size to the net's square, by counter-based draws.

- ``crop``: photographs: shorter side to 8/7 of the square (256 for 224), random crop and mirror
- ``resized-crop``: photographs: a random part of 8% to 100% of the area and of sides 3:4 to 4:3, stretched to the
  square, mirrored half the time (torchvision's RandomResizedCrop)
- ``shift``: small grey pictures such as digits: stretched to the square, moved by up to 1/16 of it; never mirrored

Photographs are evaluated on the centre of what ``crop`` resizes to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from alexnet_fast.data.random import Draws

BILINEAR = Image.Resampling.BILINEAR
KINDS = ("crop", "resized-crop", "shift")


@dataclass(frozen=True)
class Transform:
    """``kind`` is one of ``KINDS``; ``side`` is the edge of the square in pixels. With ``whole`` an evaluation gets the
    larger square whose centre it would otherwise take, for cutting ten crops from it.
    """

    kind: str
    side: int
    whole: bool = False

    def __call__(self, image: Image.Image, draws: Draws | None = None) -> np.ndarray:
        """(side, side, 3) uint8, larger with ``whole``. With ``draws`` the picture is augmented for training."""
        image = image.convert("RGB")
        if self.kind == "shift":
            return self._shift(image, draws)
        if draws is None:
            shorter = shorter_side(self.side)
            return centre(image, shorter if self.whole else self.side, shorter)
        return self._crop(image, draws) if self.kind == "crop" else self._resized_crop(image, draws)

    def _crop(self, image: Image.Image, draws: Draws) -> np.ndarray:
        shorter = shorter_side(self.side)
        return _mirrored(
            _window(image, self.side, shorter, [draws.below(m + 1) for m in _margins(image, self.side, shorter)]), draws
        )

    def _resized_crop(self, image: Image.Image, draws: Draws) -> np.ndarray:
        left, top, width, height = random_box(*image.size, draws)
        box = (left, top, left + width, top + height)
        return _mirrored(np.asarray(image.resize((self.side, self.side), BILINEAR, box=box)), draws)

    def _shift(self, image: Image.Image, draws: Draws | None) -> np.ndarray:
        pixels = np.asarray(image.resize((self.side, self.side), BILINEAR))
        if draws is None:
            return pixels
        reach = self.side // 16
        down, right = (draws.below(2 * reach + 1) for _ in range(2))
        padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)))
        return padded[down : down + self.side, right : right + self.side]


def shorter_side(side: int) -> int:
    """What a photograph's shorter side is scaled to before a square of ``side`` is cut from it."""
    return max(side, round(side * 8 / 7))


def centre(image: Image.Image, side: int, shorter: int) -> np.ndarray:
    """(side, side, 3) uint8: the centre of an RGB picture, its shorter side scaled to ``shorter``."""
    return _window(image, side, shorter, [margin // 2 for margin in _margins(image, side, shorter)])


def random_box(width: int, height: int, draws: Draws) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a part of 8% to 100% of the area and of sides 3:4 to 4:3, both drawn evenly (the
    ratio by its logarithm); the largest such part of the centre where ten draws do not fit the picture.
    """
    for _ in range(10):
        area = width * height * (0.08 + 0.92 * draws.unit())
        ratio = (4 / 3) ** (2 * draws.unit() - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draws.below(width - w + 1), draws.below(height - h + 1), w, h
    w, h = min(width, max(1, height * 4 // 3)), min(height, max(1, width * 4 // 3))
    return (width - w) // 2, (height - h) // 2, w, h


def _margins(image: Image.Image, side: int, shorter: int) -> list[int]:
    """How far a square may be moved to the right and down."""
    return [max(0, round(length * shorter / min(image.size)) - side) for length in image.size]


def _window(image: Image.Image, side: int, shorter: int, corner: list[int]) -> np.ndarray:
    # Only the window is resampled: shrinking a 1 x 60,000,000 picture whole, shorter side first, would enlarge it.
    scale = min(image.size) / shorter
    left, top = (start * scale for start in corner)
    ends = [min(length, (start + side) * scale) for length, start in zip(image.size, corner, strict=True)]
    return np.asarray(image.resize((side, side), BILINEAR, box=(left, top, *ends)))


def _mirrored(pixels: np.ndarray, draws: Draws) -> np.ndarray:
    return pixels[:, ::-1] if draws.below(2) else pixels
