"""What changes training images on the device that trains: rotation, colour jitter, RandAugment, random erasing.

Images are uint8 (n, 3, h, w) and stay so, except in :func:`erased`. What is drawn for an image depends on (seed, epoch,
number of the image) alone. RandAugment (Cubuk et al., arXiv 1909.13719) and random erasing (Zhong et al., arXiv
1708.04896) have the operations, ranges and defaults of torchvision's modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.data.random import Draws

# Each keeps its draws apart from the others', and from those of crops.
ROTATION_KEY, JITTER_KEY, RAND_AUGMENT_KEY, ERASING_KEY = 0x726F74, 0x6A6974, 0x72616E64, 0x657261
GREY = (0.299, 0.587, 0.114)  # what red, green and blue give to brightness, as Pillow converts
ROUNDS, BINS = 2, 31  # RandAugment's operations an image, and its magnitudes
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)


def rotated(images: Tensor, indices: Tensor, degrees: float, seed: int, epoch: int) -> Tensor:
    """``images``, each turned about its centre by up to ``degrees`` either way, with black corners, as torchvision's
    RandomRotation with bilinear interpolation.
    """
    drawn = [(2 * Draws(seed, epoch, index, ROTATION_KEY).unit() - 1) * degrees for index in indices.tolist()]
    return to_bytes(_turned(images.float(), torch.tensor(drawn, dtype=torch.float32, device=images.device)))


def jittered(images: Tensor, indices: Tensor, share: float, seed: int, epoch: int) -> Tensor:
    """``images``, each with its brightness, contrast and saturation multiplied by three draws from 1 - ``share`` to
    1 + ``share``, in this order, as torchvision's ColorJitter.
    """
    factors = []
    for index in indices.tolist():
        draws = Draws(seed, epoch, index, JITTER_KEY)
        factors.append([1 + (2 * draws.unit() - 1) * share for _ in range(3)])
    pixels = images.float()
    for change, factor in zip((_brighter, _contrasted, _saturated), zip(*factors, strict=True), strict=True):
        pixels = change(pixels, torch.tensor(factor, dtype=torch.float32, device=images.device)).clamp(0, 255)
    return to_bytes(pixels)


def rand_augmented(images: Tensor, indices: Tensor, magnitude: int, seed: int, epoch: int) -> Tensor:
    """``images``, each after two operations of :data:`OPERATIONS`, drawn with replacement, at ``magnitude`` 0 … 30.
    Where an operation has two directions, its direction is drawn too.
    """
    level = magnitude / (BINS - 1)
    drawn = []
    for index in indices.tolist():
        draws = Draws(seed, epoch, index, RAND_AUGMENT_KEY)
        drawn.append([(draws.below(len(OPERATIONS)), 1 - 2 * draws.below(2)) for _ in range(ROUNDS)])
    images = images.clone()
    for choices in zip(*drawn, strict=True):
        for number, operation in enumerate(OPERATIONS.values()):
            rows = [row for row, (choice, _) in enumerate(choices) if choice == number]
            if rows:
                signs = torch.tensor([choices[row][1] for row in rows], dtype=torch.float32, device=images.device)
                images[rows] = to_bytes(operation(images[rows].float(), signs * level))
    return images


def erased(images: Tensor, indices: Tensor, probability: float, seed: int, epoch: int) -> Tensor:
    """Normalized ``images`` of any floating-point type; with ``probability``, a rectangle of an image is set to 0. It
    takes 2% to 33% of the area, with sides in a ratio of 0.3 to 3.3, drawn evenly (the ratio by its logarithm).
    """
    images = images.clone()
    height, width = images.shape[2:]
    low, high = map(math.log, ERASED_RATIO)
    for image, index in zip(images, indices.tolist(), strict=True):
        draws = Draws(seed, epoch, index, ERASING_KEY)
        if draws.unit() >= probability:
            continue
        for _ in range(10):
            area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * draws.unit())
            ratio = math.exp(low + (high - low) * draws.unit())
            tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if tall < height and wide < width:
                top, left = draws.below(height - tall + 1), draws.below(width - wide + 1)
                image[:, top : top + tall, left : left + wide] = 0
                break
    return images


# ---- Operations: float32 pixels (n, 3, h, w) in 0 … 255 and a number an image -------------------------------------


def _brighter(pixels: Tensor, factor: Tensor) -> Tensor:
    return pixels * _each(factor)


def _contrasted(pixels: Tensor, factor: Tensor) -> Tensor:
    return _between(_grey(pixels).mean((2, 3), keepdim=True), pixels, factor)


def _saturated(pixels: Tensor, factor: Tensor) -> Tensor:
    return _between(_grey(pixels), pixels, factor)


def _sharpened(pixels: Tensor, factor: Tensor) -> Tensor:
    """Between a smoothed image (a mean over 3x3 pixels in which the middle one counts five times) and the image itself;
    the border stays."""
    kernel = pixels.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).div(13).expand(3, 1, 3, 3)
    smooth = pixels.clone()
    if min(pixels.shape[2:]) > 2:
        smooth[:, :, 1:-1, 1:-1] = F.conv2d(pixels, kernel, groups=3).round()
    return _between(smooth, pixels, factor)


def _posterized(pixels: Tensor, level: Tensor) -> Tensor:
    step = _each(2 ** (4 * level.abs()).round())  # up to four of the eight bits are dropped
    return pixels.div(step).floor() * step


def _solarized(pixels: Tensor, level: Tensor) -> Tensor:
    return torch.where(pixels >= 255 * (1 - _each(level.abs())), 255 - pixels, pixels)


def _stretched(pixels: Tensor, level: Tensor) -> Tensor:
    """Each channel from 0 to 255; one of a single value stays."""
    least, most = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    return torch.where(most > least, (pixels - least) * 255 / (most - least).clamp_min(1), pixels).floor()


def _equalized(pixels: Tensor, level: Tensor) -> Tensor:
    """Each channel by the table of Pillow's ImageOps.equalize, which makes its values as frequent as may be."""
    values = pixels.long().flatten(2)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=pixels.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - last) // 255
    before = counts.cumsum(2) - counts
    table = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    return torch.where(step > 0, table.gather(2, values), values).view_as(pixels).float()


def _turned(pixels: Tensor, degrees: Tensor) -> Tensor:
    angles, aspect = degrees.deg2rad(), pixels.shape[2] / pixels.shape[3]
    cos, sin, none = angles.cos(), angles.sin(), torch.zeros_like(angles)
    return _sampled(pixels, [cos, -sin * aspect, none], [sin / aspect, cos, none])


def _sheared(pixels: Tensor, slope: Tensor, sideways: bool) -> Tensor:
    """A pixel comes from ``slope`` times its distance from the top (from the left) farther to the right (below)."""
    one, none, aspect = torch.ones_like(slope), torch.zeros_like(slope), pixels.shape[2] / pixels.shape[3]
    if sideways:
        return _sampled(pixels, [one, slope * aspect, slope * aspect], [none, one, none])
    return _sampled(pixels, [one, none, none], [slope / aspect, one, slope / aspect])


def _shifted(pixels: Tensor, share: Tensor, sideways: bool) -> Tensor:
    """By whole pixels, ``share`` of the side."""
    side = pixels.shape[3 if sideways else 2]
    one, none, reach = torch.ones_like(share), torch.zeros_like(share), (share * side).trunc() * 2 / side
    return _sampled(pixels, [one, none, reach if sideways else none], [none, one, none if sideways else reach])


def _sampled(pixels: Tensor, *rows: list[Tensor]) -> Tensor:
    """``pixels`` at the places to which two ``rows`` map coordinates from -1 to 1, bilinearly; black outside."""
    grid = F.affine_grid(torch.stack([torch.stack(row, 1) for row in rows], 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _grey(pixels: Tensor) -> Tensor:
    return (pixels * pixels.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def _between(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """``other`` at factor 0, ``pixels`` at factor 1, and on the straight line through both at all other factors."""
    return other + (pixels - other) * _each(factor)


def _each(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def to_bytes(pixels: Tensor) -> Tensor:
    """Rounded to uint8, channels_last."""
    return pixels.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


# RandAugment's, with torchvision's magnitudes at level 1; the level's sign counts where there are two directions.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "identity": lambda pixels, level: pixels,
    "shear x": lambda pixels, level: _sheared(pixels, level * 0.3, True),
    "shear y": lambda pixels, level: _sheared(pixels, level * 0.3, False),
    "translate x": lambda pixels, level: _shifted(pixels, level * 150 / 331, True),
    "translate y": lambda pixels, level: _shifted(pixels, level * 150 / 331, False),
    "rotate": lambda pixels, level: _turned(pixels, level * 30),
    "brightness": lambda pixels, level: _brighter(pixels, 1 + level * 0.9),
    "colour": lambda pixels, level: _saturated(pixels, 1 + level * 0.9),
    "contrast": lambda pixels, level: _contrasted(pixels, 1 + level * 0.9),
    "sharpness": lambda pixels, level: _sharpened(pixels, 1 + level * 0.9),
    "posterize": _posterized,
    "solarize": _solarized,
    "autocontrast": _stretched,
    "equalize": _equalized,
}
