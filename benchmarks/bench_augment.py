"""A training batch from uint8 256 x 256 to the net's input: ours in one pass, and the same in PyTorch's own functions
without crops and noise of each image's own."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.ops.augment import IMAGENET_COLOUR

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def ours(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    index = torch.arange(len(images))
    return ops.augment(images, 224, MEAN, STD, index=index, colour=IMAGENET_COLOUR, dtype=dtype)


def plain(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    mean, std = (torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (MEAN, STD))
    return ((images[:, :, 16:240, 16:240] / 255 - mean) / std).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("side", [ours, plain], ids=lambda side: side.__name__)
def test_augment(benchmark, side, dtype):
    images = torch.randint(256, (128, 3, 256, 256), dtype=torch.uint8, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)

    def batch() -> None:
        side(images, dtype)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"augment-{dtype}"
    benchmark.pedantic(batch, rounds=20, warmup_rounds=3)
