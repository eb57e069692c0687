"""Linear layers with int8 weights in place of those of a trained net."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.fx
from torch import Tensor, nn

from alexnet_fast.backends import exports_plainly
from alexnet_fast.ops import linear_int8
from alexnet_fast.reference.linear_int8 import quantize_weight

torch.fx.wrap("linear_int8")  # as in norm.py

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
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            x = input.to(self.scales.dtype)
            y = torch.matmul(x, self.weight.to(x.dtype).t()) * self.scales
            return (y if self.bias is None else y + self.bias).to(input.dtype)
        else:  # noqa: RET505  TorchScript leaves out this branch, but nothing that would follow it
            named = "reference" if exports_plainly() else None
            return linear_int8(input, self.weight, self.scales, self.bias, backend=named)

    def float_weight(self) -> Tensor:
        """The weight as what it stands for, in the dtype of ``scales``."""
        return self.weight * self.scales[:, None]


def weight_only_int8(model: M) -> M:
    """Replaces every ``nn.Linear`` in ``model`` by an :class:`Int8Linear`, and returns ``model``.

    A quarter of float32's bytes, which with one image or a few is the time that such layers take. Subclasses of
    ``nn.Linear`` stay as they are. Keys stay, and ``scales`` come to them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if type(model) is nn.Linear:
        raise TypeError("model: expected a module with linear layers in it, got nn.Linear, which Int8Linear takes")
    made: dict[nn.Module, Int8Linear] = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children() has one that stands twice but once
            if type(child) is nn.Linear:
                made[child] = made[child] if child in made else Int8Linear(child)
                setattr(module, name, made[child])
    return model
