"""Which successions of modules are one call into C++ and one node of autograd's graph (:mod:`alexnet_fast.ops.run`).

A :class:`Segment` is a part of a ``FusedSequential`` that may run so. For each form of its input (shape, dtype, device,
with gradients or without, backend) it decides once which of its layers do, by the operators' own checks and choices.
That the modules are as they were is for ``alexnet_fast.nn.fused`` to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_fast import _C, backends, ops
from alexnet_fast.nn import packed
from alexnet_fast.ops import convolution
from alexnet_fast.ops.arguments import FLOATS
from alexnet_fast.ops.conv_relu import _prepare as prepare_conv_relu
from alexnet_fast.ops.conv_relu import planned as plan_conv
from alexnet_fast.ops.conv_stage import _prepare as prepare_conv_stage
from alexnet_fast.ops.epilogue import pooled
from alexnet_fast.ops.linear_relu import own_kernel
from alexnet_fast.ops.lrn import _prepare as prepare_lrn
from alexnet_fast.ops.lrn import planned as plan_lrn
from alexnet_fast.ops.max_pool import _prepare as prepare_max_pool
from alexnet_fast.ops.max_pool import planned as plan_max_pool
from alexnet_fast.ops.run import Layer, Native, stage

MOST_FORMS = 64
MOST_TENSORS = 63  # input and parameters: the bits of `wanted`


find = _C.finder([torch.is_grad_enabled, torch._C._get_mkldnn_enabled, backends.current], Tensor)


class Run(Native):
    """The layers that a succession of ``count`` runs of modules is, with the modules' ``parameters``, and the packed
    ``copies`` among them with the weights and modules that these are of. ``fold``: the stride by which the images are
    folded, and the first of the parameters has to be."""

    def __init__(
        self, layers: list[Layer], shapes: list, parameters: list[Tensor], copies: list, count: int, fold: tuple | None
    ):
        self.parameters, self.copies, self.count, self.fold = tuple(parameters), copies, count, fold
        super().__init__(layers, shapes, [p.shape for p in self._as_read()])

    def _as_read(self) -> tuple[Tensor, ...]:
        """The parameters as the layers read them."""
        if self.fold is None:
            return self.parameters
        return convolution.fold_weight(self.parameters[0], self.fold), *self.parameters[1:]

    def carry_out(self, x: Tensor) -> Tensor | None:
        """The output, or None if the tensors are not what they were when this was planned."""
        for copy, weight, owner in self.copies:
            if not packed.is_newest(copy, weight, owner):
                return None
        return self(x, *self._as_read())


class Segment:
    """Successive runs of modules, as ``fused.RUNS`` cuts them, of which all that is known before a call is known to
    allow a run in C++."""

    def __init__(self, runs: list[tuple[str, list[nn.Module]]], call: Callable[..., Any]) -> None:
        self.runs, self.call = runs, call
        self.natives: dict[tuple, Run | None] = {}

    def __call__(self, x: Any) -> Any:
        start = 0
        native = find(self.natives, x)
        if type(native) is tuple:  # a form that is not known
            native = self._plan(native, x)
        if native is not None:
            y = native.carry_out(x)
            if y is None:
                self.natives.clear()
            else:
                start, x = native.count, y
                if start == len(self.runs):
                    return x
        dtype = packed.inference_dtype(x)
        for run, members in self.runs[start:]:
            x = self.call(run, members, x, dtype)
        return x

    def _plan(self, form: tuple, x: Tensor) -> Run | None:
        try:
            native = _native(self.runs, x)
        except (TypeError, ValueError, backends.BackendError):  # which the operators' own functions will raise
            return None
        if len(self.natives) >= MOST_FORMS:
            self.natives.clear()
        self.natives[form] = native
        return native


def _native(runs: list[tuple[str, list[nn.Module]]], x: Tensor) -> Run | None:
    """As many of ``runs``, from the first one on, as C++ carries out as they would be carried out one by one."""
    if x.dtype not in FLOATS or x.layout != torch.strided or x.numel() == 0:
        return None
    inference = packed.inference_dtype(x)
    fold = _fold(*runs[0], x)
    layers: list[Layer] = []
    parameters: list[Tensor] = []
    copies: list[tuple] = []
    ends: list[tuple[int, int, int]] = [(0, 0, 0)]  # after each run: layers, parameters, copies
    shapes = [x.shape]
    for run, members in runs:
        planned = _layer(run, members, x, shapes[-1], inference, None if layers else fold)
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
    return Run(layers, shapes[: 1 + len(layers)], parameters, copies, count, fold)


def _geometry(conv: nn.Conv2d) -> tuple:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _fold(run: str, members: list[nn.Module], x: Tensor) -> tuple[int, ...] | None:
    """The stride by which images ``x`` are folded for the convolution that they come to, or None."""
    first = members[0]
    folded = run[0] == "c" and convolution.is_folded(x, first._parameters["weight"], *_geometry(first))
    return first.stride if folded else None


def _layer(
    run: str, members: list[nn.Module], x: Tensor, shape: torch.Size, inference: torch.dtype | None, fold: tuple | None
):
    """Layers, their parameters, packed copies with their weights, and the output's shape; None if there is no such."""
    like = x.new_empty(()).expand(shape)  # for the operators' checks: what comes here, without memory
    first, last = members[0], members[-1]
    if run == "f":
        if len(shape) < 2 or (first.start_dim, first.end_dim) != (1, -1):
            return None
        return [Layer("flatten", sides=tuple(shape[1:]))], [], [], like.flatten(1).shape
    if run[0] != "l" and len(shape) != 4:
        return None
    if run == "p" or run == "n":
        if run == "p":
            options = first.kernel_size, first.stride, first.padding, 1, first.ceil_mode, False
            *answer, _ = prepare_max_pool(like, None, None, *options, None)
        else:
            *answer, _ = prepare_lrn(like, None, None, *_lrn(first), None)
        planned = (plan_max_pool if run == "p" else plan_lrn)(*answer, like)
        return planned and ([planned[0]], [], [], torch.Size(planned[1]))
    weight, bias = first._parameters["weight"], first._parameters["bias"]
    tensors = [weight] if bias is None else [weight, bias]
    if any(t.dtype != x.dtype or t.device != x.device or t.layout != torch.strided for t in tensors):
        return None
    if run[0] == "l":
        return _linear(run, first, weight, bias, tensors, like, inference)
    norm = ops.LRN(*_lrn(members[2])) if "n" in run else None
    pool = ops.Pool(last.kernel_size, last.stride, last.padding, last.ceil_mode) if "p" in run else None
    geometry = _geometry(first)
    if fold:
        weight, geometry = convolution.fold_weight(weight, fold), convolution.STRIDE_1
    elif packed.applies(weight, like, inference) and packed.asked(first):
        copy = packed.stage_copy(members, weight, bias, like, norm, pool)
        if copy is None:
            return None
        *geometry, channels_last = copy.arguments
        geometry, windows = geometry[:4], geometry[4:]
        sides = convolution.out_sides(like, weight, *geometry[:3])
        options = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
        layer = stage("packed_conv", bias is not None, sides, windows, channels_last=channels_last, **options)
        shape = [shape[0], weight.shape[0], *pooled(windows, *sides)]
        return [layer], [copy.packed, *tensors[1:]], [(copy, weight, first)], torch.Size(shape)
    if norm is None and pool is None:
        *answer, _ = prepare_conv_relu(like, weight, bias, *geometry, None)
    else:
        *answer, _ = prepare_conv_stage(like, weight, bias, *geometry, norm, pool, None)
    planned = plan_conv(*answer, like, weight, bias)
    return planned and ([planned[0]], tensors, [], torch.Size(planned[1]))


def _lrn(norm: nn.LocalResponseNorm) -> tuple:
    return norm.size, norm.alpha, norm.beta, norm.k, getattr(norm, "groups", 1)


def _linear(
    run: str, module: nn.Linear, weight: Tensor, bias: Tensor | None, tensors: list[Tensor], like: Tensor, inference
):
    if like.dim() != 2 or weight.dim() != 2 or like.shape[1] != weight.shape[1]:
        return None
    if bias is not None and bias.shape != weight.shape[:1]:
        return None
    relu = "r" in run
    own = own_kernel(like)
    if own == "cuda" or (relu and not own and backends.choose("linear_relu_dropout", like, None) == "triton"):
        return None
    kind, copies = "linear", []
    if packed.applies(weight, like, inference):
        if packed.asked(module):
            copy = packed.linear_copy(module, weight)
            kind, tensors[0], copies = "onednn_linear", copy.packed, [(copy, weight, module)]
        elif like.dtype == torch.float32 and like.shape[0] > 1:
            kind = "onednn_linear"
    layer = Layer(kind, bias is not None, relu, tuned=own == "tuned")
    return [layer], tensors, copies, torch.Size([like.shape[0], weight.shape[0]])
