"""Layers as one call into C++ and one node of autograd's graph: a public function's one, or a succession of them.

``alexnet_fast::run`` carries out what was planned for one form of the input, and looks only whether the tensors are
still of that form; ``alexnet_fast::run_backward`` is its gradient. In the dispatcher's eyes a call is then one operator
without options, which is quickly called. Functions take this way where nobody may look at their own operators
(:func:`alexnet_fast.ops.arguments.once_per_form`), ``FusedSequential`` where it may too (:mod:`alexnet_fast.nn.runs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from alexnet_fast import _C
from alexnet_fast.ops import second
from alexnet_fast.ops.registry import LIBRARY

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
# Without the frame around them in which nothing is done.
OPERATORS = {name: getattr(torch.ops.alexnet_fast, name).default._op for name in ("run", "run_backward", "run_kept")}
# Who sees an operator that the dispatcher calls; modes and transforms only in backward, as a call has asked for them.
PROFILERS = [torch._C._autograd._profiler_enabled]
LOOKS = [
    *PROFILERS,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._are_functorch_transforms_active,
]
PLAIN = [Tensor, nn.Parameter]
CAPSULES = torch._C._aoti.unsafe_alloc_void_ptr_from_tensor, torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
RUN = _C.direct("run", OPERATORS["run"], PROFILERS, PLAIN, *CAPSULES)
RUN_BACKWARD = _C.direct("run_backward", OPERATORS["run_backward"], LOOKS, PLAIN, *CAPSULES)
RUN_KEPT = OPERATORS["run_kept"]

WINDOWS = "lrn_size", "alpha", "beta", "k", "lrn_groups", "pool_kernel", "pool_stride", "pool_padding", "ceil_mode"


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

    @property
    def has_weight(self) -> bool:
        return self.kind in ("conv", "linear")

    @property
    def returns_its_mask(self) -> bool:
        """Whether the result is the ReLU's output, which backward reads."""
        return self.relu and not self.lrn_size and self.pool_kernel[0] == 0

    @property
    def is_linear(self) -> bool:
        """Whether its gradient depends on the one that comes in alone, once the winners and signs are known."""
        return self.kind in ("flatten", "max_pool") or (self.kind == "epilogue" and not self.lrn_size)


def stage(kind: str, bias: bool, sides: Sequence[int], windows: Sequence[Any], **geometry: Any) -> Layer:
    """A convolution or the epilogue of one, whose output has ``sides``, with the ``WINDOWS`` of what follows."""
    options = dict(zip(WINDOWS, windows, strict=True))
    return Layer(kind, bias, relu=True, sides=tuple(sides), **options, **geometry)


def alone(layer: Layer, out: Sequence[int], x: Tensor, *parameters: Tensor | None) -> Native:
    """A function's one layer, for tensors of these forms; ``out``: its result's shape."""
    return Native([layer], [x.shape, out], [p.shape for p in parameters if p is not None])


class Wanted(NamedTuple):
    """Which gradients a call wants, in the forms that are asked for."""

    bits: int
    places: list[int]  # in the results of Node.backward, for each gradient
    before: tuple[None, ...] | None  # the results before them, if they are the last ones, and all of these
    saves_input: bool
    stands: bool  # whether a Stand is kept for the input, on which a gradient of the gradient depends
    holds: bool  # whether what is kept may stay in C++: none of it is memory that the caller has
    weights: list[int]  # of the parameters, those that are kept


class Native:
    """The layers that one call carries out, of one form of the input. ``shapes``: the input's, and of each layer's
    output; ``parameters``: the shapes of their weights and biases."""

    def __init__(
        self, layers: Sequence[Layer], shapes: Sequence[Sequence[int]], parameters: Sequence[Sequence[int]]
    ) -> None:
        self.layers, self.shapes = layers, shapes[1:]
        self.run = _C.Run(list(layers), [shapes[0], *parameters])
        self.number = self.run.number
        self.wanted: dict[tuple, Wanted] = {}  # by what was asked: see want()

    def __call__(self, x: Tensor, *parameters: Tensor | None) -> Tensor | None:
        """The output, or None for tensors of another form. The last one may be None, for a bias that there is not."""
        if parameters and parameters[-1] is None:
            parameters = parameters[:-1]
        if is_grad_enabled() and (
            x.requires_grad
            or (parameters and parameters[-1].requires_grad)  # in training nearly always: without a list of all
            or True in [p.requires_grad for p in parameters]
        ):
            return apply(self, x, *parameters)
        results = RUN(x, parameters, self.number, 0, 0)
        return results[0] if results else None

    def want(self, needs: tuple[bool, ...]) -> Wanted:
        """``needs``: for this object, the input and each parameter, whether its gradient is wanted."""
        found = self.wanted[needs] = self._want(needs[1:])
        return found

    def _want(self, needs: tuple[bool, ...]) -> Wanted:
        places = [place for place, need in enumerate(needs) if need]
        start, weights, parameter = 0 if needs[0] else None, [], 0
        for i, layer in enumerate(self.layers):
            count = layer.has_weight + layer.bias
            if start is None and any(needs[1 + parameter : 1 + parameter + count]):
                start = i
            if start is not None and layer.has_weight and (layer.kind == "conv" or i > start or needs[0]):
                weights.append(parameter)
            parameter += count
        bits = sum(1 << place for place in places)
        first = self.layers[0]
        saves = start == 0 and (first.kind in ("conv", "lrn") or (first.kind == "linear" and needs[1]))
        holds = first.kind != "flatten" and not self.layers[-1].returns_its_mask
        stands = needs[0] and not saves and not all(layer.is_linear for layer in self.layers)
        absent = len(needs) - len(places)
        before = (None,) * (1 + absent) if places == list(range(absent, len(needs))) else None
        return Wanted(bits, [1 + place for place in places], before, saves, stands, holds, weights)


class Node(Function):
    """A run in autograd's graph."""

    # torch looks for them by name in each call, and finds them sooner here.
    boxed_grads_call = clear_saved_tensors_on_access = False

    @staticmethod
    def forward(ctx, native: Native, x: Tensor, *parameters: Tensor) -> Tensor | None:
        needs = ctx.needs_input_grad
        wanted = native.wanted.get(needs) or native.want(needs)
        held = _C.Kept() if wanted.holds and saving_hooks(True) is None else None
        results = RUN(x, parameters, native.number, wanted.bits, held.number if held else 0)
        if not results:
            return None
        stand = None
        if wanted.stands:
            with torch.enable_grad():
                stand = second.Stand.apply(x)
        ctx.call = native, wanted, parameters, held, stand
        y = results.pop(0)
        if wanted.saves_input:
            results.insert(0, x)
        if wanted.weights or results:
            ctx.save_for_backward(*[parameters[i] for i in wanted.weights], *results)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        native, wanted, parameters, held, stand = ctx.call
        saved, weights = ctx.saved_tensors, len(wanted.weights)
        x, kept = (saved[weights], weights + 1) if wanted.saves_input else (dy, weights)
        number = held.number if held else 0
        if is_grad_enabled():
            tensors = RUN_KEPT(dy, number) if held else saved[kept:]
            x = x if stand is None else stand
            needs = ctx.needs_input_grad[1:]
            found = second.gradients(native.layers, native.shapes, parameters, needs, dy, x, tensors)
        else:
            tensors = saved[:weights], saved[kept:]
            found = RUN_BACKWARD(dy, x, *tensors, native.number, wanted.bits, number, keeps_graph())
        if wanted.before is not None:
            return (*wanted.before, *found)
        gradients: list[Tensor | None] = [None] * (2 + len(parameters))
        for place, gradient in zip(wanted.places, found, strict=True):
            gradients[place] = gradient
        return tuple(gradients)


# The hooks, if any, that tensors pass which are saved for backward; whether a backward pass lets another one follow.
saving_hooks = torch._C._autograd._top_saved_tensors_default_hooks
keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
is_grad_enabled = torch.is_grad_enabled  # sooner found
# Function.apply, but for what it does under the transforms of torch.func.
apply = super(Function, Node).apply
# What the graph shows, and what the engine calls: torch's own method asks in each call which function that is.
Node._backward_cls.__name__ = "alexnet_fast_run_backward"
Node._backward_cls.apply = Node.backward
