"""LPIPS: how different two images look, where they differ, and an image moved towards another by that distance.

python examples/perceptual_distance.py              random weights: nothing is downloaded
python examples/perceptual_distance.py --trained    pip install --no-deps lpips; downloads torchvision's AlexNet
"""

# The file is not called lpips.py: beside it, Python would take it for the package lpips.
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import LPIPS


def picture(side: int) -> Tensor:
    """(1, 3, side, side) in -1 … 1: a disc on a gradient."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, side), torch.linspace(-1, 1, side), indexing="ij")
    disc = (x**2 + y**2 < 0.4).float()
    return torch.stack([disc * 2 - 1, x, y])[None]


def main() -> None:
    torch.manual_seed(0)
    trained = "--trained" in sys.argv[1:]
    weights = {} if trained else {"pnet_rand": True, "pretrained": False}
    loss = LPIPS(net="alex", **weights).requires_grad_(False)  # the images' gradients alone are wanted
    if not trained:
        with torch.no_grad():  # as trained ones are: a difference in a channel adds to the distance, or does not
            for linear in loss.lins:
                linear.weight.abs_()

    # One image against several, as one batch.
    image = picture(64)
    changed = {
        "itself": image,
        "brighter": image + 0.2,
        "noisy": image + 0.2 * torch.randn_like(image),
        "blurred": F.avg_pool2d(image, 5, 1, padding=2, count_include_pad=False),
        "moved by 2 pixels": image.roll(2, dims=3),
    }
    distances = loss(image, torch.cat(list(changed.values()))).flatten().tolist()
    for name, distance in zip(changed, distances, strict=True):
        print(f"{name:20}{distance:.4f}")
    assert distances[0] < 1e-6 < min(distances[1:])

    # Where: with spatial=True a distance for each pixel. Noise in the left half alone shows there.
    where = LPIPS(net="alex", spatial=True, **weights)
    where.load_state_dict(loss.state_dict())
    noisy = image.clone()
    noisy[..., :32] += 0.3 * torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        left, right = where(image, noisy).chunk(2, dim=3)
    print(f"noise on the left: {left.mean():.4f} there, {right.mean():.4f} on the right")
    assert left.mean() > right.mean()

    # As a loss: gradients reach the image.
    moved = changed["noisy"].clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], lr=0.02)
    for step in range(20):
        distance = loss(moved, image).sum()
        if step == 0:
            first = distance.item()
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    print(f"twenty steps towards the image: {first:.4f} to {distance.item():.4f}")
    assert distance.item() < first


if __name__ == "__main__":
    main()
