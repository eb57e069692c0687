"""A training batch from uint8 256 x 256 to the net's input: ours in one pass, against a centre crop and normalization
in PyTorch's own functions, which leave out what ours draws for each image: its crop, its mirror and its colour noise.
Folded, for AlexNet's first convolution: against the same, then space to depth by torch's.
"""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import FusedSequential, ops
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@devices
def test_first_stage(benchmark, keep, device, training, dtype):
    """AlexNet's first convolution, ReLU and pooling of folded images, against the same of plain ones; in training with
    the gradients of weight and bias."""
    batch = 32 if device == "cpu" else BATCH
    images = torch.randint(256, (batch, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    plain, folded = (ops.augment(images, SIDE, MEAN, STD, dtype=dtype, fold=fold) for fold in (None, FOLD))
    conv = torch.nn.Conv2d(3, 64, *FOLD).to(device, dtype, memory_format=torch.channels_last).requires_grad_(training)
    layers = FusedSequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(3, 2))
    with torch.no_grad():
        dy = torch.ones_like(layers(plain))

    def run(x: torch.Tensor):
        y = layers(x)
        return torch.autograd.grad(y, list(layers.parameters()), dy) if training else y

    torch.testing.assert_close(run(folded), run(plain), rtol=0.05, atol=0.05 * run(plain)[0].abs().max().item())
    labels = {"bench": "augment", "case": f"first stage, {batch} images folded", "dtype": short(dtype)}
    labels |= {"layout": "channels_last", "pass": "training" if training else "forward"}
    labels |= {"backend": "cpu" if device == "cpu" else "auto"}
    keep(row_of(benchmark, {"ours": lambda: run(folded), "plain": lambda: run(plain)}, labels, device, seconds=2))
