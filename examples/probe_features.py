"""What layers of a net know: nearest neighbours and a linear probe on their features of handwritten digits.

A layer's features are good where simple rules read the answer off them. The neighbours' rule is to say what the nearest
training image is, by the cosine between features; the probe is one linear layer, by ridge regression on the classes'
indicators::

    W = (XᵀX + λ·I)⁻¹ XᵀY = Xᵀ (XXᵀ + λ·I)⁻¹ Y

python examples/probe_features.py [RUN/checkpoints/best]

RUN is a folder of `alexnet-fast train digits`. Without one it is the net that training starts from: what comes from its
layers' shape alone.
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import interpolate, normalize, one_hot

from alexnet_fast import alexnet, features
from alexnet_fast.train.model import kaiming

LAYERS = "pool1", "pool2", "relu5", "relu6", "relu7"
TRAINED, HELD_OUT = 300, 100


def digits() -> tuple[Tensor, Tensor]:
    """Images (n, 3, 64, 64) in -1 … 1, as the runs of `alexnet-fast train digits` see them, and labels (n,)."""
    images, labels = (torch.from_numpy(part[: TRAINED + HELD_OUT]) for part in load_digits(return_X_y=True))
    grey = interpolate(images.view(-1, 1, 8, 8).float() / 16, (64, 64), mode="bilinear")
    return grey.expand(-1, 3, -1, -1) * 2 - 1, labels


def neighbours(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The label of the nearest of ``known`` for each of ``asked``."""
    return labels[(normalize(asked) @ normalize(known).T).argmax(1)]


def probe(known: Tensor, labels: Tensor, asked: Tensor, ridge: float = 1e-2) -> Tensor:
    """What a linear layer that was fitted to ``known`` says of ``asked``."""
    mean = known.mean(0)
    known, asked = (known - mean).double(), (asked - mean).double()
    products = known @ known.T
    products += ridge * products.diagonal().mean() * torch.eye(len(known))
    weight = known.T @ torch.linalg.solve(products, one_hot(labels).double() - 0.1)
    return (asked @ weight).argmax(1)


def main(weights: str | None = None) -> None:
    torch.manual_seed(0)
    net = alexnet(weights=weights, num_classes=10)
    if weights is None:
        kaiming(net)
    images, labels = digits()
    extract = features(net.eval(), LAYERS)
    with torch.inference_mode():
        parts = [extract(part) for part in images.split(100)]
    print(f"{'layer':8}{'features':>10}{'neighbours':>12}{'probe':>8}   of {HELD_OUT} held-out digits")
    for layer in LAYERS:
        seen = torch.cat([part[layer].flatten(1) for part in parts])
        right = [
            (rule(seen[:TRAINED], labels[:TRAINED], seen[TRAINED:]) == labels[TRAINED:]).float().mean().item()
            for rule in (neighbours, probe)
        ]
        print(f"{layer:8}{seen.shape[1]:10}{right[0]:12.1%}{right[1]:8.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
