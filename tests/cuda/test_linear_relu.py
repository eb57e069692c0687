"""The kernel of linear layers for few rows on the CPU."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from . import host_build
from .host_build import Case
from .params import DTYPES, LinearParams
from .test_linear_int8 import check

Task = tuple[Case, Tensor, Tensor]
FLOATS = torch.float32, torch.float16, torch.bfloat16

# Rows, inputs, outputs: an eighth of fc6's inputs and of fc7's; then vectors and none, of each dtype, outputs that fill
# no block, rows that fill no pass, and more of them than one pass takes.
SHAPES = [(1, 1152, 9), (8, 1152, 10), (4, 512, 16), (2, 512, 25), (1, 16, 1), (3, 24, 3), (5, 40, 17), (6, 560, 5)]
SHAPES += [(7, 33, 4), (1, 17, 3), (9, 64, 5), (9, 19, 2), (2, 1, 1), (1, 4, 2), (8, 264, 1), (17, 8, 7), (1, 300, 6)]


def draw(count: int) -> list[tuple[int, int, int]]:
    random.seed(0)
    return [
        (random.randint(1, 10), random.choice([1, 4, 8]) * random.randint(1, 99), random.randint(1, 20))
        for _ in range(count)
    ]


def case(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool = True, relu: bool = True) -> Task:
    """The launch, PyTorch's own result in the dtype, and the exact one."""
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(rows + inputs)
    x, weight, bias = (
        torch.randn(*size, generator=generator).to(dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,))
    )
    tensors = {"x": x, "weight": weight} | ({"bias": bias} if biased else {})
    peer, exact = (result(*(t.to(to) for t in tensors.values()), relu=relu) for to in (dtype, torch.float64))
    params = LinearParams(dtype=DTYPES[dtype], relu=relu, rows=rows, inputs=inputs, outputs=outputs)
    return Case("linear_relu_fwd", params, tensors, {"y": peer}), peer, exact


def result(*tensors: Tensor, relu: bool) -> Tensor:
    y = F.linear(*tensors)
    return y.relu() if relu else y


def all_cases() -> list[Task]:
    return [case(shape, dtype, n % 3 > 0, n % 2 > 0) for n, shape in enumerate(SHAPES) for dtype in FLOATS]


def misaligned() -> list[Task]:
    """Each tensor in turn begins between two multiples of 16 bytes."""
    return [
        (replace(one, offsets={key: tensor.element_size()}), peer, exact)
        for one, peer, exact in all_cases()
        for key, tensor in {**one.inputs, **one.outputs}.items()
    ]


@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_as_exact_as_torch(kind):
    check(kind, all_cases())


@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_misaligned_tensors(kind):
    check(kind, misaligned())


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_shape(dtype):
    check("threads", [case(shape, dtype, n % 4 > 0, n % 2 > 0) for n, shape in enumerate(draw(120))])


def test_any_schedule():
    """Every order of blocks and threads gives the same bits."""
    some = [case((6, 560, 20), dtype) for dtype in (torch.float32, torch.bfloat16)]
    check("threads", [(replace(one, schedules=200), peer, exact) for one, peer, exact in some])


def test_a_rows_bits_do_not_depend_on_their_number():
    """One row, up to four, up to eight and several passes add up in the same order."""
    for dtype, inputs in ((torch.float32, 560), (torch.bfloat16, 560), (torch.float16, 33)):
        whole, *_ = case((9, inputs, 5), dtype)
        parts = []
        for rows in (1, 2, 4, 5, 8, 9):
            params = LinearParams.from_buffer_copy(whole.params)
            params.rows = rows
            x, y = whole.inputs["x"][:rows], whole.outputs["y"][:rows]
            parts.append(replace(whole, params=params, inputs=whole.inputs | {"x": x}, outputs={"y": y}))
        *some, last = [found.outputs["y"] for found in host_build.run("threads", parts)]
        assert all(torch.equal(y, last[: len(y)]) for y in some)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("inputs", [64, 19])
def test_special_values(inputs, relu):
    """NaN stays through ReLU, and infinity and NaN in their row; minus infinity and minus zero become zero."""
    for dtype in FLOATS:
        one, *_ = case((5, inputs, 4), dtype, relu=relu)
        x, weight, bias = one.inputs.values()
        x[0, inputs - 1], x[1, 0], x[2, 1] = math.nan, math.inf, -math.inf
        x[3] = 0
        weight[:, :2] = 1
        bias[0], bias[1], bias[2] = -0.0, math.nan, -1
        (found,) = host_build.run("threads", [one])
        y, wanted = found.outputs["y"], result(x, weight, bias, relu=relu)
        torch.testing.assert_close(y, wanted, equal_nan=True)
        assert not (relu and y.signbit().any())


def test_no_inputs():
    """Of none y is the bias."""
    for dtype in FLOATS:
        one, peer, _ = case((2, 0, 3), dtype)
        (found,) = host_build.run("threads", [one])
        assert torch.equal(found.outputs["y"], peer)


def test_weights_are_read_once():
    """By one row, four and eight, with what a block of eight outputs shares."""
    for rows in (1, 4, 8):
        one, *_ = case((rows, 1024, 8), torch.bfloat16)
        (found,) = host_build.run("threads", [one])
        assert found.read == sum(tensor.numel() * tensor.element_size() for tensor in one.inputs.values())
        assert found.written == rows * 8 * 2
