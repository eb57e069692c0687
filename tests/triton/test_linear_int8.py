"""The Triton kernel of linear layers with int8 weights."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import ops
from tests.ops.test_linear_int8 import data

from ..ops.compare import as_exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter multiplies bfloat16's bits
@pytest.mark.parametrize("shape", [(1, 64, 16), (3, 37, 13), (17, 200, 70)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_as_exact_as_the_reference(shape, dtype, biased, device):
    """Of one tile and of several, none of them full."""
    x, weight, scales, bias = data(*shape, dtype)
    bias = bias if biased else None
    exact = ops.linear_int8(x.double(), weight, scales, bias, backend="reference")
    peer = ops.linear_int8(x, weight, scales, bias, backend="reference")
    arguments = [None if t is None else t.to(device) for t in (x, weight, scales, bias)]
    assert as_exact(ops.linear_int8(*arguments, backend="triton").cpu(), peer, exact)


def test_empty(device):
    x, weight, scales, bias = data(0, 20, 6, torch.float32, device)
    assert ops.linear_int8(x, weight, scales, bias, backend="triton").shape == (0, 6)
