"""The split of 2012: each of two ranks holds one tower, half the channels of every layer but the last.

Convolutions 2, 4 and 5 have two groups, one for each tower, and so have the normalizations. The towers talk where a
layer sees all of the one before: ahead of conv3, fc6, fc7 and fc8 each sends its half of the activations, and behind
conv3, fc6 and fc7 its half of the gradient. fc8 is whole on both, which compute the same from the same. With N images,
float32 and the paper's sizes that is, from either tower,

    N · 4 bytes · (128·13·13 + 128·6·6 + 2048 + 2048)     forward: N = 128 gives 11.1 + 2.4 + 1.0 + 1.0 = 15.5 MB
    N · 4 bytes · (128·13·13 + 128·6·6 + 2048)            backward: 14.5 MB

where data parallelism sends gradients of 244 MB.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from alexnet_fast.nn import GroupedLocalResponseNorm
from alexnet_fast.parallel.collectives import gather_features
from alexnet_fast.parallel.ranks import Ranks
from alexnet_fast.parallel.split import Split

GROUPS = (1, 2, 1, 2, 2)
TALK = 2  # the convolution that both towers' output goes into


def refusal(world: int, groups: Sequence[int], norm_groups: Sequence[int]) -> str:
    """Why a net with these groups in its convolutions and its normalizations cannot be split into towers; or ''."""
    if world != 2:
        return f"towers needs 2 ranks, got {world}"
    if tuple(groups) != GROUPS:
        return f"towers needs convolutions of 1, 2, 1, 2, 2 groups, which has {', '.join(map(str, groups))}"
    if any(groups != 2 for groups in norm_groups):
        return "towers needs LRN within each tower, and its windows cross them"
    return ""


class Tower(nn.Module):
    """One rank's half of an :class:`alexnet_fast.AlexNet`, made from a copy of the whole; parameters keep their names.

    Shape: (N, 3, H, W) to (N, num_classes), the same on both ranks.
    """

    def __init__(self, net: nn.Module, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        net = copy.deepcopy(net)
        self.features, self.avgpool, self.classifier = net.features, net.avgpool, net.classifier
        convs = [at for at, module in enumerate(self.features) if isinstance(module, nn.Conv2d)]
        self.talk = convs[TALK]
        self.linears = [at for at, module in enumerate(self.classifier) if isinstance(module, nn.Linear)]
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                self._halve(module)
                module.out_channels //= 2
                if module.groups == 2:
                    module.groups = 1
                    module.in_channels //= 2
            elif isinstance(module, GroupedLocalResponseNorm):
                module.groups = 1
        for at in self.linears[:-1]:
            self._halve(self.classifier[at])
            self.classifier[at].out_features //= 2

    def _halve(self, module: nn.Conv2d | nn.Linear) -> None:
        for name, parameter in module.named_parameters():
            half = parameter.detach().chunk(2)[self.ranks.rank].clone()
            setattr(module, name, nn.Parameter(half, parameter.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        fc6, fc7, fc8 = self.linears
        x = self.features[: self.talk](x)
        x = self.features[self.talk :](gather_features(x, self.ranks))
        x = gather_features(x, self.ranks)  # before avgpool, which works on each channel alone and can make it larger
        x = torch.flatten(self.avgpool(x), 1)
        x = self.classifier[fc6:fc7](self.classifier[:fc6](x))
        x = self.classifier[fc7:fc8](gather_features(x, self.ranks))
        return self.classifier[fc8:](gather_features(x, self.ranks, partial=False))


class Towers(Split):
    """Both ranks load every image; each computes its tower's share of all layers on it."""

    def _part(self) -> nn.Module:
        self.loads = (0, 1)
        tower = Tower(self.whole, self.ranks)
        self.split_dropouts(tower.classifier)
        whole = self.whole.state_dict()
        self.dims = {name: 0 for name, half in tower.state_dict().items() if half.shape != whole[name].shape}
        return tower

    def train(
        self, images: Tensor, labels: Tensor, counted: int, update: Callable[[], None], mixed: None = None
    ) -> Tensor:
        self.place(torch.arange(len(images)))
        with self.step.context():
            logits = self.net(images).float()
        loss = self.step.criterion(logits, labels)
        (loss / counted).backward()
        update()
        return self.figures(loss, logits, labels) * self.ranks.main
