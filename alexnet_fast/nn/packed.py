"""Inference on CPUs by what oneDNN offers beyond torch's modules: packed weights, and its own matrix product.

oneDNN's kernels read weights in blocks that fit the processor's registers. torch's modules hold them in plain order, so
each call of a convolution first copies its weight into blocks, and a linear layer multiplies at plain order's speed.
Inference compilers copy once. So does :func:`pack`, which has to be asked for: the copies take as much memory as the
weights, and a write to ``weight.data`` leaves no trace by which the copy could be known as stale.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from alexnet_fast import backends
from alexnet_fast.ops.convolution import onednn_runs
from alexnet_fast.ops.registry import memory_format

# The rows of input that a linear layer's weight is packed for. Blocks for 32 rows are as fast at 1 row as blocks for 1,
# or faster, so that one copy serves all batches.
ROWS = 32


class _Copy(NamedTuple):
    """A packed weight, and what it is a copy of. ``storage`` keeps the memory: no other weight gets its address."""

    packed: Tensor
    weight: Tensor
    storage: Tensor
    version: int
    shape: torch.Size | None
    form: torch.memory_format  # the weight's

    def serves(self, weight: Tensor, shape: torch.Size | None) -> bool:
        return (
            self.weight is weight
            and self.storage.data_ptr() == weight.data_ptr()
            and self.storage.dtype == weight.dtype
            and self.version == weight._version
            and self.shape == shape
        )


NOT_PACKED = object()
_copies: WeakKeyDictionary[nn.Module, _Copy | None] = WeakKeyDictionary()


def pack(model: nn.Module) -> nn.Module:
    """Lets every Conv2d and Linear in ``model`` that a FusedSequential runs keep a packed copy of its weight.

    For inference on CPUs: the copies are made, and used, by calls under ``torch.inference_mode()`` or
    ``torch.no_grad()``, and made anew when a weight has changed or images have another shape. They take as much memory
    as the weights. Parameters, keys and pickles stay as they are; a deep copy of the model is not packed.

    A weight that is written through ``.data`` or from another process changes unseen: call ``pack(model)`` again.

    Returns ``model``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            _copies[module] = None
    return model


def inference_dtype(x: object) -> torch.dtype | None:
    """``x``'s dtype if oneDNN runs inference on it here and now: no gradients, no tracing; else None.

    Asked once for a succession of modules; :func:`applies` is for each of them.
    """
    runs = (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and backends.current() in ("auto", "cpu")
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and onednn_runs(x.dtype)
    )
    return x.dtype if runs else None


def applies(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether ``module`` on ``x`` is a case for :func:`linear` or :func:`convolution`, where inference runs in
    ``dtype``."""
    weight = module.weight
    return (
        dtype is not None
        and x.dtype == weight.dtype == dtype
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.device == weight.device
        and x.numel() > 0
        and not weight.is_inference()  # such a tensor counts no versions
    )


def _packed(module: nn.Module, shape: torch.Size | None, reorder) -> _Copy | None:
    """The packed weight, made by ``reorder`` if there is none for ``shape``; None if :func:`pack` was not called."""
    copy, weight = _copies.get(module, NOT_PACKED), module.weight
    if copy is NOT_PACKED:
        return None
    if copy is None or not copy.serves(weight, shape):
        form = memory_format(weight)
        copy = _Copy(reorder(weight.detach()), weight, weight.detach(), weight._version, shape, form)
        _copies[module] = copy
    return copy


def linear(module: nn.Linear, x: Tensor) -> Tensor | None:
    """The layer by oneDNN; None where F.linear is as fast: 16-bit weights in plain order, and single rows."""
    copy = _packed(module, None, lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, ROWS))
    if copy is None and (x.dtype != torch.float32 or x.shape[0] == 1):
        return None
    weight = module.weight if copy is None else copy.packed
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, module.bias, "none", [], "")


def convolution(module: nn.Conv2d, x: Tensor) -> Tensor | None:
    """The convolution of a batch, bias and all, with the packed weight; None where there is none."""
    if isinstance(module.padding, str):
        return None
    geometry = module.padding, module.stride, module.dilation, module.groups
    copy = _packed(
        module, x.shape, lambda weight: torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, x.shape)
    )
    if copy is None:
        return None
    form = memory_format(x) if copy.form == torch.contiguous_format else copy.form
    x = x.contiguous(memory_format=form)
    z = torch.ops.mkldnn._convolution_pointwise.default(x, copy.packed, module.bias, *geometry, "none", [], "")
    return z.contiguous(memory_format=form)
