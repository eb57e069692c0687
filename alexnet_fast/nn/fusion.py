"""fuse(): which modules of a net may run as one; and the report of what does, and why the rest does not."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_fast import backends
from alexnet_fast.nn import folding, fused, packed, pairing
from alexnet_fast.nn.fused import FusedSequential

M = TypeVar("M", bound=nn.Module)
TRACE = "trace"


def fuse(
    model: M,
    *,
    fold_batchnorm: bool = False,
    pairs: Iterable[tuple[str, str]] | str = (),
    report: bool = False,
) -> M:
    """Makes every ``nn.Sequential`` in ``model``, itself included, a :class:`FusedSequential`; returns ``model``.

    Works in place. Only those objects' class changes: children, parameters, keys, hooks and references to them stay.
    Subclasses of ``nn.Sequential`` are left alone: their ``forward`` may be their own. Calling it twice does no more.

    Args:
        model: the net.
        fold_batchnorm: a BatchNorm2d behind a Conv2d of one Sequential is computed inside it in inference: when the
            normalization is in eval mode, under ``torch.no_grad()`` or ``torch.inference_mode()``. The folded weights
            are copies, made anew when a tensor that they come from changes, but for changes through ``.data``.
        pairs: names of a Conv2d and a ReLU that a module of your own calls one after the other, which then are one
            operator as well: ``[("fire.squeeze", "fire.squeeze_activation")]``. It is for you to know that nothing
            else reads what the convolution returns. ``"trace"`` has torch.fx find all of them, on the path that
            ``forward`` takes now.
        report: print what of the net runs fused (:func:`fusion_report`).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    named = _named(model, pairs)
    for module in model.modules():
        if type(module) is nn.Sequential:
            module.__class__ = FusedSequential
        if fold_batchnorm and type(module) is nn.BatchNorm2d:
            setattr(module, folding.ASKED, True)
    for pair in named:
        pairing.join(model, *pair)
    if report:
        fusion_report(model)
    return model


def _named(model: nn.Module, given: Iterable[tuple[str, str]] | str) -> list[tuple[str, str]]:
    if isinstance(given, str):
        if given != TRACE:
            raise ValueError(f"pairs: expected pairs of names or {TRACE!r}, got {given!r}")
        return pairing.found(model)
    named = []
    for pair in given:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)):
            raise TypeError(f"pairs: expected the names of a Conv2d and a ReLU, got {pair!r}")
        named.append((pair[0], pair[1]))
    return named


# ---- The report ----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A module of :func:`fusion_report`."""

    name: str
    module: str  # its class
    runs_as: str  # an operator of this package, "nothing", or "itself"
    why: str


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "alexnet_fast":
            self.seen.append(function._opname)
        return function(*args, **(kwargs or {}))


STAGES = {"c": "conv_relu", "n": "local_response_norm", "p": "max_pool2d", "l": "linear"}


def fusion_report(model: nn.Module, x: Any = None) -> list[Row]:
    """Prints, module by module, what of ``model`` runs as which operator, and why the rest runs as itself.

    Args:
        model: a net, after :func:`fuse`.
        x: its input. With it the net is called once, without gradients, and what is said is what ran; without it,
            what is planned for dense floating-point tensors.

    Returns:
        The rows, one for each module without children.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if x is not None:
        model = copy.deepcopy(model)  # running means and hooks of the net itself see nothing
    names = {module: name for name, module in model.named_modules()}
    rows = {module: _alone(module) for module in names if not [*module.children()]}
    for module in names:
        if type(module) is FusedSequential:
            rows.update(_planned(module, names))
    if x is not None:
        rows.update(_seen(model, x, rows))
    table = [Row(names[module], module._get_name(), *rows[module]) for module in names if module in rows]
    _print(table)
    return table


def _print(table: list[Row]) -> None:
    heads = Row("name", "module", "runs as", "why")
    widths = [max(len(row[i]) for row in [heads, *table]) for i in range(3)]
    for row in [heads, *table]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row.why]).rstrip())


def _alone(module: nn.Module) -> tuple[str, str]:
    """Of a module that no FusedSequential calls."""
    if type(module) is pairing.PairedConv2d:
        return "conv_relu", "paired with its ReLU"
    if type(module) is pairing.PairedReLU:
        return "nothing", "its convolution has computed it"
    if type(module) is nn.Conv2d:
        return "itself", "a module's own forward calls it; fuse(model, pairs=...) can name it and its ReLU"
    return "itself", _called(module) or "a module's own forward calls it"


def _planned(sequence: FusedSequential, names: dict[nn.Module, str]) -> dict[nn.Module, tuple[str, str]]:
    rows: dict[nn.Module, tuple[str, str]] = {}
    modules = [*sequence]
    found = fused.runs(modules)
    for module in modules:
        rows[module] = "nothing", "it does nothing in inference" if isinstance(module, nn.Identity) else "in eval mode"
    for i, (run, members) in enumerate(found):
        after = found[i + 1][1][0] if i + 1 < len(found) else None
        if len(members) == 1:
            rows[members[0]] = _single(run, members[0], after)
            continue
        what = (
            "linear" if run[0] == "l" else "conv2d" if run == "cb" else "conv_relu" if run[-1] == "r" else "conv_stage"
        )
        for module in members:
            others = ", ".join(names[other] for other in members if other is not module)
            rows[module] = what, f"with {others}"
    return {module: row for module, row in rows.items() if not [*module.children()]}


def _seen(model: nn.Module, x: Any, planned: dict[nn.Module, tuple[str, str]]) -> dict[nn.Module, tuple[str, str]]:
    """What of the successions is this package's operators with this input."""
    rows: dict[nn.Module, tuple[str, str]] = {}

    def look(sequence: FusedSequential, inputs: tuple) -> None:
        y = inputs[0].clone() if isinstance(inputs[0], Tensor) else inputs[0]
        if fused._one_by_one():
            rows.update(dict.fromkeys(sequence, ("itself", "all modules are called: see FusedSequential")))
            return
        for run, members in fused.runs([*sequence]):
            with _Operators() as operators:
                y = fused._call(run, members, y, packed.inference_dtype(y))
            for module in members:
                runs_as, why = planned.get(module, ("itself", ""))
                if operators.seen:
                    rows[module] = ", ".join(operators.seen), why
                elif runs_as != "itself":
                    rows[module] = "torch's own", f"of this input, on backend {backends.current()}"

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if type(m) is FusedSequential]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: row for module, row in rows.items() if module in planned}


def _single(run: str, module: nn.Module, after: nn.Module | None) -> tuple[str, str]:
    cls = type(module)
    if run in "np":
        return STAGES[run], ""
    if reason := _called(module):
        return "itself", reason
    if run == "c":
        return "itself", "no ReLU behind it" if after is None else f"a {type(after).__name__} behind it, no ReLU"
    if run == "l":
        return "linear", "by oneDNN in inference on CPUs"
    return "itself", "no convolution before it" if run in "rb" else f"no operator is for {cls.__name__}"


def _called(module: nn.Module) -> str:
    """Why a module has to be called as it is; '' if its kind is one that is fused."""
    cls, own = type(module), module.__dict__
    if cls not in fused.KINDS:
        base = next((kind for kind in cls.__mro__[1:] if kind in fused.KINDS), None)
        return f"a subclass of {base.__name__}" if base else f"no operator is for {cls.__name__}"
    if fused.hooked(module):
        return "its forward is replaced" if "forward" in own else "it has hooks"
    if cls.forward is not fused.FORWARDS[cls]:
        return f"{cls.__name__}.forward is replaced"
    if own.get("padding_mode", "zeros") != "zeros":
        return f"padding_mode={own['padding_mode']!r}"
    if own.get("return_indices"):
        return "return_indices=True"
    if cls is nn.MaxPool2d and own["dilation"] not in (1, (1, 1)):
        return f"dilation={own['dilation']}"
    if cls is nn.BatchNorm2d and not own.get(folding.ASKED):
        return "fuse(model, fold_batchnorm=True) folds it in inference, behind a convolution"
    return ""
