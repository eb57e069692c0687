"""A succession of layers as one call into C++ and one node of autograd's graph.

A :class:`Segment` is a part of a ``FusedSequential`` that may run so. For each form of its input (shape, dtype, device,
with gradients or without, backend) it decides once which of its layers do, by the operators' own checks and choices;
``alexnet_fast::run`` then carries them out, and looks only whether the tensors are still of that form. That the modules
are as they were is for ``alexnet_fast.nn.fused`` to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from alexnet_fast import _C, backends, ops
from alexnet_fast.geometry import Window
from alexnet_fast.nn import packed, second
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import FLOATS
from alexnet_fast.ops.conv_relu import _prepare as prepare_conv_relu
from alexnet_fast.ops.conv_stage import _prepare as prepare_conv_stage
from alexnet_fast.ops.epilogue import plan as plan_windows
from alexnet_fast.ops.lrn import _prepare as prepare_lrn
from alexnet_fast.ops.max_pool import _prepare as prepare_max_pool
from alexnet_fast.ops.registry import LIBRARY, NATIVE, TUNED

MOST_FORMS = 64
MOST_TENSORS = 63  # input and parameters: the bits of `wanted`

# parameters: weight and bias of each layer that has them. wanted: bit 0 for x's gradient, the next for the parameters'.
# held: the number of a _C.Kept, or 0.
# The result, then, with held 0, what run_backward takes as `kept`; nothing at all if the tensors are not of the form
# that the run was planned for.
LIBRARY.define("run(Tensor x, Tensor[] parameters, int number, int wanted, int held) -> Tensor[]")
# weights, kept: as in csrc/bindings/run.cpp. again: there may be a second time. The gradients that are wanted.
LIBRARY.define(
    "run_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor[] kept, int number, int wanted, int held, bool again)"
    " -> Tensor[]"
)
# What is held under a number; like: any tensor of the device.
LIBRARY.define("run_kept(Tensor like, int held) -> Tensor[]")
for _name in ("run", "run_backward", "run_kept"):
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
RUN, RUN_BACKWARD, RUN_KEPT = (getattr(torch.ops.alexnet_fast, _).default for _ in ("run", "run_backward", "run_kept"))


class Layer(NamedTuple):
    """What C++ is told of a layer; ``sides`` as in csrc/bindings/run.cpp."""

    kind: str
    bias: bool = False
    relu: bool = False
    ceil_mode: bool = False
    channels_last: bool = False
    tuned: bool = False
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    lrn_size: int = 0
    lrn_groups: int = 1
    alpha: float = 0.0
    beta: float = 0.0
    k: float = 0.0
    pool_kernel: tuple[int, ...] = (0, 0)
    pool_stride: tuple[int, ...] = (1, 1)
    pool_padding: tuple[int, ...] = (0, 0)
    sides: tuple[int, ...] = ()


class Wanted(NamedTuple):
    """Which gradients a call wants, in the forms that are asked for."""

    bits: int
    places: list[int]  # in the results of Node.backward, for each gradient
    saves_input: bool
    stands: bool  # whether a Stand is kept for the input, whose gradient is wanted
    holds: bool  # whether what is kept may stay in C++: none of it is memory that the caller has
    weights: list[int]  # of the parameters, those that are kept


class Native:
    """The layers that one run carries out, of one form of the input. ``shapes``: the input's, and of each layer's
    output."""

    def __init__(self, layers: list[Layer], shapes: list, parameters: list[Tensor], copies: list, runs: int):
        self.layers, self.parameters, self.copies, self.runs = layers, parameters, copies, runs
        self.shapes = shapes[1:]
        self.run = _C.Run(layers, [shapes[0], *[p.shape for p in parameters]])
        self.number = self.run.number
        self._wanted: dict[tuple, Wanted] = {}

    def __call__(self, x: Tensor, gradients: bool) -> Tensor | None:
        """The output, or None if the tensors are not what they were when this was planned."""
        parameters = self.parameters
        for copy, weight, owner in self.copies:
            if not packed.is_newest(copy, weight, owner):
                return None
        if gradients and (x.requires_grad or True in [p.requires_grad for p in parameters]):
            return apply(self, x, *parameters)
        results = RUN(x, parameters, self.number, 0, 0)
        return results[0] if results else None

    def wanted(self, needs: tuple[bool, ...]) -> Wanted:
        """``needs``: for this object, the input and each parameter, whether its gradient is wanted."""
        known = self._wanted.get(needs)
        if known is None:
            known = self._wanted[needs] = self._want(needs[1:])
        return known

    def _want(self, needs: tuple[bool, ...]) -> Wanted:
        places = [place for place, need in enumerate(needs) if need]
        first, weights, parameter = 0 if needs[0] else None, [], 0
        for i, layer in enumerate(self.layers):
            count = (1 + layer.bias) if layer.kind in ("conv", "linear") else 0
            if first is None and any(needs[1 + parameter : 1 + parameter + count]):
                first = i
            if first is not None and count and (layer.kind == "conv" or i > first or needs[0]):
                weights.append(parameter)
            parameter += count
        bits = sum(1 << place for place in places)
        reads_input = self.layers[0].kind in ("conv", "lrn") or (self.layers[0].kind == "linear" and needs[1])
        last = self.layers[-1]
        returned = last.kind in ("conv", "linear") and last.relu and not last.lrn_size and last.pool_kernel[0] == 0
        saves, holds = first == 0 and reads_input, self.layers[0].kind != "flatten" and not returned
        return Wanted(bits, [1 + place for place in places], saves, needs[0] and not saves, holds, weights)


class Node(Function):
    """A run in autograd's graph."""

    @staticmethod
    def forward(ctx, native: Native, x: Tensor, *parameters: Tensor) -> Tensor | None:
        wanted = native.wanted(ctx.needs_input_grad)
        ctx.held = _C.Kept() if wanted.holds and saving_hooks(True) is None else None
        results = RUN(x, parameters, native.number, wanted.bits, ctx.held.number if ctx.held else 0)
        if not results:
            return None
        ctx.native, ctx.wanted = native, wanted
        if wanted.stands:
            with torch.enable_grad():
                ctx.stand = second.Stand.apply(x)
        results_and_input = [x, *results[1:]] if wanted.saves_input else results[1:]
        ctx.save_for_backward(*[parameters[i] for i in wanted.weights], *results_and_input)
        return results[0]

    @staticmethod
    def backward(ctx, dy: Tensor):
        native, wanted = ctx.native, ctx.wanted
        saved, weights = ctx.saved_tensors, len(wanted.weights)
        x, kept = (saved[weights], weights + 1) if wanted.saves_input else (dy, weights)
        held = ctx.held.number if ctx.held else 0
        if torch.is_grad_enabled():
            needs = ctx.needs_input_grad[1:]
            x = ctx.stand if wanted.stands else x
            tensors = RUN_KEPT(dy, held) if held else saved[kept:]
            found = second.gradients(native.layers, native.shapes, native.parameters, needs, dy, x, tensors)
        else:
            tensors = saved[:weights], saved[kept:]
            found = RUN_BACKWARD(dy, x, *tensors, native.number, wanted.bits, held, keeps_graph())
        gradients: list[Tensor | None] = [None] * (2 + len(native.parameters))
        for place, gradient in zip(wanted.places, found, strict=True):
            gradients[place] = gradient
        return tuple(gradients)


# The hooks, if any, that tensors pass which are saved for backward; whether a backward pass lets another one follow.
saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
# Function.apply, but for what it does under the transforms of torch.func.
apply = super(Function, Node).apply


class Segment:
    """Successive runs of modules, as ``fused.RUNS`` cuts them, of which all that is known before a call is known to
    allow a run in C++."""

    def __init__(self, runs: list[tuple[str, list[nn.Module]]], call: Callable[..., Any]) -> None:
        self.runs, self.call = runs, call
        self.natives: dict[tuple, Native | None] = {}

    def __call__(self, x: Any) -> Any:
        start = 0
        if type(x) is Tensor:
            gradients = torch.is_grad_enabled()
            form = x.shape, x.dtype, x.device, gradients, backends.current(), torch._C._get_mkldnn_enabled()
            try:
                native = self.natives[form]
            except KeyError:
                native = self._plan(form, x)
            if native is not None:
                y = native(x, gradients)
                if y is None:
                    del self.natives[form]
                else:
                    start, x = native.runs, y
                    if start == len(self.runs):
                        return x
        dtype = packed.inference_dtype(x)
        for run, members in self.runs[start:]:
            x = self.call(run, members, x, dtype)
        return x

    def _plan(self, form: tuple, x: Tensor) -> Native | None:
        try:
            native = _native(self.runs, x)
        except (TypeError, ValueError, backends.BackendError):  # which the operators' own functions will raise
            return None
        if len(self.natives) >= MOST_FORMS:
            self.natives.clear()
        self.natives[form] = native
        return native


def _native(runs: list[tuple[str, list[nn.Module]]], x: Tensor) -> Native | None:
    """As many of ``runs``, from the first one on, as C++ carries out as they would be carried out one by one."""
    if x.dtype not in FLOATS or x.layout != torch.strided or x.numel() == 0:
        return None
    inference = packed.inference_dtype(x)
    layers: list[Layer] = []
    parameters: list[Tensor] = []
    copies: list[tuple] = []
    ends: list[tuple[int, int, int]] = [(0, 0, 0)]  # after each run: layers, parameters, copies
    shapes = [x.shape]
    for run, members in runs:
        planned = _layer(run, members, x, shapes[-1], inference)
        if planned is None or 1 + len(parameters) + len(planned[1]) > MOST_TENSORS:
            break
        layers += planned[0]
        parameters += planned[1]
        copies += planned[2]
        shapes.append(planned[3])
        ends.append((len(layers), len(parameters), len(copies)))
    count = len(ends) - 1
    while count and runs[count - 1][0] == "f":  # a view of a tensor that autograd would not know
        count -= 1
    layers, parameters, copies = (
        part[:end] for part, end in zip((layers, parameters, copies), ends[count], strict=True)
    )
    products = [layer.kind.endswith("linear") or layer.kind == "flatten" for layer in layers]
    if all(products) and (torch.is_grad_enabled() or len(products) < 2):
        return None  # torch's own functions are as good
    return Native(layers, shapes[: 1 + len(layers)], parameters, copies, count)


def _layer(run: str, members: list[nn.Module], x: Tensor, shape: torch.Size, inference: torch.dtype | None):
    """Layers, their parameters, packed copies with their weights, and the output's shape; None if there is no such."""
    like = x.new_empty(()).expand(shape)  # for the operators' checks: what comes here, without memory
    first, last = members[0], members[-1]
    if run == "f":
        if len(shape) < 2 or (first.start_dim, first.end_dim) != (1, -1):
            return None
        return [Layer("flatten", sides=tuple(shape[1:]))], [], [], like.flatten(1).shape
    if run == "p" or run == "n":
        if len(shape) != 4:
            return None
        if run == "p":
            return _pool(first, like)
        operator, window = prepare_lrn(like, None, None, *_lrn(first), None)
        if operator is not NATIVE.lrn:
            return None
        return [Layer("lrn", **_lrn_options(window))], [], [], shape
    weight, bias = first._parameters["weight"], first._parameters["bias"]
    tensors = [weight] if bias is None else [weight, bias]
    if any(t.dtype != x.dtype or t.device != x.device or t.layout != torch.strided for t in tensors):
        return None
    if run[0] == "l":
        return _linear(run, first, weight, bias, tensors, like, inference)
    if len(shape) != 4:
        return None
    norm = ops.LRN(*_lrn(members[2])) if "n" in run else None
    pool = ops.Pool(last.kernel_size, last.stride, last.padding, last.ceil_mode) if "p" in run else None
    geometry = first.stride, first.padding, first.dilation, first.groups
    if packed.applies(weight, like, inference) and packed.asked(first):
        copy = packed.stage_copy(members, weight, bias, like, norm, pool)
        if copy is None:
            return None
        *options, channels_last = copy.arguments
        sides = convolution.out_sides(like, weight, *options[:3])
        layer = Layer("packed_conv", bias is not None, True, channels_last=channels_last)
        tensors[0], copies = copy.packed, [(copy, weight, first)]
    else:
        if norm is None and pool is None:
            operator, options = prepare_conv_relu(like, weight, bias, *geometry, None)
            if operator not in (NATIVE.conv_relu, TUNED.conv_relu):
                return None
            tuned = operator is TUNED.conv_relu
            sides = convolution.out_sides(like, weight, *options[:3])
            options = *options, *plan_windows(None, None, weight.shape[0], *sides)[0]
        else:
            operator, options = prepare_conv_stage(like, weight, bias, *geometry, norm, pool, None)
            if operator not in (NATIVE.conv_stage, TUNED.conv_stage):
                return None
            tuned = operator is TUNED.conv_stage
            sides = convolution.out_sides(like, weight, *options[:3])
        layer, copies = Layer("conv", bias is not None, True, tuned=tuned), []
    names = ("stride", "padding", "dilation", "groups", "lrn_size", "alpha", "beta", "k", "lrn_groups")
    names += ("pool_kernel", "pool_stride", "pool_padding", "ceil_mode")
    layer = layer._replace(sides=tuple(sides), **dict(zip(names, options, strict=True)))
    if pool is not None:
        sides = Window(*options[-4:]).out(*sides)
    return [layer], tensors, copies, torch.Size([shape[0], weight.shape[0], *sides])


def _lrn(norm: nn.LocalResponseNorm) -> tuple:
    return norm.size, norm.alpha, norm.beta, norm.k, getattr(norm, "groups", 1)


def _lrn_options(window: ops.LRN) -> dict[str, Any]:
    size, alpha, beta, k, groups = window
    return {"lrn_size": size, "alpha": alpha, "beta": beta, "k": k, "lrn_groups": groups}


def _pool(module: nn.MaxPool2d, like: Tensor):
    options = module.kernel_size, module.stride, module.padding, 1, module.ceil_mode, False
    operator, window = prepare_max_pool(like, None, None, *options, None)
    if operator is not NATIVE.max_pool:
        return None
    options = dict(zip(("pool_kernel", "pool_stride", "pool_padding", "ceil_mode"), window, strict=True))
    layer = Layer("max_pool", sides=tuple(like.shape[2:]), **options)
    return [layer], [], [], torch.Size([*like.shape[:2], *window.out(*like.shape[2:])])


def _linear(
    run: str, module: nn.Linear, weight: Tensor, bias: Tensor | None, tensors: list[Tensor], like: Tensor, inference
):
    if like.dim() != 2 or weight.dim() != 2 or like.shape[1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    relu = "r" in run
    if relu and backends.choose("linear_relu_dropout", like, None) == "triton":
        return None
    kind, copies = "linear", []
    if packed.applies(weight, like, inference):
        if packed.asked(module):
            copy = packed.linear_copy(module, weight)
            kind, tensors[0], copies = "onednn_linear", copy.packed, [(copy, weight, module)]
        elif like.dtype == torch.float32 and like.shape[0] > 1:
            kind = "onednn_linear"
    return [Layer(kind, bias is not None, relu)], tensors, copies, torch.Size([like.shape[0], weight.shape[0]])
