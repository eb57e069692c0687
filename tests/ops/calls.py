"""Which operators a public function reaches, and with what arguments."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .compare import output_gradient, results
from .layouts import relayout
from .samples import Sample


class Calls(TorchDispatchMode):
    """Notes each call of one of our operators and its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "alexnet_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(sample: Sample, layout: str) -> list[tuple]:
    """Operators and arguments of the sample's forward and backward pass."""
    data = {name: relayout(tensor, layout) for name, tensor in sample.data(torch.float32).items()}
    with Calls() as mode:
        results(
            lambda leaves: sample.ours(leaves, "cpu"), data, relayout(output_gradient(sample, torch.float32), layout)
        )
    return mode.calls
