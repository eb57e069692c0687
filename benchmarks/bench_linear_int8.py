"""fc6, fc7 and fc8 with int8 weights, of one row and of a few: ours against PyTorch's layer of float32, which reads
four times the bytes, and against PyTorch's own product with int8 weights.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops
from alexnet_fast.reference.linear_int8 import quantize_weight

from .cases import devices
from .timing import row_of

LAYERS = {"fc6": (9216, 4096), "fc7": (4096, 4096), "fc8": (4096, 1000)}


@pytest.mark.parametrize("rows", [1, 4, 32])
@pytest.mark.parametrize("layer", LAYERS)
@devices
def test_linear_int8(benchmark, keep, missing, layer, rows, device):
    inputs, outputs = LAYERS[layer]
    whole, bias = torch.randn(outputs, inputs, device=device), torch.randn(outputs, device=device)
    weight, scales = quantize_weight(whole)
    x = torch.randn(rows, inputs, device=device)
    calls = {"ours": lambda: ops.linear_int8(x, weight, scales, bias), "eager": lambda: F.linear(x, whole, bias)}
    try:
        torch._weight_int8pack_mm(x, weight, scales)
        calls["torch int8"] = lambda: torch._weight_int8pack_mm(x, weight, scales) + bias
    except (RuntimeError, NotImplementedError) as error:
        missing["torch int8"] = str(error).splitlines()[0]
    exact = F.linear(x, weight * scales[:, None], bias)
    for name in calls.keys() - {"eager"}:
        torch.testing.assert_close(calls[name](), exact, rtol=1e-4, atol=1e-3, msg=name)
    labels = {"bench": "linear_int8", "case": f"{layer} {inputs} to {outputs}, {rows} rows", "dtype": "float32"}
    labels |= {"layout": "contiguous", "pass": "forward", "backend": device}
    with torch.no_grad():
        row = row_of(benchmark, calls, labels, device, seconds=2)
    moved = weight.numel() + 4 * (2 * outputs + x.numel() + rows * outputs)
    keep(row and row | {"bytes": moved, "flops": 2 * rows * weight.numel()})
