"""A net so small that a call of it is host time, and the work in it that no implementation can leave out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_fast import FusedSequential

CHANNELS, SIDE, CLASSES = 8, 63, 10
# torch's convolutions and matrix products, forward and backward, as they come under autograd.
PRODUCTS = ("convolution", "convolution_backward", "addmm", "mm")


def layers() -> list[nn.Module]:
    """torchvision's AlexNet, of 8 channels, for images of 63x63; without dropout, so that both sides compute the same
    in training."""
    c = CHANNELS
    return [
        *(nn.Conv2d(3, c, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c, c, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True)),
        *(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(c, c), nn.ReLU(inplace=True), nn.Linear(c, c), nn.ReLU(inplace=True), nn.Linear(c, CLASSES)),
    ]


def nets() -> dict[str, nn.Sequential]:
    """Ours and nn.Sequential, with the same weights."""
    made = {"ours": FusedSequential(*layers()), "eager": nn.Sequential(*layers())}
    made["ours"].load_state_dict(made["eager"].state_dict())
    return made


def call_of(net: nn.Module, x: Tensor, training: bool) -> Callable[[], Tensor]:
    """A call of ``net`` in inference, or forward and backward from a gradient of ones; it returns the output.

    There is no loss in it, no optimizer and no ``zero_grad``: these cost the same whatever the net is.
    """
    parameters, dy = list(net.parameters()), torch.ones(len(x), CLASSES, device=x.device)

    def forward_and_backward() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        y = net(x)
        y.backward(dy)
        return y.detach()

    return forward_and_backward if training else torch.inference_mode()(lambda: net(x))


class _Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "aten" and function._opname in PRODUCTS:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def products(net: nn.Module, x: Tensor, training: bool) -> list[tuple]:
    """The convolutions and products of a call of ``net``: (operator, arguments, named arguments). The call tracks
    gradients in any case: under inference_mode a dispatch mode sees conv2d and linear, which call these in turn."""
    with _Products() as mode:
        call_of(net, x, True)() if training else net(x)
    return mode.calls


def bare(calls: list[tuple]) -> Callable[[], None]:
    """``calls`` again, with nothing around them."""

    @torch.inference_mode()
    def again() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return again
