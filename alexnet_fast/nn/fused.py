"""``nn.Sequential`` whose runs of layers (convolution, ReLU, LRN, max-pooling; linear, ReLU, dropout) are fused.

The modules stay where they are: keys, slices, freezing and hooks are those of ``nn.Sequential``. What runs as one
operator depends on what each module is at that moment: its type, hooks and options. It is decided once and kept with a
guard (csrc/bindings/guard.cpp) that says, in each call, whether any of that has changed. Successions of fused layers
then are one call into C++ (:mod:`alexnet_fast.nn.runs`); layer by layer they are called wherever somebody may look at
them: under modes, transforms and autocast, while a graph is traced, and with hooks.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
import torch.onnx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.jit import is_scripting
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from alexnet_fast import _C, backends, ops
from alexnet_fast.nn import folding, packed
from alexnet_fast.nn.norm import GroupedLocalResponseNorm
from alexnet_fast.nn.replays import Replays
from alexnet_fast.nn.runs import Segment
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import FLOATS
from alexnet_fast.ops.linear_relu import own_kernel

# A subclass may compute something else (parametrized, quantized, sharded and lazy modules are subclasses too), so the
# type has to be exactly one of these. The letter stands for the module in RUNS.
KINDS: dict[type, str] = {
    nn.Conv2d: "c",
    nn.Linear: "l",
    nn.ReLU: "r",
    nn.LocalResponseNorm: "n",
    GroupedLocalResponseNorm: "n",
    nn.MaxPool2d: "p",
    nn.AdaptiveAvgPool2d: "a",
    nn.Dropout: "d",
    nn.Flatten: "f",
    nn.BatchNorm2d: "b",
    nn.Identity: "i",
}
# Like nn.Dropout they do nothing in inference, and never are part of a run.
KINDS |= dict.fromkeys((nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout), "o")
RUNS = re.compile("cb?rn?p?|cb|lrd?|.")
ALONE = frozenset("lnp")  # what is more than a call of the module when nothing goes with it


def _kind(module: nn.Module) -> str:
    """The module's letter, or '.' for one that has to be called: of another type, hooked, or beyond the operators."""
    cls = type(module)
    kind = KINDS.get(cls)
    if kind is None:
        return "."
    own = module.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own  # replaced on the instance, as accelerate does to move weights in
        or cls.forward is not FORWARDS[cls]  # on the class
    ):
        return "."
    if kind == "c" and own["padding_mode"] != "zeros":
        return "."
    if kind == "p" and (own["return_indices"] or own["dilation"] not in (1, (1, 1))):
        return "."
    if kind == "b" and not own.get(folding.ASKED):
        return "."
    return kind


HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or a ``forward`` of its own; :func:`_kind` asks the same in fewer calls."""
    own = module.__dict__
    return "forward" in own or any(own[name] for name in HOOKS)


def runs(modules: list[nn.Module]) -> list[tuple[str, list[nn.Module]]]:
    """The successions that run as one, each with its letters. What does nothing is left out."""
    kinds = [_kind(module) for module in modules]
    if "i" in kinds or "d" in kinds or "o" in kinds:
        pairs = zip(kinds, modules, strict=True)
        kept = [(kind, m) for kind, m in pairs if kind != "i" and (kind not in "do" or m.training)]
        kinds, modules = [kind for kind, _ in kept], [m for _, m in kept]
    found, start = [], 0
    for run in RUNS.findall("".join(kinds)):
        end = start + len(run)
        found += ((run, modules[start:end]),)
        start = end
    return found


# What modules do is theirs to change: by class, by function, by method. A run is fused while all of it is torch's own.
FORWARDS = {kind: kind.forward for kind in KINDS}
GLOBAL_HOOKS = "forward", "forward_pre", "backward", "backward_pre"
CALL, CONV_FORWARD = nn.Module.__call__, nn.Conv2d._conv_forward
FUNCTIONS = F.conv2d, F.relu, F.max_pool2d, F.local_response_norm, F.linear, F.dropout, F.adaptive_avg_pool2d


def _one_by_one() -> bool:
    """Whether each module has to be called: hooks for all modules are set (FLOP counters, module trackers), functions
    are replaced or watched, or a graph is traced and torch's own names are expected in it."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
        or forward_ad._current_level >= 0  # the operators have no rules for forward mode
    ):
        return True
    if torch.compiler.is_compiling():  # it has modes and functions of its own
        return backends.exports_plainly()
    functions = F.conv2d, F.relu, F.max_pool2d, F.local_response_norm, F.linear, F.dropout, F.adaptive_avg_pool2d
    return (
        torch._C._is_tracing()
        or functions != FUNCTIONS
        or nn.Module.__call__ is not CALL
        or nn.Conv2d._conv_forward is not CONV_FORWARD
        or (torch._C._len_torch_function_stack() > 0 and _watched())
    )


def _watched() -> bool:
    """Whether a TorchFunctionMode is active that may look at functions; default devices only place what is new."""
    return any(not isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _plain(x: object) -> bool:
    """A dense floating-point tensor, not a wrapper such as DTensor, and not the proxy of torch.fx."""
    return (
        isinstance(x, Tensor)
        and x.dtype in FLOATS
        and x.layout == torch.strided
        and not hasattr(x, "__tensor_flatten__")
    )


def _lrn(norm: nn.LocalResponseNorm) -> ops.LRN:
    return ops.LRN(norm.size, norm.alpha, norm.beta, norm.k, getattr(norm, "groups", 1))


def _call(run: str, members: list[nn.Module], x: Any, inference_dtype: torch.dtype | None) -> Any:
    """``x`` through the modules of a run: by one operator, or one by one where that would compute something else."""
    first, last = members[0], members[-1]
    if "b" in run[1:] and not folding.applies(first, members[1], x):
        for kind, module in zip(run, members, strict=True):
            x = _call(kind, [module], x, inference_dtype)
        return x
    if inference_dtype is not None and run[0] in "cl" and "b" not in run:
        y = packed.again(run, members, x, inference_dtype)
        if y is not None:
            return last(y) if run == "lrd" and last.training else y
    if (len(run) > 1 or run in ALONE) and _plain(x):
        if run == "n":
            *parameters, groups = _lrn(first)
            return ops.local_response_norm(x, *parameters, groups=groups)
        if run == "p":
            return ops.max_pool2d(x, first.kernel_size, first.stride, first.padding, ceil_mode=first.ceil_mode)
        own = first.__dict__["_parameters"]  # where Module.__getattr__ would find them, after a while
        usual = "weight" in own and "bias" in own
        weight, bias = (own["weight"], own["bias"]) if usual else (first.weight, first.bias)
        if run[0] == "l":
            if x.dim() == 2 and packed.applies(weight, x, inference_dtype):
                y = packed.linear(first, weight, bias, x, "r" in run)
                if y is not None:
                    return last(y) if run == "lrd" and last.training else y
            if run != "lrd" and _plain(weight) and own_kernel(x):
                return ops.linear_relu(x, weight, bias, "r" in run)
            fusable = run != "l" and _plain(weight) and x.dim() <= 2
            if fusable and backends.choose("linear_relu_dropout", x, None) == "triton":
                p, training = (last.p, last.training) if "d" in run else (0.0, False)
                return ops.linear_relu_dropout(x, weight, bias, p, training)
        # Of an unbatched image nn.LocalResponseNorm takes dimension 1, the height, for channels.
        elif _plain(weight) and (x.dim() == 4 or "n" not in run):
            lrn = _lrn(members[run.index("n")]) if "n" in run else None
            pool = ops.Pool(last.kernel_size, last.stride, last.padding, last.ceil_mode) if "p" in run else None
            if "b" in run:
                weight, bias = folding.parameters(first, members[1])
                members = [first, *members[2:]]
            geometry = first.stride, first.padding, first.dilation, first.groups
            if folded := convolution.is_folded(x, weight, *geometry):
                weight, geometry = convolution.fold_weight(weight, first.stride), convolution.STRIDE_1
            if len(members) == 1:
                return F.conv2d(x, weight, bias, *geometry)
            if not folded and x.dim() == 4 and packed.applies(weight, x, inference_dtype):
                y = packed.stage(members, weight, bias, x, lrn, pool)
                if y is not None:
                    return y
            return ops.conv_stage(x, weight, bias, *geometry, lrn=lrn, pool=pool)
    for module in members:
        x = module(x)
    return x


def input_fold(layers: FusedSequential) -> ops.SpaceToDepth | None:
    """The fold of images (``ops.augment(fold=…)``) that ``layers`` takes as well as plain ones: a first convolution
    with a stride, over three channels, with a ReLU behind it. None: there is no such."""
    run, members = (runs(list(layers)) or [("", [])])[0]
    if run[:1] != "c" or len(run) == 1:
        return None
    first = members[0]
    plain = type(first.stride) is type(first.padding) is tuple and (first.dilation, first.groups) == ((1, 1), 1)
    if first.in_channels != 3 or first.stride == (1, 1) or not plain:
        return None
    return ops.SpaceToDepth(first.kernel_size, first.stride, first.padding)


def pools_nothing(module: nn.Module, x: object) -> bool:
    """Whether ``module`` is adaptive average-pooling, in no way changed, that would hand on each pixel of ``x``.

    Not in a graph that is traced: it would hold for images of that size alone. ONNX's tracing exporter knows no others,
    and cannot tell the size behind padding.
    """
    return (
        not torch.compiler.is_compiling()
        and type(module) is nn.AdaptiveAvgPool2d
        and _kind(module) == "a"
        and isinstance(x, Tensor)
        and x.shape[-2:] == module.output_size
        and (not _one_by_one() or torch.onnx.is_in_onnx_export())
    )


# ---- What is kept from one call to the next --------------------------------------------------------------------------


def _looked_at() -> int:
    """Whether this thread is in a state in which operators are seen one by one, or computed otherwise."""
    return dispatch_modes() or function_modes() or autocasts() or transforms() or traces()


dispatch_modes, function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
autocasts, transforms = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active
traces = torch._C._is_tracing
LOOKS = [dispatch_modes, function_modes, autocasts, transforms, traces]
Is = _C.Is
# What _one_by_one() and _kind() read that is not a module's.
EVERYWHERE = [
    *((Is.empty, vars(torch_module), f"_global_{name}_hooks", None) for name in GLOBAL_HOOKS),
    (Is.object, vars(forward_ad), "_current_level", -1),
    (Is.object, vars(torch.compiler), "_is_compiling_flag", False),
    *((Is.object, vars(F), function.__name__, function) for function in FUNCTIONS),
    (Is.attribute, nn.Module, "__call__", CALL),
    (Is.attribute, nn.Conv2d, "_conv_forward", CONV_FORWARD),
]
# What _kind() and _call() read of a module's own dictionary.
OPTIONS = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    GroupedLocalResponseNorm: ("size", "alpha", "beta", "k", "groups"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.BatchNorm2d: (folding.ASKED,),
    nn.AdaptiveAvgPool2d: ("output_size",),
    **{cls: ("training",) for cls, kind in KINDS.items() if kind in "do"},
}


def watch(guard: _C.Guard, module: nn.Module, kind: type) -> None:
    """Adds to ``guard`` what :func:`_kind` and :func:`_call` read of ``module``, which computes what ``kind`` does."""
    guard.add(Is.type, module, None, type(module))
    if kind in KINDS:  # others are called, whatever they are
        _watch_inside(guard, module, kind)


def _watch_inside(guard: _C.Guard, module: nn.Module, kind: type) -> None:
    own = module.__dict__
    for name in HOOKS:
        guard.add(Is.filled if own[name] else Is.empty, own, name)
    for name in ("forward", *OPTIONS.get(kind, ())):
        if name in own:
            guard.add(Is.object, own, name, own[name])
        else:
            guard.add(Is.absent, own, name)
    if kind in (nn.Conv2d, nn.Linear):
        parameters = own["_parameters"]
        guard.add(Is.object, own, "_parameters", parameters)
        for name in ("weight", "bias"):
            if name in parameters:
                guard.add(Is.object, parameters, name, parameters[name])
            else:
                guard.add(Is.absent, parameters, name)
        if not packed.asked(module):
            guard.add(Is.absent, packed._copies, id(module))


def _immutable(value: object) -> bool:
    """A value that stays as it is while it is the same object; a list or a tensor does not."""
    if type(value) is tuple:
        return all(_immutable(v) for v in value)
    return value is None or type(value) in (int, float, bool, str)


class Plan:
    """What a FusedSequential does, and a guard that holds while it is what it should do."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules, self.guard = modules, _C.Guard(LOOKS)
        self.holds = self.guard.holds
        members = tuple(modules.values())
        self.guard.add(Is.values, modules, None, members)
        for entry in EVERYWHERE:
            self.guard.add(*entry)
        for cls in {type(module) for module in members} & KINDS.keys():
            self.guard.add(Is.attribute, cls, "forward", cls.forward)
        for module in members:
            watch(self.guard, module, type(module))
        self.parts: list[Segment | tuple[str, list[nn.Module]]] = []
        for run, part in runs(list(members)):
            fixed = self._is_fixed(run, part)
            if run == "lrd" and fixed:
                self._append("lr", part[:2], True)
                self._append("d", part[2:], False)
            else:
                self._append(run, part, fixed)
        only = self.parts[0] if len(self.parts) == 1 else None
        self.carry_out = only if type(only) is Segment else self._one_after_another
        if type(only) is Segment and any(packed.asked(module) for module in members):
            self.carry_out = Replays(only, [parameter for module in members for parameter in module.parameters()])

    @staticmethod
    def _is_fixed(run: str, members: list[nn.Module]) -> bool:
        """Whether the guard sees all that a run is made from, and its tensors are ordinary ones."""
        if run[0] not in "clfnp" or run == "c" or "b" in run:
            return False
        if not all(_immutable(m.__dict__.get(name)) for m in members for name in OPTIONS.get(type(m), ())):
            return False
        if run[0] in "cl":
            parameters = members[0].__dict__["_parameters"]
            weight, bias = parameters.get("weight"), parameters.get("bias")
            return (
                "bias" in parameters and type(weight) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)
            )
        return True

    def _append(self, run: str, members: list[nn.Module], fixed: bool) -> None:
        if not fixed:
            self.parts.append((run, members))
        elif self.parts and isinstance(self.parts[-1], Segment):
            self.parts[-1].runs.append((run, members))
        else:
            self.parts.append(Segment([(run, members)], _call))

    def _one_after_another(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x) if type(part) is Segment else _call(*part, x, packed.inference_dtype(x))
        return x

    def __reduce__(self) -> tuple:
        return type(None), ()  # copies and pickles of a module make their own


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` that runs these successions of its modules as one operator each::

        Conv2d, ReLU [, LocalResponseNorm] [, MaxPool2d]     ops.conv_stage
        LocalResponseNorm                                    ops.local_response_norm
        MaxPool2d                                            ops.max_pool2d
        Identity; any Dropout in inference                   nothing, also between the members of a run
        Conv2d, BatchNorm2d, …                               as without it, if fuse() was asked to fold it
        Linear [, ReLU]                                      ops.linear_relu, of up to 8 rows on a GPU
        Linear, ReLU [, Dropout]                             ops.linear_relu_dropout, on the triton backend alone
        Linear [, ReLU [, Dropout]]                          oneDNN's product, in inference on CPUs

    All others are called as they are, and so is, alone, each module that

    - has a hook of any kind (its neighbours then see and give true values), or any module while global hooks are set;
    - is of a subclass, so parametrized, pruned, quantized and sharded modules; or whose ``forward`` was replaced;
    - has an option that no operator has: ``padding_mode`` other than zeros, ``return_indices``, a dilated window.

    A first convolution with a stride also takes images that :func:`alexnet_fast.ops.augment` has folded for it, which
    it knows by their channels: the layers compute of them what they compute of plain images, within rounding. Where
    modules are called one by one, there it is an error.

    A run whose input or weight is no dense floating-point tensor (integers, DTensor, torch.fx proxies) is called module
    by module as well, and so are all modules under forward-mode differentiation, and where a graph leaves for other
    tools: torch.jit.trace, export to ONNX, and, unless a backend is named, torch.export.

    Results, gradients, and gradients of gradients are those of ``nn.Sequential`` within rounding, but for the random
    numbers of fused dropout, which are as repeatable and others. With ``create_graph=True`` torch's operators compute
    the gradients.

    Which backend runs is chosen as for the operators (:mod:`alexnet_fast.backends`). Slices are FusedSequential too.
    Several threads may call one net, and on several streams: what is planned holds no memory of a call, but for nets
    that were packed for CUDA, which keep some for each stream and let one call after the other in.
    """

    def _get_name(self) -> str:
        return "Sequential"  # a net's repr stays as it was; fusion_report() says what is fused

    def forward(self, input):  # unannotated, as torch.jit.script wants a Sequential's
        if is_scripting():
            for module in self:
                input = module(input)
            return input
        else:  # noqa: RET505  TorchScript leaves out this branch, but nothing that would follow it
            return self._fused(input)

    @torch.jit.unused
    def _fused(self, input: Any) -> Any:
        if is_dynamo_compiling():
            return self._as_it_is(input)
        plan = self.__dict__.get("_plan")
        if plan is None or plan.modules is not self._modules or not plan.holds():
            if torch.compiler.is_compiling() or _looked_at():
                return self._as_it_is(input)
            if _one_by_one():
                return super().forward(input)
            plan = self.__dict__["_plan"] = Plan(self._modules)
        return plan.carry_out(input)

    def _as_it_is(self, input: Any) -> Any:
        """By what the modules are now, one operator at a time."""
        if _one_by_one():
            for module in self._modules.values():
                one_node = torch.onnx.is_in_onnx_export() and _kind(module) == "n"
                input = _call("n", [module], input, None) if one_node else module(input)
            return input
        dtype = packed.inference_dtype(input)
        for run, members in runs(list(self._modules.values())):
            input = _call(run, members, input, dtype)
        return input


# ---- A net that is one recording -------------------------------------------------------------------------------------

SEQUENTIAL_FORWARD = FusedSequential.forward


class Whole:
    """What a packed net computes, by two FusedSequentials with average-pooling between them, as one recording.

    ``modules``: the net's own dictionary; ``names``: of the three in it.
    """

    def __init__(self, modules: dict[str, nn.Module], *names: str) -> None:
        self.modules, self.names = modules, names
        self.guard: _C.Guard | None = None
        self.plans: list[tuple[FusedSequential, Plan]] = []
        self.replays: Replays | None = None

    def __call__(self, x: Any) -> Any:
        """The net's output, or None where it has to be called part by part."""
        if self.guard is None or not self._holds():
            if torch.compiler.is_compiling() or _looked_at() or _one_by_one():
                return None
            self._plan()
        return None if self.replays is None else self.replays(x)

    def _holds(self) -> bool:
        return self.guard.holds() and all(
            part.__dict__.get("_plan") is plan and plan.modules is part._modules and plan.holds()
            for part, plan in self.plans
        )

    def _plan(self) -> None:
        members = [self.modules[name] for name in self.names]
        features, pooling, classifier = members
        self.guard, self.plans, self.replays = _C.Guard(LOOKS), [], None
        for entry in EVERYWHERE:
            self.guard.add(*entry)
        self.guard.add(Is.attribute, FusedSequential, "forward", FusedSequential.forward)
        self.guard.add(Is.attribute, nn.AdaptiveAvgPool2d, "forward", nn.AdaptiveAvgPool2d.forward)
        for name, module in zip(self.names, members, strict=True):
            self.guard.add(Is.object, self.modules, name, module)
            self.guard.add(Is.type, module, None, type(module))
        if (
            [type(module) for module in members] != [FusedSequential, nn.AdaptiveAvgPool2d, FusedSequential]
            or FusedSequential.forward is not SEQUENTIAL_FORWARD
            or not _immutable(pooling.output_size)
        ):
            return
        for module in members:
            _watch_inside(self.guard, module, type(module))
        if _kind(pooling) != "a" or hooked(features) or hooked(classifier):
            return
        for part in (features, classifier):
            plan = part.__dict__["_plan"] = Plan(part._modules)
            self.plans.append((part, plan))
        if all(type(plan.carry_out) is Replays for _, plan in self.plans):
            first, second = (plan.parts[0] for _, plan in self.plans)

            def run(x: Tensor) -> Tensor:
                x = first(x)
                if not pools_nothing(pooling, x):
                    x = pooling(x)
                return second(torch.flatten(x, 1))

            self.replays = Replays(run, [parameter for module in members for parameter in module.parameters()])

    def __reduce__(self) -> tuple:
        return type(None), ()  # a copy of a net is not packed
