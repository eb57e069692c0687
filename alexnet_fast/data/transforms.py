"""From a picture of any size to the net's square, by counter-based draws.

``crop``   photographs: shorter side to 8/7 of the square (256 for 224), random crop and mirror; evaluated on the centre
``shift``  small grey pictures such as digits: stretched to the square, moved by up to 1/16 of it; never mirrored
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from alexnet_fast.data.random import Draws

BILINEAR = Image.Resampling.BILINEAR


@dataclass(frozen=True)
class Transform:
    """``kind`` is ``crop`` or ``shift``; ``side`` is the edge of the square in pixels."""

    kind: str
    side: int

    def __call__(self, image: Image.Image, draws: Draws | None = None) -> np.ndarray:
        """(side, side, 3) uint8. With ``draws`` the picture is augmented for training."""
        return (self._crop if self.kind == "crop" else self._shift)(image.convert("RGB"), draws)

    def _crop(self, image: Image.Image, draws: Draws | None) -> np.ndarray:
        # Only the window is resampled: shrinking a 1 x 60,000,000 picture whole, shorter side first, would enlarge it.
        shorter = max(self.side, round(self.side * 8 / 7))
        scale = min(image.size) / shorter
        margins = [max(0, round(length / scale) - self.side) for length in image.size]
        left, top = [draws.below(margin + 1) if draws else margin // 2 for margin in margins]
        right, bottom = [
            min(length, (start + self.side) * scale) for length, start in zip(image.size, (left, top), strict=True)
        ]
        window = image.resize((self.side, self.side), BILINEAR, box=(left * scale, top * scale, right, bottom))
        pixels = np.asarray(window)
        return pixels[:, ::-1] if draws and draws.below(2) else pixels

    def _shift(self, image: Image.Image, draws: Draws | None) -> np.ndarray:
        pixels = np.asarray(image.resize((self.side, self.side), BILINEAR))
        if draws is None:
            return pixels
        reach = self.side // 16
        down, right = (draws.below(2 * reach + 1) for _ in range(2))
        padded = np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)))
        return padded[down : down + self.side, right : right + self.side]
