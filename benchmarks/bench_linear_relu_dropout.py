"""Bias, ReLU and dropout of fc6 and fc7, after the matrix product, in training: ours in one pass, PyTorch's in three.

On a GPU alone: on CPUs the operator is there for its results, and nets keep PyTorch's modules.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops

from .cases import NO_GPU
from .timing import row_of, short

LAYERS = {"fc6": (128, 9216, 4096), "fc7": (128, 4096, 4096)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU))])
def test_linear_relu_dropout(benchmark, keep, layer, dtype, backend):
    rows, into, out = LAYERS[layer]
    shapes = (rows, into), (out, into), (out,)
    leaves = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
    dy = torch.randn(rows, out, dtype=dtype, device="cuda")

    def ours(p: float = 0.5) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ops.linear_relu_dropout(*leaves, p, backend=backend), leaves, dy)

    def eager(p: float = 0.5) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.dropout(F.relu(F.linear(*leaves)), p), leaves, dy)

    for mine, theirs in zip(ours(0.0), eager(0.0), strict=True):  # their random numbers are others
        assert (mine - theirs).abs().max() <= 2**-6 * theirs.abs().max()
    labels = {"bench": "linear_relu_dropout", "case": f"{layer}, batch {rows}", "dtype": short(dtype)}
    labels |= {"layout": "contiguous", "pass": "forward+backward", "backend": backend}
    row = row_of(benchmark, {"ours": ours, "eager": eager}, labels, "cuda", seconds=0.4)
    # x and weight are read by both passes, y kept, dy read; gradients of all three written.
    elements = 2 * (rows * into + out * into) + 2 * rows * out + rows * into + out * into
    keep(row and row | {"bytes": elements * dtype.itemsize, "flops": 6 * rows * into * out})
