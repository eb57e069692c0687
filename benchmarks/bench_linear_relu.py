"""fc6, fc7 and fc8 of one image and of eight: ours against PyTorch's product and ReLU. fc8 has no ReLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops

from .bench_linear_int8 import LAYERS
from .cases import devices
from .timing import row_of, short


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@devices
def test_linear_relu(benchmark, keep, dtype, layer, rows, device):
    inputs, outputs = LAYERS[layer]
    relu = layer != "fc8"
    x, weight, bias = (
        torch.randn(size, device=device, dtype=dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,))
    )

    def eager() -> torch.Tensor:
        y = F.linear(x, weight, bias)
        return F.relu(y) if relu else y

    calls = {"ours": lambda: ops.linear_relu(x, weight, bias, relu, backend=device), "eager": eager}
    assert (calls["ours"]() - eager()).abs().max() <= 2**-6 * eager().abs().max()
    labels = {"bench": "linear_relu", "case": f"{layer} {inputs} to {outputs}, {rows} rows", "dtype": short(dtype)}
    labels |= {"layout": "contiguous", "pass": "forward", "backend": device}
    with torch.no_grad():
        row = row_of(benchmark, calls, labels, device, seconds=2)
    moved = dtype.itemsize * (weight.numel() + outputs + x.numel() + rows * outputs)
    keep(row and row | {"bytes": moved, "flops": 2 * rows * weight.numel()})
