"""Compares LPIPS with the package lpips, value by value: for an environment that has it and torchvision.

python -m tests.models.check_lpips
"""

from __future__ import annotations

from itertools import product

import lpips
import torch
from torch import Tensor
from torchvision import models

import alexnet_fast
from alexnet_fast.models.lpips import BACKBONES

NETS = {
    "alex": models.alexnet,
    "vgg": models.vgg16,
    "squeeze": models.squeezenet1_1,
}


def backbone(net: str) -> dict[str, Tensor]:
    """Random weights that keep activations' size, under torchvision's names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        state = NETS[net](weights=None).features.state_dict(prefix="features.")
    made = {}
    for key, tensor in state.items():
        fan = tensor[0].numel() if tensor.dim() == 4 else 100
        made[key] = torch.randn(tensor.shape) * (2 / fan) ** 0.5
    return made


def both(net: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    ours = alexnet_fast.LPIPS(net=net, backbone=backbone(net), verbose=False, **options)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False, **options)
    theirs.load_state_dict(ours.state_dict())  # the keys are the same
    return ours, theirs


def compared(loss: torch.nn.Module, first: Tensor, second: Tensor, **options) -> list[Tensor]:
    """The distance, each layer's share, and the gradients of both images and of the weights that have one."""
    leaves = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    total, shares = loss(*leaves, retPerLayer=True, **options)
    weights = [p for p in loss.parameters() if p.requires_grad]
    torch.manual_seed(1)
    return [total, *shares, *torch.autograd.grad(total, leaves + weights, torch.rand_like(total))]


def check(net: str, construction: dict, call: dict, side: int) -> float:
    """The largest difference, relative to the largest element of each tensor, of at most 1."""
    ours, theirs = both(net, **construction)
    torch.manual_seed(2)
    first, second = (torch.rand(2, 3, side, side) * 2 - 1 for _ in range(2))
    if call.get("normalize"):
        first, second = first / 2 + 0.5, second / 2 + 0.5
    worst = 0.0
    for a, b in zip(compared(ours, first, second, **call), compared(theirs, first, second, **call), strict=True):
        assert a.shape == b.shape
        worst = max(worst, ((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item())
    return worst


CASES = [
    *product(["alex", "vgg", "squeeze"], [{}], [{}]),
    ("alex", {"spatial": True}, {"normalize": True}),
    ("alex", {"version": "0.0"}, {}),
    ("alex", {"lpips": False}, {}),
    ("alex", {"lpips": False, "spatial": True}, {}),
    ("alex", {"pnet_tune": True}, {"normalize": True}),
    ("squeeze", {"spatial": True}, {}),
]


def main() -> None:
    for net, construction, call in CASES:
        side = 2 * BACKBONES[net].least + 1
        worst = check(net, construction, call, side)
        assert worst < 1e-5, f"{net}, {construction}, {call}: {worst:.2g}"
        print(net, construction, call, f"{worst:.2g}")


if __name__ == "__main__":
    main()
