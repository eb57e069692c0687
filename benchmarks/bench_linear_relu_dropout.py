"""Bias, ReLU and dropout of fc6 and fc7, after the matrix product, in training: ours in one pass, PyTorch's in three.

On a GPU alone: on CPUs the operator is there for its results, and nets keep PyTorch's modules.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops

LAYERS = {"fc6": (128, 9216, 4096), "fc7": (128, 4096, 4096)}
SIDES = {
    "ours": lambda x, weight, bias: ops.linear_relu_dropout(x, weight, bias, backend="triton"),
    "torch": lambda x, weight, bias: F.dropout(F.relu(F.linear(x, weight, bias))),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("layer", LAYERS)
def test_linear_relu_dropout(benchmark, layer, side, dtype):
    rows, into, out = LAYERS[layer]
    shapes = (rows, into), (out, into), (out,)
    leaves = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
    dy = torch.randn(rows, out, dtype=dtype, device="cuda")

    def step() -> None:
        torch.autograd.grad(SIDES[side](*leaves), leaves, dy)
        torch.cuda.synchronize()

    benchmark.group = f"linear_relu_dropout-{layer}-{dtype}"
    benchmark.pedantic(step, rounds=50, warmup_rounds=10)
