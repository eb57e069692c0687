"""Convolutions as cases of their launchers, and what must come out."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .host_build import Case
from .params import DTYPES, ConvParams, StageParams, Window


@dataclass(frozen=True)
class Mode:
    """How a kernel forms its products."""

    name: str
    dtype: torch.dtype
    allow_tf32: bool = False

    def __str__(self) -> str:
        return self.name


BF16, F16 = Mode("bf16", torch.bfloat16), Mode("f16", torch.float16)
TF32, F32 = Mode("tf32", torch.float32, True), Mode("f32", torch.float32)
MODES = [BF16, F16, TF32, F32]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Axes as in csrc/params.h; ``tile`` is a row of the kernel's table, 0 for its own choice."""

    reason: str
    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    tile: int = 0

    def __str__(self) -> str:
        return self.reason

    @property
    def out(self) -> Pair:
        axes = zip((self.height, self.width), self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in axes)

    def params(self, mode: Mode) -> ConvParams:
        return ConvParams(
            dtype=DTYPES[mode.dtype],
            allow_tf32=mode.allow_tf32,
            tile=self.tile,
            batch=self.batch,
            channels=self.channels,
            height=self.height,
            width=self.width,
            out_channels=self.out_channels,
            out_height=self.out[0],
            out_width=self.out[1],
            window=Window(*self.kernel, *self.stride, *self.padding),
            dilation_h=self.dilation[0],
            dilation_w=self.dilation[1],
            groups=self.groups,
        )

    def data(self, whole_numbers: bool) -> dict[str, Tensor]:
        """x, weight and, if the shape has one, bias, in float64. Whole numbers are so small that all sums are exact in
        every dtype; a bias of 2 to 4 keeps most outputs above the ReLU's corner."""
        generator = torch.Generator().manual_seed(0)
        sizes = {
            "x": (self.batch, self.channels, self.height, self.width),
            "weight": (self.out_channels, self.channels // self.groups, *self.kernel),
        }
        if self.bias:
            sizes["bias"] = (self.out_channels,)
        if not whole_numbers:
            return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
        found = {name: torch.randint(-1, 2, size, generator=generator).double() for name, size in sizes.items()}
        return found | ({"bias": found["bias"] + 3} if self.bias else {})

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def put(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as the launchers read it: in that dtype, images and kernels channels_last."""
    tensor = tensor.to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


# ---- Cases -----------------------------------------------------------------------------------------------------------


def forward(shape: Shape, mode: Mode, whole_numbers: bool = True, **case) -> tuple[Case, dict[str, Tensor]]:
    """The case, and its outputs in float64 from the data as ``mode``'s dtype holds it."""
    inputs = {name: put(tensor, mode.dtype) for name, tensor in shape.data(whole_numbers).items()}
    exact = F.relu(shape.convolution(**{name: tensor.double() for name, tensor in inputs.items()}))
    outputs = {"y": put(torch.empty_like(exact), mode.dtype)}
    return Case("conv_relu_fwd", shape.params(mode), inputs, outputs, workspace="workspace", **case), {"y": exact}


def gradients(shape: Shape, x: Tensor, weight: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """∂L/∂x, ∂L/∂weight and ∂L/∂bias, in the dtype of its arguments."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    dx, dweight = torch.autograd.grad(shape.convolution(x, weight), (x, weight), masked)
    return {"dx": dx, "dweight": dweight, "dbias": masked.sum((0, 2, 3))}


def backward(
    shape: Shape,
    mode: Mode,
    whole_numbers: bool = True,
    masks: bool = True,
    wanted: tuple[str, ...] = ("dx", "dweight", "dbias"),
    **case,
) -> tuple[Case, dict[str, Tensor]]:
    """As :func:`forward`. ``masks``: dy is masked by the kernel, where y is not positive."""
    data = {name: put(tensor, mode.dtype).double() for name, tensor in shape.data(whole_numbers).items()}
    y = F.relu(shape.convolution(**data))
    generator = torch.Generator().manual_seed(1)
    dy = (
        torch.randint(-1, 2, y.shape, generator=generator)
        if whole_numbers
        else torch.randn(y.shape, generator=generator)
    )
    dy = put(dy, mode.dtype)
    exact = gradients(shape, data["x"], data["weight"], dy.double() * (y > 0) if masks else dy.double())
    inputs = {"x": data["x"].detach(), "weight": data["weight"].detach(), "dy": dy} | ({"y": y} if masks else {})
    inputs = {name: put(tensor, mode.dtype) for name, tensor in inputs.items()}
    exact = {name: exact[name] for name in wanted}
    outputs = {name: put(torch.empty_like(tensor), mode.dtype) for name, tensor in exact.items()}
    return Case("conv_relu_bwd", shape.params(mode), inputs, outputs, workspace="workspace", **case), exact


def folded(shape: Shape, weight: Tensor) -> Tensor:
    """``weight`` as the kernels read it, in one dimension: by pixels of the fold in which its depth is the smallest,
    their channels filled up to whole chunks."""
    unit = 16 // weight.itemsize
    filters, channels, *kernel = weight.shape

    def chunks(fold: Pair) -> int:
        taps = prod(-(-side // factor) for side, factor in zip(kernel, fold, strict=True))
        return taps * -(-channels * prod(fold) // unit)

    folds = channels % unit != 0 and shape.dilation == (1, 1) and chunks(shape.stride) < chunks((1, 1))
    height, width = shape.stride if folds else (1, 1)
    whole = F.pad(weight, (0, -kernel[1] % width, 0, -kernel[0] % height))
    rows, columns = whole.shape[2] // height, whole.shape[3] // width
    pixels = whole.reshape(filters, channels, rows, height, columns, width).permute(0, 2, 4, 3, 5, 1).flatten(3)
    return F.pad(pixels, (0, -pixels.shape[3] % unit)).flatten()


def prepared(shape: Shape, case: Case, exact: dict[str, Tensor]) -> tuple[Case, dict[str, Tensor]]:
    """A forward launcher's case, as of a weight that conv_prepare has written."""
    case.params.prepared = True
    return replace(case, inputs=case.inputs | {"weight": folded(shape, case.inputs["weight"])}), exact


# ---- Shapes ----------------------------------------------------------------------------------------------------------

EDGES = [
    Shape("3x3", 2, 16, 6, 7, 24, (3, 3), padding=(1, 1)),
    Shape("no bias", 1, 16, 5, 5, 8, (3, 3), bias=False),
    Shape("1x1", 2, 24, 5, 5, 40, (1, 1)),
    Shape("one pixel, one channel", 1, 1, 1, 1, 1, (1, 1)),
    Shape("one chunk of depth", 1, 8, 3, 3, 8, (1, 1)),
    Shape("AlexNet's first: space to depth", 1, 3, 35, 35, 64, (11, 11), (4, 4), (2, 2)),
    Shape("space to depth, rectangular", 2, 3, 17, 20, 9, (5, 7), (2, 3), (2, 1)),
    Shape("space to depth leaves a rest of the image", 1, 3, 22, 23, 8, (3, 3), (4, 4), (0, 1)),
    Shape("stride wider than the kernel", 2, 3, 13, 13, 8, (2, 2), (5, 4)),
    Shape("strided over whole chunks", 2, 16, 9, 11, 16, (3, 3), (2, 2), (1, 1)),
    Shape("AlexNet's second, one tower", 1, 48, 7, 7, 32, (5, 5), padding=(2, 2)),
    Shape("two towers", 1, 32, 6, 6, 48, (3, 3), padding=(1, 1), groups=2),
    Shape("two towers of odd channels", 2, 14, 5, 6, 10, (3, 3), padding=(1, 1), groups=2),
    Shape("towers end within a tile of columns", 1, 48, 5, 5, 3 * 72, (1, 1), groups=3),
    Shape("a channel alone", 2, 6, 5, 5, 6, (3, 3), padding=(1, 1), groups=6),
    Shape("channels multiply", 2, 4, 5, 5, 12, (2, 3), groups=4),
    Shape("whole chunks in float32 alone", 1, 12, 6, 6, 20, (3, 3), padding=(1, 1)),
    Shape("one channel", 2, 1, 9, 9, 5, (3, 3), padding=(1, 1)),
    Shape("dilated", 1, 8, 11, 11, 16, (3, 3), padding=(2, 2), dilation=(2, 2)),
    Shape("dilated, one axis, strided", 1, 8, 9, 14, 8, (3, 3), (2, 3), (3, 0), (3, 2)),
    Shape("dilated and few channels", 1, 3, 11, 11, 16, (3, 3), (2, 2), (2, 2), (2, 2)),
    Shape("padding wider than the kernel", 1, 8, 3, 3, 8, (2, 2), padding=(4, 5)),
    Shape("kernel larger than the image", 1, 8, 2, 3, 8, (5, 6), padding=(2, 3)),
    Shape("a row", 2, 16, 1, 19, 8, (1, 5), padding=(0, 2)),
    Shape("a column", 2, 16, 19, 1, 8, (5, 1), padding=(2, 0)),
    Shape("several tiles of rows", 1, 8, 15, 14, 8, (3, 3), padding=(1, 1)),
    Shape("several tiles of columns", 1, 8, 4, 4, 264, (1, 1)),
    Shape("depth ends within a slab", 1, 40, 4, 4, 8, (1, 1)),
    Shape("channels wrap within a slab", 1, 8, 5, 5, 8, (2, 2)),
    Shape("several splits of pixels", 2, 8, 19, 18, 8, (1, 2)),
]

# Forward's four rows of 16-bit tiles; float32 has the first two (TF32) or one.
TILES = [Shape(f"tile {tile}", 1, 16, 12, 13, 200, (3, 3), padding=(1, 1), tile=tile) for tile in (1, 2, 3, 4)]
TILES += [Shape(f"tile {tile}, odd", 1, 5, 9, 9, 131, (2, 2), tile=tile) for tile in (1, 2, 3, 4)]
TILE_ROWS = {"bf16": 4, "f16": 4, "tf32": 2, "f32": 1}


def random_shapes(count: int, seed: int, pixels: int = 200, depth: int = 1000) -> list[Shape]:
    """Random shapes, small enough to run in milliseconds: at most ``pixels`` in the batch's output, and ``depth`` in
    the product. A convolution with 64 and 48 is about the smallest that leaves something for each tile."""
    draw = random.Random(seed)
    shapes = []
    while len(shapes) < count:
        groups = draw.choice([1, 1, 1, 2, 3])
        shape = Shape(
            f"random {len(shapes)}",
            batch=draw.choice([1, 1, 2, 3]),
            channels=groups * draw.choice([1, 2, 3, 4, 5, 7, 8, 8, 12, 16, 16, 24, 40]),
            height=draw.randint(1, 12),
            width=draw.randint(1, 12),
            out_channels=groups * draw.choice([1, 3, 4, 6, 8, 8, 13, 16, 24, 33]),
            kernel=(draw.randint(1, 5), draw.randint(1, 5)),
            stride=(draw.choice([1, 1, 1, 2, 3, 4]), draw.choice([1, 1, 1, 2, 3, 4])),
            padding=(draw.randint(0, 3), draw.randint(0, 3)),
            dilation=(draw.choice([1, 1, 1, 2]), draw.choice([1, 1, 1, 2])),
            groups=groups,
            bias=draw.random() < 0.7,
        )
        small = (
            shape.out[0] * shape.out[1] * shape.batch <= pixels
            and shape.channels // groups * prod(shape.kernel) <= depth
        )
        if min(shape.out) > 0 and small:
            shapes.append(shape)
    return shapes


# ---- Stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    shape: Shape
    kernel: Pair
    stride: Pair
    padding: Pair = (0, 0)
    ceil_mode: bool = False
    codes: bool = True

    def __str__(self) -> str:
        return self.shape.reason

    @property
    def window(self) -> Window:
        return Window(*self.kernel, *self.stride, *self.padding)

    def pool(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled tensor, and codes: winners as places in the uncut window, 255 where the maximum is 0."""
        y, index = F.max_pool2d(
            r, self.kernel, self.stride, self.padding, ceil_mode=self.ceil_mode, return_indices=True
        )
        row, column = index // r.shape[3], index % r.shape[3]
        top = torch.arange(y.shape[2])[:, None] * self.stride[0] - self.padding[0]
        left = torch.arange(y.shape[3]) * self.stride[1] - self.padding[1]
        return y, torch.where(y <= 0, 255, self.kernel[1] * (row - top) + column - left).to(torch.uint8)


def stage(stage: Stage, mode: Mode, **case) -> tuple[Case, dict[str, Tensor]]:
    """As :func:`forward`, with whole numbers, for a stage that pools."""
    inputs = {name: put(tensor, mode.dtype) for name, tensor in stage.shape.data(True).items()}
    r = F.relu(stage.shape.convolution(**{name: tensor.double() for name, tensor in inputs.items()}))
    y, code = stage.pool(r)
    params = StageParams(
        conv=stage.shape.params(mode), pool=stage.window, pooled_height=y.shape[2], pooled_width=y.shape[3]
    )
    outputs = {"pooled": put(torch.empty_like(y), mode.dtype)} | (
        {"code": put(code, torch.uint8)} if stage.codes else {}
    )
    exact = {"pooled": y} | ({"code": code} if stage.codes else {})
    return Case("conv_stage_fwd", params, inputs, outputs, workspace="workspace", **case), exact


def stages(count: int, seed: int, **limits: int) -> list[Stage]:
    """AlexNet's overlapping windows over the listed shapes, long rows, windows apart, and random ones."""
    found = [Stage(shape, (3, 3), (2, 2)) for shape in EDGES if min(shape.out) >= 3]
    for tile, width, half in ((1, 131, 61), (2, 67, 37)):
        tiled = {"padding": (1, 1), "tile": tile}
        found += [
            Stage(Shape(f"13 x 13, tile {tile}", 1, 16, 13, 13, 136, (3, 3), **tiled), (3, 3), (2, 2)),
            Stage(Shape(f"27 x 27, tile {tile}", 2, 8, 27, 27, 24, (3, 3), **tiled), (3, 3), (2, 2)),
            Stage(
                Shape(f"rows longer than half a tile, tile {tile}", 1, 8, 9, half, 24, (1, 1), tile=tile),
                (3, 3),
                (2, 2),
                (1, 1),
                True,
            ),
            Stage(Shape(f"rows longer than a tile, tile {tile}", 1, 8, 5, width, 8, (1, 1), tile=tile), (1, 3), (1, 2)),
            Stage(Shape(f"windows apart, tile {tile}", 1, 8, 25, 11, 8, (1, 1), tile=tile), (2, 2), (5, 3)),
        ]
    draw = random.Random(seed)
    for shape in random_shapes(count, seed, **limits):
        kernel = tuple(draw.randint(1, min(5, side)) for side in shape.out)
        padding = tuple(draw.randint(0, k // 2) for k in kernel)
        stride = (draw.randint(1, 4), draw.randint(1, 4))
        found.append(Stage(shape, kernel, stride, padding, draw.random() < 0.5, draw.random() < 0.8))
    return found
