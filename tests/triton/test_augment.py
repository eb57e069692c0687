"""The Triton kernel of the input pipeline, against the reference, to the bit."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.ops.augment import IMAGENET_COLOUR

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bfloat16
@pytest.mark.parametrize("size", [1, (5, 7), (40, 37)])  # a crop of one tile, and of several
@pytest.mark.parametrize("drawn", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_equal_to_the_reference(size, drawn, layout, dtype, device):
    images = torch.randint(256, (3, 3, 41, 44), dtype=torch.uint8).contiguous(memory_format=layout)
    more = {"index": torch.arange(3), "epoch": 3, "seed": 5, "colour": IMAGENET_COLOUR} if drawn else {}
    expected = ops.augment(images, size, MEAN, STD, dtype=dtype, backend="reference", **more)
    y = ops.augment(images.to(device), size, MEAN, STD, dtype=dtype, backend="triton", **more)
    assert torch.equal(y.cpu(), expected)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("size", "fold"),
    [
        ((40, 37), ops.SpaceToDepth(11, 4, 2)),
        (41, ops.SpaceToDepth(11, 4)),
        ((5, 7), ops.SpaceToDepth((3, 5), (2, 3), (1, 4))),
    ],
)
def test_folded(size, fold, dtype, device):
    """Several tiles, sides that are no multiple of the stride, and a padding wider than it."""
    images = torch.randint(256, (3, 3, 41, 44), dtype=torch.uint8)
    more = {"index": torch.arange(3), "epoch": 3, "seed": 5, "colour": IMAGENET_COLOUR, "dtype": dtype, "fold": fold}
    y = ops.augment(images.to(device), size, MEAN, STD, backend="triton", **more)
    assert torch.equal(y.cpu(), ops.augment(images, size, MEAN, STD, backend="reference", **more))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_empty(device):
    images = torch.zeros(0, 3, 9, 9, dtype=torch.uint8, device=device)
    assert ops.augment(images, 5, MEAN, STD, backend="triton").shape == (0, 3, 5, 5)
