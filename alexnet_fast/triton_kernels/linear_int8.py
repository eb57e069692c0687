"""A linear layer with int8 weights.

    y_nk = s_k Σ_c x_nc q_kc + b_k

Tile: 16 rows by 64 outputs, over which a program walks through 128 inputs at a time; int8 is exact in every input's
dtype, so tensor cores multiply. Of float32, which they would round, 32 inputs: more do not fit in registers.
Bytes: reads weights once for each 16 rows, a byte each, and x once for each 64 outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels.launch import accumulator, implements

ROWS, OUTPUTS = 16, 64


@triton.jit
def _forward_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    rows,
    inputs,
    outputs,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    output = (tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS))[None, :]
    x_row = x_ptr + row.to(tl.int64) * inputs
    weight_row = weight_ptr + output.to(tl.int64) * inputs
    sums = tl.zeros((ROWS, OUTPUTS), ACC)
    for first in range(0, inputs, INPUTS):
        c = first + tl.arange(0, INPUTS)
        x = tl.load(x_row + c[None, :], (row < rows) & (c < inputs)[None, :], other=0)
        weight = tl.load(weight_row + c[:, None], (c < inputs)[:, None] & (output < outputs), other=0)
        sums = tl.dot(x, weight.to(x.dtype), sums, input_precision="ieee", out_dtype=ACC)
    y = sums * tl.load(scales_ptr + output, output < outputs, other=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + output, output < outputs, other=0).to(ACC)
    tl.store(y_ptr + row.to(tl.int64) * outputs + output, y, (row < rows) & (output < outputs))


@implements("linear_int8")
def _linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    (rows, inputs), outputs = x.shape, weight.shape[0]
    y = x.new_empty((rows, outputs))
    if y.numel():
        grid = triton.cdiv(outputs, OUTPUTS), triton.cdiv(rows, ROWS)
        tensors = x.contiguous(), weight.contiguous(), scales.contiguous(), None if bias is None else bias.contiguous()
        tile = {"ACC": accumulator(x), "ROWS": ROWS, "OUTPUTS": OUTPUTS, "INPUTS": 128 if x.element_size() == 2 else 32}
        _forward_kernel[grid](*tensors, y, rows, inputs, outputs, **tile)
    return y
