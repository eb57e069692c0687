"""A linear layer in parts that do not see each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupedLinear(nn.Linear):
    """Part i of the outputs depends on part i of the inputs alone, as in a convolution with ``groups``.

    Args:
        in_features, out_features: of all parts together, multiples of ``groups``.
        groups: number of equal parts.

    ``weight`` is (out_features, in_features / groups), ``bias`` (out_features,).

    Shape: (..., in_features) to (..., out_features).

    Raises:
        ValueError: ``groups`` does not divide both.
    """

    def __init__(self, in_features: int, out_features: int, groups: int) -> None:
        if groups < 1 or in_features % groups or out_features % groups:
            raise ValueError(f"groups: expected a divisor of {in_features} and {out_features}, got {groups!r}")
        super().__init__(in_features // groups, out_features)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        inputs, weights = input.chunk(self.groups, -1), self.weight.chunk(self.groups)
        biases = self.bias.chunk(self.groups)
        return torch.cat([F.linear(inputs[i], weights[i], biases[i]) for i in range(self.groups)], -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
