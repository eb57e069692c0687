"""A moving average of the weights, a ← d · a + (1 − d) · w, as torchvision's training script keeps with --model-ema."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from alexnet_fast.parallel import Split


class Average:
    """The average of this rank's parameters, those of ``split``. It begins as ``source``, the ``state_dict`` of a whole
    net.

    ``decay`` is d. Only at every ``steps``-th step does :meth:`move` change anything.
    """

    def __init__(self, split: Split, source: dict[str, Tensor], decay: float, steps: int) -> None:
        self.split, self.decay, self.steps = split, decay, steps
        self.tensors = {
            name: torch.empty_like(own.detach()).copy_(split.part(name, source[name]))
            for name, own in split.net.named_parameters()
        }

    @torch.no_grad()
    def move(self, step: int) -> None:
        """Brings the weights in, after ``step`` steps."""
        if step % self.steps == 0:
            for name, own in self.split.net.named_parameters():
                self.tensors[name].lerp_(own, 1 - self.decay)

    def whole(self) -> dict[str, Tensor]:
        """The averages of the whole net. Every rank has to call it."""
        return self.split.joined(self.tensors)

    @contextlib.contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """``model``, a whole net, has the averaged weights within the block."""
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.load_state_dict(self.whole())
        try:
            yield
        finally:
            model.load_state_dict(own)
