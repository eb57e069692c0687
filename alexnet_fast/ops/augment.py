"""From decoded images to the net's input in one pass: crop, mirror, colour noise, normalization and cast.

    y[c, i, j] = (x[c, top + i, left + j′] / 255 + Σ_k colour[c, k] · a_k − mean_c) / std_c

with j′ = width − 1 − j where the crop is mirrored, else j, and normal deviates a. Colour noise along the principal
components of RGB is that of Krizhevsky, Sutskever and Hinton 2012, section 4.1. Draws are an image's own, by counter:
the same image, epoch and seed give the same crop in any batch, on any rank and device. They are made on the CPU, six
numbers an image. Kernels read them, subtract and divide, in float32 rounded each time: results are equal to the bit.

With a ``fold`` the same values are written to where the first convolution's kernel reads them (space to depth). For
AlexNet's, 11x11 with stride 4 over 3 channels, that is (N, 48, 57, 57) in place of (N, 3, 224, 224), 4% more memory:
else the convolution makes such a copy in each call, in forward and again for its weight's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.backends import choose
from alexnet_fast.geometry import IntPair, SpaceToDepth, fold_of
from alexnet_fast.ops.arguments import pair
from alexnet_fast.ops.registry import LIBRARY, define, family
from alexnet_fast.reference.augment import affine, crops, draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# 0.1 · components · eigenvalues of ImageNet's RGB values in 0 … 1, as torch7's fb.resnet published them.
IMAGENET_COLOUR = (
    0.1
    * torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    * torch.tensor([0.2175, 0.0188, 0.0045])
)


def _fake(images: Tensor, place, shift, scale, height, width, dtype: torch.dtype, factor, padding, sides) -> Tensor:
    size = (images.shape[0], 3 * prod(factor), *sides)
    return torch.empty(size, dtype=dtype, device=images.device, memory_format=torch.channels_last)


define(
    "augment",
    "(Tensor images, Tensor place, Tensor shift, Tensor scale, SymInt height, SymInt width, ScalarType dtype,"
    " int[2] factor, int[2] padding, SymInt[2] sides) -> Tensor",
    fake=_fake,
)
LIBRARY.impl("augment", crops, "CUDA")  # one pass on Triton alone


def augment(
    images: Tensor,
    size: IntPair,
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
    backend: str | None = None,
) -> Tensor:
    """The crops of a batch, normalized: random ones in training, the centre's in evaluation.

    Args:
        images: uint8 (N, 3, H, W); channels_last memory is read in place.
        size: the crop's sides, an int or (height, width), at most the images'.
        mean, std: of each channel, for values in 0 … 1.
        index: int64 (N,), the images' numbers in their set, for random crops. None: the centre, unmirrored, no noise.
        epoch, seed: further keys of the random crops; an int from 0 to 2³⁰, and an int64.
        mirror: mirror half of the random crops.
        colour: (3, 3), or None for no noise. The noise of random crops is ``colour`` times normal deviates, such as
            :data:`alexnet_fast.ops.augment.IMAGENET_COLOUR`.
        dtype: float32, float16 or bfloat16.
        fold: :class:`alexnet_fast.ops.SpaceToDepth` with the options of the convolution that reads the result, which
            then comes space to depth; or None. Of a :class:`alexnet_fast.FusedSequential`, such as AlexNet's features,
            :func:`alexnet_fast.nn.input_fold` says which one it takes.
        backend: see :mod:`alexnet_fast.backends`.

    Returns:
        (N, 3, height, width) channels_last on images' device; with a fold (N, 3 · stride², height', width').

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.
        BackendError: the named backend cannot run this call.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise TypeError(f"images: expected a uint8 Tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected (N, 3, H, W), got shape {tuple(images.shape)}")
    height, width = pair("size", size, 1)
    rows, columns = images.shape[2] - height, images.shape[3] - width
    if rows < 0 or columns < 0:
        raise ValueError(f"size: expected at most the images' {tuple(images.shape[2:])}, got {size!r}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected three numbers, got {len(values)}")
    if index is not None and (index.dtype != torch.int64 or index.shape != images.shape[:1]):
        raise ValueError(f"index: expected int64 of shape ({len(images)},), got {index.dtype} {tuple(index.shape)}")
    if not 0 <= epoch <= 2**30:
        raise ValueError(f"epoch: expected 0 to 2**30, got {epoch!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected an int64, got {seed!r}")
    if colour is not None and colour.shape != (3, 3):
        raise ValueError(f"colour: expected shape (3, 3), got {tuple(colour.shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    if fold is not None:
        if not isinstance(fold, SpaceToDepth):
            raise TypeError(f"fold: expected alexnet_fast.ops.SpaceToDepth or None, got {fold!r}")
        least = {"kernel_size": 1, "stride": 1, "padding": 0}
        fold = SpaceToDepth(*[pair(f"fold.{name}", getattr(fold, name), value) for name, value in least.items()])
    folded = fold_of(fold, (height, width))
    chosen = choose("augment", torch.empty(0, dtype=dtype, device=images.device), backend)
    if chosen == "reference":
        more = {"index": index, "epoch": epoch, "seed": seed, "mirror": mirror, "colour": colour, "dtype": dtype}
        return reference.augment(images, (height, width), mean, std, **more, fold=fold)
    drawn = draw(len(images), rows, columns, index, epoch, seed, mirror)
    numbers = [t.to(images.device, non_blocking=True) for t in (drawn.place, *affine(drawn, mean, std, colour))]
    return family(chosen).augment(images, *numbers, height, width, dtype, *folded)
