"""A convolution and the ReLU that a custom module calls after it, as one operator.

Both modules stay where they are and are called as before. The convolution computes both, and the ReLU hands on what it
finds to be that result. Everywhere else they are what they were.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from alexnet_fast import _C, ops
from alexnet_fast.nn import fused
from alexnet_fast.nn.runs import Segment

RECTIFIED = "_alexnet_fast_rectified"  # attribute of a paired convolution's result: its version when it was made


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class _Plan:
    """What a convolution and its ReLU run as, and a guard that holds while both are as they were. Small nets call their
    convolutions so often that looking at both modules in every call would cost more than the fusion saves."""

    def __init__(self, convolution: PairedConv2d, relu: nn.ReLU) -> None:
        guard = _C.Guard()
        for entry in fused.EVERYWHERE:
            guard.add(*entry)
        for module, kind in ((convolution, nn.Conv2d), (relu, nn.ReLU)):
            guard.add(fused.Is.attribute, kind, "forward", kind.forward)
            fused.watch(guard, module, kind)
        self.holds = guard.holds
        self.run = Segment([("cr", [convolution, relu])], _computed) if _is_fixed(convolution, relu) else None

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies and pickles of a module make their own


class PairedConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that computes the ReLU behind it too, where :class:`FusedSequential` would fuse the two."""

    _relu: tuple[nn.ReLU]  # in a tuple: it is no child

    def _get_name(self) -> str:
        return "Conv2d"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return super().forward(input)
        y = self._with_relu(input)
        if y is None:
            return super().forward(input)
        setattr(y, RECTIFIED, _version(y))
        return y

    @torch.jit.unused
    def _with_relu(self, input: Any) -> Tensor | None:
        """The rectified result; None where the two have to be called as they are."""
        if type(input) is Tensor and not fused._looked_at():
            plan = self.__dict__.get("_plan")
            if plan is None or not plan.holds():
                if fused._one_by_one():
                    return None
                plan = self.__dict__["_plan"] = _Plan(self, self._relu[0])
            if plan.run is not None:
                return plan.run(input)
        fuses = _are_torchs(self, self._relu[0]) and fused._plain(input) and fused._plain(self.weight)
        return _operator(self, input) if fuses and not fused._one_by_one() else None


class PairedReLU(nn.ReLU):
    """An ``nn.ReLU`` that hands on what its convolution has rectified already."""

    def _get_name(self) -> str:
        return "ReLU"

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return super().forward(input)
        if isinstance(input, Tensor) and input.__dict__.pop(RECTIFIED, -1) == _version(input):
            return input
        return super().forward(input)


def _operator(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    geometry = convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    return ops.conv_relu(x, convolution.weight, convolution.bias, *geometry)


def _computed(_run: str, members: list[nn.Module], x: Tensor, _dtype: object) -> Tensor:
    """What C++ does not carry out, by one operator, or by torch's functions where that would compute something else."""
    convolution = members[0]
    if fused._plain(x) and fused._plain(convolution.weight):
        return _operator(convolution, x)
    return F.relu(nn.Conv2d.forward(convolution, x))


def _is_fixed(convolution: nn.Conv2d, relu: nn.ReLU) -> bool:
    """Whether the guard sees all that the two are made from, and their tensors are ordinary ones."""
    own, parameters = convolution.__dict__, convolution._parameters
    return (
        _are_torchs(convolution, relu)
        and all(fused._immutable(own.get(name)) for name in fused.OPTIONS[nn.Conv2d])
        and type(parameters.get("weight")) is nn.Parameter
        and type(parameters.get("bias")) in (nn.Parameter, type(None))
    )


def _are_torchs(convolution: nn.Conv2d, relu: nn.ReLU) -> bool:
    return _is_torchs(convolution, nn.Conv2d) and _is_torchs(relu, nn.ReLU) and convolution.padding_mode == "zeros"


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
