"""Inference on CPUs by what oneDNN offers beyond torch's modules: packed weights, and its own matrix product.

oneDNN's kernels read weights in blocks that fit the processor's registers. torch's modules hold them in plain order, so
each call of a convolution first copies its weight into blocks, and a linear layer multiplies at plain order's speed.
Inference compilers copy once. So does :func:`pack`, which has to be asked for: the copies take as much memory as the
weights, and a write to ``weight.data`` leaves no trace by which the copy could be known as stale.
"""

from __future__ import annotations

from functools import cache
from operator import itemgetter
from typing import NamedTuple, TypeVar
from weakref import finalize

import torch
from torch import Tensor, nn

from alexnet_fast import backends
from alexnet_fast.geometry import LRN, Pool, memory_format, out_sides
from alexnet_fast.nn.norm import GroupedLocalResponseNorm
from alexnet_fast.ops.arguments import holds_tensor
from alexnet_fast.ops.convolution import GEOMETRY, check
from alexnet_fast.ops.epilogue import WINDOWS, plan
from alexnet_fast.ops.registry import LIBRARY

# The rows of input that a linear layer's weight is packed for. Blocks for 32 rows are as fast at 1 row as blocks for 1,
# or faster, so that one copy serves all batches.
ROWS = 32
M = TypeVar("M", bound=nn.Module)


class _Copy(NamedTuple):
    """A packed weight, what it is a copy of, and for a convolution the call that it was made for. ``storage`` keeps the
    memory: no other weight gets its address."""

    packed: Tensor
    weight: Tensor
    storage: Tensor
    version: int
    shape: torch.Size | None
    options: tuple = ()
    arguments: tuple = ()  # packed_stage's, after the tensors

    def serves(self, weight: Tensor, shape: torch.Size | None) -> bool:
        return (
            self.weight is weight
            and self.storage.data_ptr() == weight.data_ptr()
            and self.storage.dtype == weight.dtype
            and self.version == weight._version
            and self.shape == shape
        )


# What decides a stage's arguments, besides tensors.
OPTIONS = {
    nn.Conv2d: itemgetter("stride", "padding", "dilation", "groups"),
    nn.LocalResponseNorm: itemgetter("size", "alpha", "beta", "k"),
    GroupedLocalResponseNorm: itemgetter("size", "alpha", "beta", "k", "groups"),
    nn.MaxPool2d: itemgetter("kernel_size", "stride", "padding", "ceil_mode"),
    nn.ReLU: lambda own: (),
}
# By the id of a module that lives: looked up by each call of it, and in a WeakKeyDictionary that takes longer.
_copies: dict[int, _Copy | None] = {}


def pack(model: M) -> M:
    """Lets every Conv2d and Linear in ``model`` that a FusedSequential runs keep a packed copy of its weight.

    For inference, by calls under ``torch.inference_mode()`` or ``torch.no_grad()``. Parameters, keys and pickles stay
    as they are; a deep copy of the model is not packed.

    On CPUs the copies are made by the first call, and made anew when a weight has changed or images have another shape.
    They take as much memory as the weights. A weight that is written through ``.data`` or from another process changes
    unseen: call ``pack(model)`` again.

    On CUDA devices an AlexNet, or a FusedSequential whose modules all are fused, replays what it recorded in a CUDA
    graph (:class:`alexnet_fast.nn.replays.Replays`), from the second call on with a shape, for up to eight shapes; each
    keeps the memory of its activations. Copied are the weights alone that this package's convolutions would bring into
    their form in each call: of a channels_last AlexNet the first one's. They are written anew when the weight has
    changed. What cannot be recorded runs as it stands, and one warning says why.

    Returns ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            if id(module) not in _copies:
                finalize(module, _copies.pop, id(module)).atexit = False
            _copies[id(module)] = None
        module.__dict__.pop("_plan", None)  # and with it recordings, and the weights that were prepared for them
        if hasattr(module, "_record_as_one"):
            module._record_as_one()
    return model


@cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Whether oneDNN is here and has kernels of ``dtype`` for this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


def onednn_runs(dtype: torch.dtype) -> bool:
    """The same, and it is not switched off."""
    return torch._C._get_mkldnn_enabled() and _onednn_has(dtype)


def inference_dtype(x: object) -> torch.dtype | None:
    """``x``'s dtype if oneDNN runs inference on it here and now: no gradients, no tracing; else None.

    Asked once for a succession of modules; :func:`applies` is for each of them.
    """
    runs = (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cpu
        and backends.current() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and onednn_runs(x.dtype)
    )
    return x.dtype if runs else None


def applies(weight: Tensor, x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``weight`` on ``x`` is a case for :func:`linear` or :func:`stage`, where inference runs in ``dtype``."""
    return (
        dtype is not None
        and x.dtype == weight.dtype == dtype
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device == weight.device
        and x.numel() > 0
        and not weight.is_inference()  # such a tensor counts no versions
    )


LIBRARY.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor")
# channels_last: the weight is; the result is, if x or the weight is.
LIBRARY.define(
    f"packed_stage(Tensor x, Tensor packed, Tensor? bias, {GEOMETRY}, {WINDOWS}, bool ceil_mode, bool channels_last)"
    " -> Tensor"
)


def asked(module: nn.Module) -> bool:
    """Whether :func:`pack` was asked for ``module``."""
    return id(module) in _copies


def is_newest(copy: _Copy, weight: Tensor, module: nn.Module) -> bool:
    """Whether ``copy`` is the one that is kept for ``module``, and ``weight`` is what it was made of."""
    return _copies.get(id(module)) is copy and copy.serves(weight, copy.shape)


def linear_copy(module: nn.Linear, weight: Tensor) -> _Copy:
    """The packed weight of a layer that :func:`pack` was asked for."""
    copy = _copies[id(module)]
    if copy is None or not copy.serves(weight, None):
        blocks = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        copy = _copies[id(module)] = _Copy(blocks, weight, weight.detach(), weight._version, None)
    return copy


def linear(module: nn.Linear, weight: Tensor, bias: Tensor | None, x: Tensor, relu: bool) -> Tensor | None:
    """The layer, and ReLU if wanted, by oneDNN; None where F.linear is as fast, 16-bit weights in plain order and
    single rows, and for what F.linear refuses."""
    if x.size(1) != weight.size(1):
        return None
    if not asked(module):
        if x.dtype != torch.float32 or x.shape[0] == 1:
            return None
        return torch.ops.alexnet_fast.onednn_linear.default(x, weight, bias, relu)
    return torch.ops.alexnet_fast.onednn_linear.default(x, linear_copy(module, weight).packed, bias, relu)


def _options(members: list[nn.Module]) -> tuple:
    return tuple([OPTIONS[type(module)](module.__dict__) for module in members])


def again(run: str, members: list[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What :func:`linear` or :func:`stage` would return, of ``x``, by the copy that an earlier call has made; None if
    there is none or anything has changed that decides about it."""
    copy, parameters = _copies.get(id(members[0])), members[0].__dict__["_parameters"]
    if copy is None or type(x) is not Tensor or x.dtype != dtype or "bias" not in parameters:
        return None
    weight, bias = parameters.get("weight"), parameters["bias"]
    if run[0] == "l":
        if not copy.serves(weight, None) or x.dim() != 2 or x.size(1) != weight.size(1):
            return None
        return torch.ops.alexnet_fast.onednn_linear.default(x, copy.packed, bias, "r" in run)
    if not copy.serves(weight, x.shape) or copy.options != _options(members):
        return None
    return torch.ops.alexnet_fast.packed_stage.default(x, copy.packed, bias, *copy.arguments)


def stage_copy(
    members: list[nn.Module], weight: Tensor, bias: Tensor | None, x: Tensor, lrn: LRN | None, pool: Pool | None
) -> _Copy | None:
    """The packed weight of ops.conv_stage, for batches like x; None where there is none, and for what conv_stage
    refuses."""
    module = members[0]
    options = module.stride, module.padding, module.dilation, module.groups
    if not asked(module) or isinstance(module.padding, str) or holds_tensor(options):
        return None
    (stride, padding, dilation, groups), _, refusal = check(x, weight, bias, *options)
    if refusal:
        return None
    windows, refusal = plan(lrn, pool, weight.shape[0], *out_sides(x, weight, stride, padding, dilation))
    if refusal:
        return None
    copy = _copies[id(module)]
    if copy is not None and copy.serves(weight, x.shape) and copy.options[0] == options:
        blocks = copy.packed
    else:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        blocks = reorder(weight.detach(), padding, stride, dilation, groups, x.shape)
    arguments = stride, padding, dilation, groups, *windows, memory_format(weight) == torch.channels_last
    kept = _Copy(blocks, weight, weight.detach(), weight._version, x.shape, _options(members), arguments)
    _copies[id(module)] = kept
    return kept


def stage(
    members: list[nn.Module], weight: Tensor, bias: Tensor | None, x: Tensor, lrn: LRN | None, pool: Pool | None
) -> Tensor | None:
    """ops.conv_stage of a batch with the packed weight; None as :func:`stage_copy`."""
    copy = stage_copy(members, weight, bias, x, lrn, pool)
    return copy and torch.ops.alexnet_fast.packed_stage.default(x, copy.packed, bias, *copy.arguments)
