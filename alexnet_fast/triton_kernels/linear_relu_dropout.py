"""Bias, ReLU and dropout after a matrix product, in one pass.

    y_i  = max(0, z_i + b) / (1 − p) where the first word of Philox(seed, i) is at least p · 2³², else 0
    dz_i = dy_i / (1 − p) where y_i > 0, else 0,    db = Σ dz over rows

Tile: 16 bytes for each of 256 threads; i is row · features + feature. Backward is the epilogue's, whose mask is y as
well.
Bytes: forward reads z and writes y, backward reads dy and y and writes dz, each once; no mask is stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels import epilogue
from alexnet_fast.triton_kernels.launch import accumulator, implements
from alexnet_fast.triton_kernels.tiles import Sheet, bias_of, rectify, tile_of


@triton.jit
def _forward_kernel(
    z_ptr,
    y_ptr,
    bias_ptr,
    seed_ptr,
    rows,
    features,
    row_stride,
    feature_stride,
    SCALE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ACC: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
):
    _, row, feature, mask = tile_of(rows, features, PIXELS, CHANNELS, INDEX)
    here = row.to(tl.int64) * row_stride + feature.to(tl.int64) * feature_stride
    bias = bias_of(bias_ptr, feature, feature < features, features, ACC)
    r = rectify(tl.load(z_ptr + here, mask, other=0), bias, ACC)
    if seed_ptr is not None:
        word = tl.randint4x(tl.load(seed_ptr), here)[0]
        r = tl.where(word.to(tl.int64) >= THRESHOLD, r * SCALE, 0.0)
    tl.store(y_ptr + here, r, mask)


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


@implements("linear_relu_dropout")
def _linear_relu_dropout(z: Tensor, bias: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    z = z.contiguous()
    y = torch.empty_like(z)
    if z.numel():
        sheet = Sheet(*z.shape, z.shape[1], 1, 16 // z.element_size())
        b = None if bias is None else bias.contiguous()
        constants = {"SCALE": _scale(p), "THRESHOLD": round(p * 2**32), "ACC": accumulator(z)}
        _forward_kernel[sheet.grid](z, y, b, seed, *sheet.sizes, **constants, **sheet.tile)
    return y


@implements("linear_relu_dropout_backward")
def _linear_relu_dropout_backward(dy: Tensor, y: Tensor, p: float, want_bias: bool) -> tuple[Tensor, Tensor]:
    images = (t.contiguous()[:, :, None, None] for t in (dy, y))
    dz, db = epilogue.mask(*images, torch.channels_last, want_bias, _scale(p))
    return dz.flatten(1), db
