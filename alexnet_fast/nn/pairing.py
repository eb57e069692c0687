"""A convolution and the ReLU that a custom module calls after it, as one operator.

Both modules stay where they are and are called as before. The convolution computes both, and the ReLU hands on what it
finds to be that result. Everywhere else they are what they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.weak import WeakTensorKeyDictionary

from alexnet_fast import ops
from alexnet_fast.nn import fused

_rectified = WeakTensorKeyDictionary()  # results of paired convolutions: the version that each had then


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class PairedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that computes the ReLU behind it too, where :class:`FusedSequential` would fuse the two."""

    _relu: tuple[nn.ReLU]  # in a tuple: it is no child

    def _get_name(self) -> str:
        return "Conv2d"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling() or not self._fuses(input):
            return super().forward(input)
        geometry = self.stride, self.padding, self.dilation, self.groups
        y = ops.conv_relu(input, self.weight, self.bias, *geometry)
        _rectified[y] = _version(y)
        return y

    @torch.jit.unused
    def _fuses(self, input: Any) -> bool:
        return (
            _is_torchs(self, nn.Conv2d)
            and _is_torchs(self._relu[0], nn.ReLU)
            and self.padding_mode == "zeros"
            and not fused._one_by_one()
            and fused._plain(input)
            and fused._plain(self.weight)
        )


class PairedReLU(nn.ReLU):
    """An ``nn.ReLU`` that hands on what its convolution has rectified already."""

    def _get_name(self) -> str:
        return "ReLU"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return super().forward(input)
        if isinstance(input, Tensor) and _rectified.pop(input, -1) == _version(input):
            return input
        return super().forward(input)


def _is_torchs(module: nn.Module, kind: type[nn.Module]) -> bool:
    return not fused.hooked(module) and kind.forward is fused.FORWARDS[kind]


def found(model: nn.Module) -> list[tuple[str, str]]:
    """Names of the convolutions in ``model`` whose result is read by a ReLU module and by nothing else, each called
    once, with that ReLU; as torch.fx finds them, for the path that ``forward`` takes now.

    Raises:
        ValueError: torch.fx cannot trace ``model``.
    """
    try:
        graph = fx.symbolic_trace(model).graph
    except Exception as error:  # whatever the model's own code makes of proxies
        raise ValueError(f"pairs: torch.fx cannot trace {type(model).__name__}: {error}") from error
    modules = dict(model.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    pairs = []
    for node in graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) is nn.Conv2d and calls.count(node.target) == 1:
            (reader, *others) = node.users or [None]
            if (
                reader is not None
                and not others
                and reader.op == "call_module"
                and type(modules[reader.target]) is nn.ReLU
            ):
                pairs.append((str(node.target), str(reader.target)))
    return pairs


def join(model: nn.Module, convolution: str, relu: str) -> None:
    """Pairs the two modules of these names, unless a FusedSequential has them side by side.

    Raises:
        ValueError: there is no such module, or it is of another class.
    """
    members = []
    for name, kinds in ((convolution, (nn.Conv2d, PairedConv2d)), (relu, (nn.ReLU, PairedReLU))):
        try:
            module = model.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"pairs: {name!r} is no module of {type(model).__name__}") from error
        if type(module) not in kinds:
            raise ValueError(f"pairs: {name!r} is a {type(module).__name__}, expected {kinds[0].__name__}")
        members.append(module)
    parent = model.get_submodule(convolution.rpartition(".")[0])
    if type(parent) is fused.FusedSequential and members in [part[:2] for _, part in fused.runs([*parent])]:
        return
    members[0].__class__, members[1].__class__ = PairedConv2d, PairedReLU
    members[0]._relu = (members[1],)
