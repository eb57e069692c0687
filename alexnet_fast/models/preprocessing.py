"""Pictures as published weights expect them, and the names of ImageNet's classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def imagenet_categories() -> list[str]:
    """The 1000 classes of ImageNet's challenge, in the order of the labels, as torchvision calls them."""
    return (Path(__file__).parent / "imagenet.txt").read_text().splitlines()


class ImageClassification(nn.Module):
    """The shorter side to ``resize_size``, the centre of ``crop_size``, scaled to 0..1, minus ``mean``, by ``std``; as
    torchvision's preset of that name.

    Shape: a PIL image, or a tensor (…, 3, H, W) of uint8 or floats in 0..1, to float32 (…, 3, crop_size, crop_size).
    """

    def __init__(
        self,
        *,
        crop_size: int,
        resize_size: int = 256,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        if crop_size > resize_size:
            raise ValueError(f"crop_size: expected at most resize_size {resize_size}, got {crop_size}")
        self.crop_size, self.resize_size = [crop_size], [resize_size]
        self.mean, self.std = list(mean), list(std)

    def forward(self, img: Image.Image | Tensor) -> Tensor:
        image = self._resized(img) if isinstance(img, Tensor) else self._resized_picture(img)
        side = self.crop_size[0]
        top, left = (round((length - side) / 2) for length in image.shape[-2:])
        crop = image[..., top : top + side, left : left + side]
        crop = crop.float() / 255 if crop.dtype == torch.uint8 else crop.float()
        mean, std = (torch.tensor(numbers, device=crop.device).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (crop - mean) / std

    def _sides(self, height: int, width: int) -> tuple[int, int]:
        short, size = min(height, width), self.resize_size[0]
        long = int(size * max(height, width) / short)
        return (size, long) if height <= width else (long, size)

    def _resized_picture(self, img: Any) -> Tensor:
        if not isinstance(img, Image.Image):
            raise TypeError(f"img: expected a PIL image or a Tensor, got {type(img).__name__}")
        height, width = self._sides(img.height, img.width)
        pixels = np.array(img.resize((width, height), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1)

    def _resized(self, img: Tensor) -> Tensor:
        batch = img.reshape(-1, *img.shape[-3:])
        wide = batch if batch.is_floating_point() else batch.float()
        sides = self._sides(*img.shape[-2:])
        resized = F.interpolate(wide, sides, mode="bilinear", align_corners=False, antialias=True)
        resized = resized if batch.is_floating_point() else resized.round().to(batch.dtype)
        return resized.reshape(*img.shape[:-2], *sides)

    def describe(self) -> str:
        return (
            f"Takes PIL images and tensors (..., 3, H, W): resized to {self.resize_size[0]} pixels at the shorter "
            f"side, cut to the central {self.crop_size[0]}, scaled to 0..1, normalized with mean={self.mean} and "
            f"std={self.std}."
        )

    def extra_repr(self) -> str:
        return f"crop_size={self.crop_size}, resize_size={self.resize_size}, mean={self.mean}, std={self.std}"
