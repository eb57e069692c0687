"""Dropout that does not depend on how a batch, or a layer, is split over ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchDropout(nn.Dropout):
    """:class:`torch.nn.Dropout` whose mask is drawn for the batch of all ranks. ``seed`` is a number for each layer and
    step, the same on all ranks; each takes the rows and features of the mask that it computes.

    Args:
        p: probability of an element to be zeroed.
        batch: rows of the largest batch.

    ``rows`` says which rows of the batch an input holds, on its device. With ``columns`` = (i, n) an input holds part i
    of n equal parts of the layer's features.

    Shape: (N, features, ...), kept.
    """

    def __init__(self, p: float, batch: int) -> None:
        super().__init__(p)
        self.batch, self.seed = batch, 0
        self.rows = torch.zeros(1, dtype=torch.int64)
        self.columns = (0, 1)
        self.generators: dict[torch.device, torch.Generator] = {}

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        part, parts = self.columns
        features = input.shape[1]
        generator = self.seeded(input.device)
        # The mask is always drawn for the largest batch: a generator may give other numbers when it is asked for fewer.
        kept = input.new_empty((self.batch, parts * features, *input.shape[2:]))
        kept.bernoulli_(1 - self.p, generator=generator)
        mine = kept[:, part * features : (part + 1) * features][self.rows]
        return input * mine.mul_(1 / (1 - self.p) if self.p < 1 else 0)

    def seeded(self, device: torch.device) -> torch.Generator:
        """The layer's generator on ``device``, set to ``seed``. While a CUDA graph is recorded it cannot be set, and
        has to be already."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        generator = self.generators[device]
        if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
            generator.manual_seed(self.seed)
        return generator


def split_dropouts(net: nn.Module, batch: int) -> list[BatchDropout]:
    """Puts :class:`BatchDropout` in the place of each ``nn.Dropout`` of ``net``; returns them in order."""
    made = []
    for module in net.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                made.append(BatchDropout(child.p, batch))
                setattr(module, name, made[-1])
    return made
