"""The kernel of linear layers with int8 weights on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alexnet_fast import ops

from ..ops.compare import as_exact, error
from ..ops.test_linear_int8 import data
from . import host_build
from .host_build import Case
from .params import DTYPES, LinearInt8Params

# Rows, inputs, outputs: with vectors of 16 weights and without, rows that fill no tile, outputs that fill no block.
SHAPES = [(1, 16, 1), (1, 1024, 9), (3, 48, 8), (4, 16, 17), (6, 560, 5), (1, 17, 3), (5, 40, 8), (2, 1, 1)]


def case(
    shape: tuple[int, int, int], dtype: torch.dtype, biased: bool = True
) -> tuple[Case, torch.Tensor, torch.Tensor]:
    """The launch, PyTorch's own result in the dtype, and the exact one."""
    x, weight, scales, bias = data(*shape, dtype)
    bias = bias if biased else None
    exact = ops.linear_int8(x.double(), weight, scales, bias, backend="reference")
    peer = ops.linear_int8(x, weight, scales, bias, backend="reference")
    rows, inputs, outputs = shape
    params = LinearInt8Params(dtype=DTYPES[dtype], rows=rows, inputs=inputs, outputs=outputs)
    tensors = {"x": x, "weight": weight, "scales": scales} | ({"bias": bias} if biased else {})
    return Case("linear_int8_fwd", params, tensors, {"y": peer}), peer, exact


def all_cases() -> list[tuple[Case, torch.Tensor, torch.Tensor]]:
    dtypes = torch.float32, torch.float16, torch.bfloat16
    return [case(shape, dtype, number % 3 > 0) for number, shape in enumerate(SHAPES) for dtype in dtypes]


def misaligned() -> list[tuple[Case, torch.Tensor, torch.Tensor]]:
    """Each tensor in turn begins between two multiples of 16 bytes."""
    return [
        (replace(one, offsets={key: tensor.element_size()}), peer, exact)
        for one, peer, exact in all_cases()
        for key, tensor in {**one.inputs, **one.outputs}.items()
    ]


def check(kind: str, some: list[tuple[Case, torch.Tensor, torch.Tensor]]) -> None:
    for (one, peer, exact), result in zip(some, host_build.run(kind, [one for one, *_ in some]), strict=True):
        assert result.error == 0
        y = result.outputs["y"]
        assert as_exact(y, peer, exact), f"{one.params.rows} rows: {error(y, exact):.3g}, {error(peer, exact):.3g}"


@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_as_exact_as_torch(kind):
    check(kind, all_cases())


@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_misaligned_tensors(kind):
    check(kind, misaligned())


def test_any_schedule():
    """Every order of blocks and threads gives the same bits."""
    some = [case((6, 560, 20), dtype) for dtype in (torch.float32, torch.bfloat16)]
    check("threads", [(replace(one, schedules=200), peer, exact) for one, peer, exact in some])


def test_weights_are_read_once():
    """A byte each, by one row and by four, with what a block of eight outputs shares."""
    for rows in (1, 4):
        one, *_ = case((rows, 1024, 8), torch.float32)
        (result,) = host_build.run("threads", [one])
        tensors = sum(tensor.numel() * tensor.element_size() for tensor in one.inputs.values())
        assert result.read == tensors
        assert result.written == rows * 8 * 4
