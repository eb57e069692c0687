"""Convolution, bias and ReLU as an implicit matrix product over channels_last memory.

    y[m, k] = max(0, b[k] + Σ_{r,s,c} x[m shifted by (r, s), c] · w[k, (r, s, c)])

with m = (image, row, column) of an output pixel. The gradient of x is the same sum over ∂L/∂z, with w turned by 180°
and its axes k and c exchanged; where the convolution strides, zeros lie between the pixels of ∂L/∂z, never stored.

    dw[k, (r, s, c)] = Σ_m dz[m, k] · x[m shifted by (r, s), c]

Tile: BLOCK_M output pixels by BLOCK_N output channels, BLOCK_K of the R·S·C products at a time. No patch matrix is
stored: an element's tap (r, s) and channel c follow from its place in the depth. For dw: BLOCK_M output channels by
BLOCK_N of the depth, BLOCK_K pixels at a time; the pixels are split among programs, and a second pass adds their
float32 results in order, so that a result does not depend on timing.
Bytes: x, w and y once, if each tile of x stays in the L2 cache while the programs side by side, which share it, run.

A first layer like AlexNet's (11x11, stride 4, 3 channels) is folded: blocks of stride x stride pixels become channels,
and the kernel's sides are padded up to multiples of the stride. That is a 3x3 convolution with stride 1 over 48
channels, whose loads are aligned and whole, for 1.19 times the arithmetic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.geometry import Geometry, layout_of, memory_format, out_sides
from alexnet_fast.triton_kernels import epilogue
from alexnet_fast.triton_kernels.launch import INTERPRETED, Tuned, accumulator, dense, implements

CHANNELS_LAST = torch.channels_last


# ---- Forward, and the gradient of the input --------------------------------------------------------------------------


@triton.jit
def source(origin, tap, DILATION: tl.constexpr, SPREAD: tl.constexpr, side):
    """Where along one axis a tap reads, and whether there is an element. SPREAD - 1 zeros lie between two elements."""
    at = origin + tap * DILATION
    inside = at >= 0
    if SPREAD != 1:
        inside = inside & (at % SPREAD == 0)
        at = at // SPREAD
    return at, inside & (at < side)


@triton.jit
def _conv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    pixels,
    height,
    width,
    out_height,
    out_width,
    image_stride,
    pixel_stride,
    channel_stride,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPREAD_H: tl.constexpr,
    SPREAD_W: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """IN and OUT are one group's channels. image_stride, pixel_stride and channel_stride are y's."""
    DEPTH: tl.constexpr = KERNEL_H * KERNEL_W * IN
    BLOCK_K: tl.constexpr = BYTES * 8 // x_ptr.dtype.element_ty.primitive_bitwidth
    across = tl.cdiv(OUT, BLOCK_N)
    group = tl.program_id(1)
    m = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]

    image, pixel = m // (out_height * out_width), (m % (out_height * out_width)).to(tl.int32)
    top, left = pixel // out_width * STRIDE_H - PAD_H, pixel % out_width * STRIDE_W - PAD_W
    image_ptr = x_ptr + image * height * width * (GROUPS * IN) + group * IN
    w_row = w_ptr + (group * OUT + n).to(tl.int64) * DEPTH

    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, DEPTH, BLOCK_K):
        if IN % BLOCK_K == 0:  # one tap a step
            tap, c = start // IN, tl.multiple_of(start % IN, BLOCK_K) + tl.arange(0, BLOCK_K)[None, :]
        else:
            depth = start + tl.arange(0, BLOCK_K)[None, :]
            tap, c = depth // IN, depth % IN
        row, inside_rows = source(top, tap // KERNEL_W, DILATION_H, SPREAD_H, height)
        column, inside_columns = source(left, tap % KERNEL_W, DILATION_W, SPREAD_W, width)
        inside = (m < pixels) & inside_rows & inside_columns & (tap < KERNEL_H * KERNEL_W)
        x = tl.load(image_ptr + (row * width + column).to(tl.int64) * (GROUPS * IN) + c, inside, other=0)
        k = start + tl.arange(0, BLOCK_K)[:, None]
        w = tl.load(w_row + k, (n < OUT) & (k < DEPTH), other=0)
        total = tl.dot(x, w, total, input_precision=PRECISION, out_dtype=ACC)

    if bias_ptr is not None:
        total += tl.load(bias_ptr + group * OUT + n, n < OUT, other=0).to(ACC)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)
    y = image * image_stride + pixel.to(tl.int64) * pixel_stride + (group * OUT + n).to(tl.int64) * channel_stride
    tl.store(y_ptr + y, total, (m < pixels) & (n < OUT))


def configuration(m: int, n: int, depth: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BYTES": depth}, num_warps=warps, num_stages=stages)


# Depth is in bytes, so that all dtypes take the same shared memory. The first fits every card from sm_80 on, and its 64
# channels divide most of AlexNet's. Then: more reuse of each load for large batches (128 x 128, 256 x 64), and smaller
# tiles, that occupy all multiprocessors at small ones. The interpreter pays by the operation: few, large tiles.
CONV = Tuned(
    _conv_kernel,
    [configuration(64, 256, 2048, 1, 1)]
    if INTERPRETED
    else [
        configuration(128, 64, 64, 4, 4),
        configuration(128, 128, 64, 8, 4),
        configuration(128, 128, 128, 8, 3),
        configuration(256, 64, 64, 8, 4),
        configuration(64, 64, 128, 4, 4),
    ],
    ["pixels", "height", "width", "PRECISION", "GROUPS", "IN", "OUT", "KERNEL_H", "KERNEL_W", "STRIDE_H", "SPREAD_H"],
)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    sides: list[int],
    form: torch.memory_format,
    *,
    spread: list[int] | tuple[int, int] = (1, 1),
    relu: bool = False,
) -> Tensor:
    """An output of ``sides`` (height, width) in layout ``form``.

    Padding may be negative: the first window then begins inside. ``spread``: x's elements lie so far apart along each
    axis, with zeros between them.
    """
    y = torch.empty((x.shape[0], weight.shape[0], *sides), dtype=x.dtype, device=x.device, memory_format=form)
    if not y.numel():
        return y
    if INTERPRETED and x.dtype == torch.bfloat16:  # its product takes bfloat16's bit patterns for integers
        wide = [None if t is None else t.float() for t in (x, weight, bias)]
        return y.copy_(convolution(*wide, geometry, sides, form, spread=spread, relu=relu))
    x, weight = dense(CHANNELS_LAST, x, weight)
    pixels, out = y.shape[0] * sides[0] * sides[1], weight.shape[0] // geometry.groups
    CONV.launch(
        lambda meta: (triton.cdiv(pixels, meta["BLOCK_M"]) * triton.cdiv(out, meta["BLOCK_N"]), geometry.groups),
        x,
        weight,
        bias,
        y,
        pixels,
        *x.shape[2:],
        *sides,
        *((y[0].numel(), y.shape[1], 1) if form == CHANNELS_LAST else (y[0].numel(), 1, sides[0] * sides[1])),
        geometry.groups,
        *weight.shape[1:2],
        out,
        *weight.shape[2:],
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        *spread,
        RELU=relu,
        PRECISION=precision(x),
        ACC=accumulator(x),
    )
    return y


def precision(x: Tensor) -> str:
    """float32 products run on tensor cores, in TF32, if torch lets convolutions do so."""
    tf32 = x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def input_gradient(
    dz: Tensor, weight: Tensor, geometry: Geometry, sides: list[int], form: torch.memory_format
) -> Tensor:
    """∂L/∂x for an input of ``sides``, from ∂L/∂z."""
    by_group = weight.unflatten(0, (geometry.groups, -1))
    turned = by_group.transpose(1, 2).flip(3, 4).flatten(0, 1)
    padding = [d * (k - 1) - p for d, k, p in zip(geometry.dilation, weight.shape[2:], geometry.padding, strict=True)]
    transposed = Geometry([1, 1], padding, geometry.dilation, geometry.groups)
    return convolution(dz, turned, None, transposed, sides, form, spread=geometry.stride)


# ---- The gradient of the weight --------------------------------------------------------------------------------------


@triton.jit
def _weight_kernel(
    dz_ptr,
    x_ptr,
    partial_ptr,
    pixels,
    pixels_each,
    height,
    width,
    out_height,
    out_width,
    GROUPS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """partial: (splits, GROUPS · OUT, DEPTH), one split for each run of ``pixels_each`` output pixels."""
    DEPTH: tl.constexpr = KERNEL_H * KERNEL_W * IN
    BLOCK_K: tl.constexpr = BYTES * 8 // x_ptr.dtype.element_ty.primitive_bitwidth
    across = tl.cdiv(DEPTH, BLOCK_N)
    group, split = tl.program_id(1), tl.program_id(2).to(INDEX)
    m = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tap, c = n // IN, n % IN

    begin = split * pixels_each
    end = tl.minimum(begin + pixels_each, pixels)
    total = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(begin, end, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        dz_at = dz_ptr + pixel[None, :].to(tl.int64) * (GROUPS * OUT) + group * OUT + m
        dz = tl.load(dz_at, (m < OUT) & (pixel[None, :] < end), other=0)

        image, in_image = pixel // (out_height * out_width), (pixel % (out_height * out_width)).to(tl.int32)
        top, left = in_image // out_width * STRIDE_H - PAD_H, in_image % out_width * STRIDE_W - PAD_W
        row, inside_rows = source(top[:, None], tap // KERNEL_W, DILATION_H, 1, height)
        column, inside_columns = source(left[:, None], tap % KERNEL_W, DILATION_W, 1, width)
        x_pixel = (image[:, None].to(tl.int64) * height + row) * width + column
        inside = (pixel[:, None] < end) & inside_rows & inside_columns & (n < DEPTH)
        x = tl.load(x_ptr + x_pixel * (GROUPS * IN) + group * IN + c, inside, other=0)
        total = tl.dot(dz, x, total, input_precision=PRECISION, out_dtype=ACC)

    at = (split.to(tl.int64) * (GROUPS * OUT) + group * OUT + m) * DEPTH + n
    tl.store(partial_ptr + at, total, (m < OUT) & (n < DEPTH))


# Chosen likewise.
WEIGHT = Tuned(
    _weight_kernel,
    [configuration(256, 512, 1024, 1, 1)]
    if INTERPRETED
    else [
        configuration(64, 64, 64, 4, 4),
        configuration(64, 128, 64, 4, 4),
        configuration(128, 64, 128, 4, 3),
        configuration(128, 128, 64, 8, 4),
        configuration(128, 128, 128, 8, 3),
    ],
    ["pixels", "pixels_each", "PRECISION", "GROUPS", "IN", "OUT", "KERNEL_H", "KERNEL_W", "STRIDE_H"],
)
PROGRAMS = 512  # that a weight gradient is split into: enough for 132 multiprocessors with four blocks each
PIXELS_EACH = 256  # at least, lest partial results outweigh the input


def weight_gradient(dz: Tensor, x: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """∂L/∂w of ``shape``, in channels_last memory, from ∂L/∂z. The number of splits follows from shapes alone."""
    kernels, into, height, width = shape
    if not dz.numel() or not x.numel():
        return dz.new_zeros(shape).contiguous(memory_format=CHANNELS_LAST)
    if INTERPRETED and x.dtype == torch.bfloat16:  # as in convolution()
        return weight_gradient(dz.float(), x.float(), shape, geometry).to(x.dtype)
    dz, x = dense(CHANNELS_LAST, dz, x)
    pixels, depth, out = dz.shape[0] * dz.shape[2] * dz.shape[3], into * height * width, kernels // geometry.groups
    tiles = triton.cdiv(out, 64) * triton.cdiv(depth, 64) * geometry.groups
    splits = max(1, min(triton.cdiv(PROGRAMS, tiles), pixels // PIXELS_EACH))
    pixels_each = triton.cdiv(pixels, splits)
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, kernels, height, width, into, dtype=sums, device=x.device)
    WEIGHT.launch(
        lambda meta: (
            triton.cdiv(out, meta["BLOCK_M"]) * triton.cdiv(depth, meta["BLOCK_N"]),
            geometry.groups,
            splits,
        ),
        dz,
        x,
        partial,
        pixels,
        pixels_each,
        *x.shape[2:],
        *dz.shape[2:],
        geometry.groups,
        into,
        out,
        height,
        width,
        *geometry.stride,
        *geometry.padding,
        *geometry.dilation,
        PRECISION=precision(x),
        ACC=accumulator(x),
        INDEX=tl.int32 if pixels + pixels_each < 2**31 else tl.int64,
    )
    return partial.sum(0).to(x.dtype).permute(0, 3, 1, 2)


# ---- Folding stride x stride pixels into channels --------------------------------------------------------------------


class Fold:
    """A convolution with stride s over C channels as one with stride 1 over s²·C channels."""

    def __init__(self, x: Tensor, weight: Tensor, geometry: Geometry):
        self.step = geometry.stride[0]
        taps = [triton.cdiv(side, self.step) * self.step for side in weight.shape[2:]]
        seen = [
            self.step * (out - 1) + side for out, side in zip(out_sides(x, weight, *geometry[:3]), taps, strict=True)
        ]
        # Left, right, top, bottom, as F.pad takes them. Pixels that no window sees are cut off.
        (top, left), (height, width) = geometry.padding, x.shape[2:]
        self.image = [left, seen[1] - width - left, top, seen[0] - height - top]
        self.kernel = [0, taps[1] - weight.shape[3], 0, taps[0] - weight.shape[2]]
        self.geometry = Geometry([1, 1], [0, 0], [1, 1], 1)

    @staticmethod
    def pays(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
        """Where a load of x's few channels would be a fraction of a line, and folded ones are not too many."""
        step = geometry.stride[0]
        plain = geometry.stride == [step, step] and geometry.dilation == [1, 1] and geometry.groups == 1
        return plain and step > 1 and x.shape[1] * step * step <= 64 and x.shape[0] > 0

    def fold(self, t: Tensor, pads: list[int]) -> Tensor:
        return F.pixel_unshuffle(F.pad(t, pads), self.step)

    def unfold(self, t: Tensor, pads: list[int]) -> Tensor:
        return F.pad(F.pixel_shuffle(t, self.step), [-p for p in pads])


# ---- Operators -------------------------------------------------------------------------------------------------------


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """relu(conv(x, weight) + bias), in channels_last if x or weight is."""
    form = memory_format(layout_of(x, weight))
    sides = out_sides(x, weight, *geometry[:3])
    bias = None if bias is None else bias.contiguous()
    if Fold.pays(x, weight, geometry):
        fold = Fold(x, weight, geometry)
        x, weight, geometry = fold.fold(x, fold.image), fold.fold(weight, fold.kernel), fold.geometry
    return convolution(x, weight, bias, geometry, sides, form, relu=True)


def backward(dz: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, want: list[bool]) -> tuple[Tensor, Tensor]:
    """(dx, dweight) from ∂L/∂z; those that are not wanted come back empty."""
    form = memory_format(layout_of(x, weight))
    dx, dweight = x.new_empty(0), x.new_empty(0)
    if Fold.pays(x, weight, geometry):
        fold = Fold(x, weight, geometry)
        folded = fold.fold(weight, fold.kernel)
        if want[0]:
            sides = [out + k - 1 for out, k in zip(dz.shape[2:], folded.shape[2:], strict=True)]
            dx = fold.unfold(input_gradient(dz, folded, fold.geometry, sides, CHANNELS_LAST), fold.image)
        if want[1]:
            dweight = weight_gradient(dz, fold.fold(x, fold.image), folded.shape, fold.geometry)
            dweight = fold.unfold(dweight, fold.kernel)
    else:
        if want[0]:
            dx = input_gradient(dz, weight, geometry, x.shape[2:], form)
        if want[1]:
            dweight = weight_gradient(dz, x, weight.shape, geometry)
    return tuple(t.contiguous(memory_format=form) if t.dim() == 4 else t for t in (dx, dweight))


@implements("conv_relu")
def _conv_relu(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> Tensor:
    return forward(x, weight, bias, Geometry(*geometry))


@implements("conv_relu_backward")
def _conv_relu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor | None, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    geometry, want = Geometry(*rest[:4]), rest[4]
    db = dy.new_empty(0)
    if y is not None:
        form = memory_format(y)
        dy, db = epilogue.mask(*dense(form, dy, y), form, want[2])
    elif want[2]:
        db = dy.sum((0, 2, 3))
    return *backward(dy, x, weight, geometry, want[:2]), db
