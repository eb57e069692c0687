"""Linear layers with int8 weights in place of those of a trained net."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from alexnet_fast import backends, ops
from alexnet_fast.reference.linear_int8 import quantize_weight

M = TypeVar("M", bound=nn.Module)


class Int8Linear(nn.Linear):
    """``linear`` with its weight rounded to int8, for inference; see :mod:`alexnet_fast.ops.linear_int8`.

    ``weight`` is int8 (out_features, in_features), ``scales`` float32 (out_features,), ``bias`` as it was. Gradients
    reach the input and the bias, not the weight.

    Shape: (…, in_features) to (…, out_features).
    """

    def __init__(self, linear: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        weight, scales = quantize_weight(linear.weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        plainly = torch.compiler.is_compiling() and backends.exports_plainly()
        backend = "reference" if plainly else None
        return ops.linear_int8(input, self.weight, self.scales, self.bias, backend=backend)


def weight_only_int8(model: M) -> M:
    """Replaces every ``nn.Linear`` in ``model`` by an :class:`Int8Linear`, and returns ``model``.

    A quarter of float32's bytes, which with one image or a few is the time that such layers take. Subclasses of
    ``nn.Linear`` stay as they are. Keys stay, and ``scales`` come to them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
    return model
