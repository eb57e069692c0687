from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast.geometry import SpaceToDepth, fold_of
from alexnet_fast.reference.linear_relu_dropout import WORD, philox


class Draws(NamedTuple):
    """What distinguishes the images of a batch, on the CPU.

    ``place``: int32 (N, 3), the crop's first row, its first column, and 1 if it is mirrored.
    ``colour``: float64 (N, 3), normal deviates.
    """

    place: Tensor
    colour: Tensor


def augment(
    images: Tensor,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    index: Tensor | None = None,
    epoch: int = 0,
    seed: int = 0,
    mirror: bool = True,
    colour: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    fold: SpaceToDepth | None = None,
) -> Tensor:
    """(x / 255 + colour · a − mean) / std of each image's crop, the crop mirrored or not, and laid out for a
    convolution with ``fold``'s options."""
    height, width = (size, size) if isinstance(size, int) else size
    drawn = draw(len(images), images.shape[2] - height, images.shape[3] - width, index, epoch, seed, mirror)
    numbers = [t.to(images.device) for t in (drawn.place, *affine(drawn, mean, std, colour))]
    return crops(images, *numbers, height, width, dtype, *fold_of(fold, (height, width)))


def space_to_depth(x: Tensor, factor: Sequence[int], padding: Sequence[int], sides: Sequence[int]) -> Tensor:
    """(N, C, H, W) as :class:`alexnet_fast.geometry.Fold` says, (N, factor² · C, *sides) channels_last: of images, or
    of the weight that goes with them. What lies beyond the image is 0."""
    (top, left), seen = padding, zip(factor, sides, padding, x.shape[2:], strict=True)
    below, right = (step * side - pad - has for step, side, pad, has in seen)
    blocks = F.pad(x, (left, right, top, below)).unflatten(3, (-1, factor[1])).unflatten(2, (-1, factor[0]))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).contiguous().permute(0, 3, 1, 2)


def crops(
    images: Tensor,
    place: Tensor,
    shift: Tensor,
    scale: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    factor: Sequence[int],
    padding: Sequence[int],
    sides: Sequence[int],
) -> Tensor:
    """(x − shift) / scale of the crops at ``place``, as :class:`Draws` holds it, space to depth, channels_last."""
    top, left, mirrored = place.long()[:, :, None].unbind(1)
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    columns = torch.where(mirrored == 1, width - 1 - columns, columns)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    pixels = images[image, :, (top + rows)[:, :, None], (left + columns)[:, None, :]]  # N, height, width, 3
    y = ((pixels.float() - shift[:, None, None]) / scale).to(dtype).permute(0, 3, 1, 2)
    return y if [*factor, *padding] == [1, 1, 0, 0] else space_to_depth(y, factor, padding, sides)


def draw(batch: int, rows: int, columns: int, index: Tensor | None, epoch: int, seed: int, mirror: bool) -> Draws:
    """Crops at 0 … ``rows`` and 0 … ``columns``: random ones for images numbered ``index``, else the centre's.

    An image's draws are words of Philox, its key the seed, its counter the image's number and the epoch: they depend on
    nothing else, so any split over ranks and any resumption gives the same.
    """
    if index is None:
        centre = torch.tensor([rows // 2, columns // 2, 0], dtype=torch.int32)
        return Draws(centre.repeat(batch, 1), torch.zeros(batch, 3, dtype=torch.float64))
    key, number = torch.tensor([seed]), index.cpu()
    words = [philox(key, number, 3 * epoch + i) for i in range(3)]
    top, left, side, _ = words[0]
    place = [top * (rows + 1) // WORD, left * (columns + 1) // WORD, side % 2 if mirror else torch.zeros_like(side)]
    # Uniform numbers in (0, 1), two a normal one, by Box and Muller's transform; two share theirs as cosine and sine.
    u, v, w, z = [(word.double() + 0.5) / WORD for word in (*words[1][:2], *words[2][:2])]
    far, near = (-2 * u.log()).sqrt(), (-2 * w.log()).sqrt()
    normal = [far * (2 * torch.pi * v).cos(), far * (2 * torch.pi * v).sin(), near * (2 * torch.pi * z).cos()]
    return Draws(torch.stack(place, 1).int(), torch.stack(normal, 1))


def affine(drawn: Draws, mean: Sequence[float], std: Sequence[float], colour: Tensor | None) -> tuple[Tensor, Tensor]:
    """float32 (N, 3) and (3,), on the CPU: y = (x − shift) / scale for x in 0 … 255."""
    shift = torch.tensor(list(mean), dtype=torch.float64).repeat(len(drawn.place), 1)
    if colour is not None:
        shift = shift - drawn.colour @ colour.double().cpu().T
    return (255 * shift).float(), (255 * torch.tensor(list(std), dtype=torch.float64)).float()
