"""A model of a training step on two devices: bytes exchanged, and the time that they cost.

With P parameters, of which P_conv are the convolutions', a batch of N images, and s bytes an element, each of two
devices sends

    ddp      s · P                                   gradients: of K devices' ring each sends 2(K−1)/K · P
    towers   s · N · (2 · (A3 + A6 + A7) + A8)       activations: A_l is half of layer l's input for one image. The
                                                     gradients are as large, except at fc8, which both devices compute
    hybrid   s · P_conv                              gradients
             s · N · (F + H + C) + 4 · N             activations there and back: F features enter fc6, H leave it, C are
                                                     logits; and labels, eight bytes for each image that the other has

Each device computes half of a step's FLOPs, a third of them forward. With ddp, the gradients of the linear layers are
exchanged during the convolutions' backward pass; no other exchange is hidden. Each exchange costs the link's latency.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alexnet_fast.models import AlexNet

LABEL_BYTES = 8


@dataclass(frozen=True)
class Link:
    """Between two devices: GB/s in each direction, and microseconds until an exchange begins."""

    gb_s: float
    latency_us: float

    def seconds(self, size: int, exchanges: int) -> float:
        return size / (self.gb_s * 1e9) + exchanges * self.latency_us * 1e-6


@dataclass(frozen=True)
class Plan:
    """One way to share a step. Bytes are what each device sends; times are of a step, in seconds."""

    mode: str
    gradients: int
    activations: int
    compute: float
    exchange: float
    exposed: float

    @property
    def step(self) -> float:
        return self.compute + self.exposed


def _sizes(net: AlexNet, image_size: int) -> tuple[int, int]:
    """Elements of one image that enter the third convolution, and that leave the last stage."""
    third = [module for module in net.features if isinstance(module, nn.Conv2d)][2]
    sizes = []
    hook = third.register_forward_pre_hook(lambda _module, given: sizes.append(given[0].numel()))
    try:
        with torch.no_grad():
            image = torch.empty(1, 3, image_size, image_size, device=third.weight.device)
            sizes.append(net.features(image).numel())
    finally:
        hook.remove()
    return sizes[0], sizes[1]


def traffic(net: AlexNet, batch: int, image_size: int, element: int = 4) -> dict[str, dict[str, int]]:
    """Bytes that each of two devices sends in a step, by mode and kind.

    ``batch`` is an even number of images.
    """
    parameters = sum(p.numel() for p in net.parameters())
    convolutional = sum(p.numel() for p in net.features.parameters())
    into_third, features = _sizes(net, image_size)
    fc6, fc7, fc8 = (module for module in net.classifier if isinstance(module, nn.Linear))
    halves = [size // 2 for size in (into_third, features, fc7.in_features)]
    around = features + fc6.out_features + fc8.out_features
    return {
        "ddp": {"gradients": element * parameters, "activations": 0},
        "towers": {"gradients": 0, "activations": element * batch * (2 * sum(halves) + fc8.in_features // 2)},
        "hybrid": {
            "gradients": element * convolutional,
            "activations": element * batch * around + batch * LABEL_BYTES // 2,
        },
    }


# Exchanges one after the other. towers: ahead of conv3, fc6, fc7 and fc8, and three back. hybrid: labels; features,
# fc6's output and logits, the first two of them back; the convolutions' gradients. ddp: its last bucket.
EXCHANGES = {"ddp": 1, "towers": 7, "hybrid": 7}


def plan(variant: str, batch: int, tflop_s: float, link: Link, element: int = 4) -> list[Plan]:
    """The modes' steps for a batch over both devices, each of which sustains ``tflop_s`` TFLOP/s.

    ``towers`` is left out where the variant has no two towers.
    """
    with torch.device("meta"):
        net = AlexNet(variant=variant)
        side = net.variant.image_size
        with FlopCounterMode(display=False) as counter:
            net(torch.empty(1, 3, side, side))
        sent = traffic(net, batch, side, element)
    by_module = counter.get_flop_counts()
    whole = counter.get_total_flops()
    features = sum(by_module[f"{type(net).__name__}.features"].values())
    rate = tflop_s * 1e12
    compute = 3 * whole * batch / 2 / rate  # backward is twice forward
    plans = []
    for mode, sizes in sent.items():
        if mode == "towers" and variant not in ("paper", "alex2012"):
            continue
        total = link.seconds(sum(sizes.values()), EXCHANGES[mode])
        hidden = 0.0
        if mode == "ddp":
            linear = element * sum(p.numel() for p in net.classifier.parameters())
            hidden = min(link.seconds(linear, 0), 2 * features * batch / 2 / rate)
        plans.append(Plan(mode, sizes["gradients"], sizes["activations"], compute, total, total - hidden))
    return plans
