"""fuse() on a net of your own: what runs as one, what does not and why, and that nothing else changes.

python examples/fuse_your_net.py
"""

import copy

import torch
from torch import Tensor, nn

from alexnet_fast import fuse, fusion_report


class Fire(nn.Module):
    """SqueezeNet's module: it calls its layers one by one, so fuse() is told which belong together."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze, self.squeezed = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.expand, self.expanded = nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.expanded(self.expand(self.squeezed(self.squeeze(x))))


def build() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        Fire(16, 8, 32),
        *(nn.Conv2d(32, 32, 3), nn.Dropout(0.1), nn.ReLU(), nn.LocalResponseNorm(5, k=2.0)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


def main() -> None:
    torch.manual_seed(0)
    plain = build().eval()
    fused = fuse(
        copy.deepcopy(plain), fold_batchnorm=True, pairs=[("4.squeeze", "4.squeezed"), ("4.expand", "4.expanded")]
    )
    assert list(fused.state_dict()) == list(plain.state_dict())

    x = torch.randn(4, 3, 64, 64)
    fusion_report(fused, x)
    with torch.inference_mode():
        difference = (fused(x) - plain(x)).abs().max().item()
    print(f"\nlargest difference from the plain net: {difference:.1e}")
    assert difference < 1e-4

    fused.train()(x).sum().backward()  # training is as before, batch normalization included
    assert all(p.grad is not None for p in fused.parameters())


if __name__ == "__main__":
    main()
