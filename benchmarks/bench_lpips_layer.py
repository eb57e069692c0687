"""LPIPS as a loss, forward and backward to one of the images: the whole of it, and the end of a layer alone.

Ours against the same formula in plain operators, one image after the other, and against the package lpips where it is
installed, with torchvision.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from alexnet_fast import LPIPS, ops
from tests.models.test_lpips import QUIET, written_out
from tests.ops.samples import torch_lpips_layer

from .cases import devices
from .memory import peak_bytes
from .timing import row_of

SIZES = [(64, 8), (256, 4)]


def timed(benchmark, keep, calls: dict[str, Callable[[], torch.Tensor]], labels: dict[str, str], device: str) -> None:
    """Of calls that all give one gradient."""
    expected = calls["eager"]()
    for name, call in calls.items():
        assert torch.allclose(call(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item()), name
    labels |= {"dtype": "float32", "layout": "contiguous", "pass": "forward+backward", "backend": device}
    row = row_of(benchmark, calls, labels, device, seconds=2)
    if row:
        row["peak"] = {name: peak_bytes(call, device) for name, call in calls.items()}
    keep(row)


@devices
@pytest.mark.parametrize(("side", "batch"), SIZES)
def test_lpips(benchmark, keep, side, batch, device):
    ours = LPIPS(**QUIET).to(device)
    first, second = (torch.rand(batch, 3, side, side, device=device) * 2 - 1 for _ in range(2))

    def gradient(loss: Callable) -> Callable[[], torch.Tensor]:
        leaf = first.clone().requires_grad_()
        return lambda: torch.autograd.grad(loss(leaf, second).sum(), leaf)[0]

    calls = {"ours": gradient(ours), "eager": gradient(lambda *pair: written_out(ours, *pair))}
    try:
        import lpips
    except ImportError:
        pass
    else:
        theirs = lpips.LPIPS(pnet_rand=True, verbose=False).to(device)
        theirs.load_state_dict(ours.state_dict())
        calls["lpips"] = gradient(theirs)
    labels = {"bench": "lpips", "case": f"alex, {side}x{side}, batch {batch}"}
    timed(benchmark, keep, calls, labels, device)


@devices
@pytest.mark.parametrize("shape", [(16, 64, 15, 15), (8, 192, 31, 31)], ids=str)
def test_layer(benchmark, keep, shape, device):
    x, weight = torch.rand(shape, device=device).requires_grad_(), torch.rand(shape[1], device=device)

    def gradient(layer: Callable) -> Callable[[], torch.Tensor]:
        return lambda: torch.autograd.grad(layer(x, weight).sum(), x)[0]

    calls = {"ours": gradient(ops.lpips_layer), "eager": gradient(torch_lpips_layer)}
    timed(benchmark, keep, calls, {"bench": "lpips_layer", "case": "x".join(map(str, shape))}, device)
