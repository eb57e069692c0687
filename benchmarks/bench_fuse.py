"""Other people's nets through ``fuse()``: torchvision's and timm's, where those are installed, and Zeiler and Fergus's.

Of each net a copy is fused, and of those with BatchNorm its batch norms are folded too (``fold_batchnorm=True``). Both
copies run in eager mode, channels_last, without gradients, and give the same logits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from alexnet_fast import fuse

from . import peers
from .bench_alexnet import gpu_only
from .timing import TOLERANCE, agreed, row_of

CASES = [("cpu", 1), ("cpu", 8), *(pytest.param("cuda", batch, marks=gpu_only) for batch in (1, 128))]


def zfnet() -> nn.Module:
    """Zeiler and Fergus 2013 (arXiv 1311.2901), figure 3, with AlexNet's LRN for their contrast normalization."""
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5)),
        *(nn.Conv2d(96, 256, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(5)),
        *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, 1000),
    )


def torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision.models", reason="torchvision is not installed", exc_type=Exception)
        return getattr(models, name)(weights=None)

    return make


def timm() -> nn.Module:
    return pytest.importorskip("timm", reason="timm is not installed", exc_type=Exception).create_model("vgg11")


NETS = {
    "zfnet": zfnet,
    **{name: torchvision(name) for name in ("vgg11", "vgg16", "vgg16_bn", "squeezenet1_1")},
    "timm vgg11": timm,
}
PAIRS = {"squeezenet1_1": "trace"}  # its Fire modules call convolutions and ReLUs by their names


@pytest.mark.parametrize(("device", "batch"), CASES)
@pytest.mark.parametrize("name", NETS)
def test_fuse(benchmark, keep, name, device, batch):
    torch.manual_seed(0)
    plain = NETS[name]().eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    folds = any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.inference_mode():
        fused = fuse(copy.deepcopy(plain), fold_batchnorm=folds, pairs=PAIRS.get(name, ()))
        sides = {"ours": lambda: fused(x), **agreed({"eager channels_last": peers.eager(plain, x)}, plain(x), {})}
        assert peers.agrees(fused(x), plain(x), 2 * TOLERANCE[torch.float32])
        sides = {side: torch.inference_mode()(call) for side, call in sides.items()}
    labels = {"bench": "fuse", "case": f"{name}, batch {batch}", "dtype": "float32", "layout": "channels_last"}
    keep(row_of(benchmark, sides, labels | {"pass": "forward", "backend": "auto"}, device, seconds=2, least=5))
