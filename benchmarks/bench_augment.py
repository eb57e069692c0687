"""A training batch from uint8 256 x 256 to the net's input: ours in one pass, against a centre crop and normalization
in PyTorch's own functions, which leave out what ours draws for each image: its crop, its mirror and its colour noise.
Folded, for AlexNet's first convolution: against the same, then space to depth by torch's.
"""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from alexnet_fast.geometry import fold_of
from alexnet_fast.ops.augment import IMAGENET_COLOUR
from alexnet_fast.reference.augment import space_to_depth

from .cases import devices
from .timing import row_of, short

BATCH, SIDE = 128, 224
FOLD = ops.SpaceToDepth(11, 4, 2)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("fold", [None, FOLD], ids=["plain", "folded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@devices
def test_augment(benchmark, keep, device, dtype, fold):
    images = torch.randint(256, (BATCH, 3, 256, 256), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    index = torch.arange(BATCH)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def drawn(backend: str | None = None) -> torch.Tensor:
        more = {"index": index, "colour": IMAGENET_COLOUR, "dtype": dtype, "fold": fold}
        return ops.augment(images, SIDE, MEAN, STD, **more, backend=backend)

    def plain() -> torch.Tensor:
        x = ((images[:, :, 16:240, 16:240] / 255 - mean) / std).to(dtype)
        return x if fold is None else space_to_depth(x, *fold_of(fold, (SIDE, SIDE)))

    torch.testing.assert_close(drawn(), drawn("reference"))
    case = f"{BATCH} images of {SIDE}x{SIDE} from 256x256" + (", folded" if fold else "")
    labels = {"bench": "augment", "case": case, "dtype": short(dtype)}
    labels |= {"layout": "channels_last", "pass": "forward", "backend": "cpu" if device == "cpu" else "triton"}
    row = row_of(benchmark, {"ours": drawn, "eager": plain}, labels, device, seconds=2)
    pixels = BATCH * 3 * SIDE**2
    keep(row and row | {"bytes": pixels + drawn().nbytes, "flops": 0})
