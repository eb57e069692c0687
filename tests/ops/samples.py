"""The samples that every operator is tested on: one list for correctness, gradients, exactness, power and opcheck.

A sample is an operator, the shapes of its tensors, its other arguments, and the reason why it is here. Its data keep
comparisons across dtypes well posed: where a maximum or a ReLU decides, candidates lie far enough apart that rounding
to bfloat16 cannot make another one win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet_fast import ops
from alexnet_fast.ops import LRN, Pool
from alexnet_fast.reference.linear_relu_dropout import dropout_factors

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "lrn": ops.local_response_norm,
    "max_pool": ops.max_pool2d,
    "epilogue": ops.epilogue,
    "conv_relu": ops.conv_relu,
    "conv_stage": ops.conv_stage,
    "linear_relu": ops.linear_relu,
    "linear_relu_dropout": ops.linear_relu_dropout,
    "lpips_layer": ops.lpips_layer,
}


@dataclass(frozen=True)
class Sample:
    stem: str
    reason: str
    input: tuple[int, ...]
    arguments: dict = field(default_factory=dict)
    weight: tuple[int, ...] | None = None
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.stem}: {self.reason}"

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.input[-3] if self.weight is None else self.weight[0]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensor arguments."""
        shapes = {"input": self.input, "weight": self.weight, "bias": (self.channels,) if self.bias else None}
        return {name: shape for name, shape in shapes.items() if shape is not None}

    def data(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The tensor arguments by name."""
        generator = torch.Generator().manual_seed(seed)
        data = {}
        if self.stem == "lrn":  # a standard deviation of 10 makes the sum of squares count beside k
            data["input"] = 10 * torch.randn(self.input, generator=generator)
        elif self.stem.startswith("linear_relu"):  # sums are multiples of 1/16, exact in bfloat16
            data["input"] = torch.randint(-3, 4, self.input, generator=generator) / 2
            data["weight"] = torch.randint(-2, 3, self.weight, generator=generator) / 8
        elif self.stem == "lpips_layer":
            data["input"] = torch.randn(self.input, generator=generator)
            data["weight"] = torch.rand(self.weight, generator=generator)
        elif self.stem == "conv_relu":
            data["input"] = torch.randn(self.input, generator=generator)
            data["weight"] = torch.randn(self.weight, generator=generator) / prod(self.weight[1:]) ** 0.5
        else:
            data["input"] = untied(self.input, generator)
        if self.stem == "conv_stage":
            data["weight"] = nearly_identity(self.weight, self.arguments.get("groups", 1), generator)
        if self.bias:
            data["bias"] = torch.randint(-8, 5, (self.channels,), generator=generator) / 16
            if "relu" in self.stem:  # where z is 0, z + bias must not sit in ReLU's corner
                data["bias"] += 1 / 32
        return {name: tensor.to(dtype) for name, tensor in data.items()}

    def whole_numbers(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        """The tensor arguments by name, all of them -1, 0 or 1: full of ties, and sums are exact in every dtype."""
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randint(-1, 2, shape, generator=generator).to(dtype) for name, shape in self.shapes.items()}

    def ours(self, data: dict[str, Tensor], backend: str | None = None) -> Tensor:
        return FUNCTIONS[self.stem](**data, **self.arguments, backend=backend)

    def torch(self, data: dict[str, Tensor]) -> Tensor:
        """What PyTorch's own functions make of it."""
        return TORCH[self.stem](**data, **self.arguments)


# ---- Data ----------------------------------------------------------------------------------------------------------


def untied(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Odd multiples of 1/32 in (-1.6, 1.6), any two in a 7x7 window at least 1/16 apart.

    Each plane repeats a 7x7 permutation; 7 is prime, so the pixels that a stride of 2 to 6 picks differ too. Added to a
    bias in sixteenths no value is nearer to 0 than 1/32, and all are exact in bfloat16.
    """
    *planes, height, width = shape
    order = torch.rand(*planes, 49, generator=generator).argsort(-1).unflatten(-1, (7, 7))
    rows, columns = torch.arange(height) % 7, torch.arange(width) % 7
    return (2 * order[..., rows, :][..., columns] - 49) / 32


def nearly_identity(shape: tuple[int, ...], groups: int, generator: torch.Generator) -> Tensor:
    """A convolution that copies one channel and adds at most 1/256 of all others: it keeps ``untied`` so."""
    out, into, height, width = shape
    weight = (torch.rand(shape, generator=generator) - 0.5) / (256 * into * height * width)
    channel = torch.arange(out)
    weight[channel, channel % (out // groups) % into, height // 2, width // 2] = 1
    return weight


# ---- The operators in PyTorch's own functions ----------------------------------------------------------------------


def torch_lrn(input: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1):
    """torch has no 16-bit LRN on CPUs, and its x² overflows in float16: float32, rounded once, stands for it."""
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    parts = [F.local_response_norm(part, size, alpha, beta, k) for part in wide.chunk(groups, 1)]
    return torch.cat(parts, 1).to(input.dtype)


def torch_epilogue(input: Tensor, bias: Tensor | None = None, lrn: LRN | None = None, pool: Pool | None = None):
    y = F.relu(input if bias is None else input + bias[:, None, None])
    if lrn:
        y = torch_lrn(y, *lrn) if y.dim() == 4 else torch_lrn(y[None], *lrn)[0]
    return F.max_pool2d(y, *pool[:3], ceil_mode=pool.ceil_mode) if pool else y


def torch_conv_stage(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, lrn=None, pool=None):
    return torch_epilogue(F.conv2d(input, weight, bias, stride, padding, dilation, groups), lrn=lrn, pool=pool)


def torch_linear_relu(input, weight, bias=None, relu=True):
    y = F.linear(input, weight, bias)
    return F.relu(y) if relu else y


def torch_linear_relu_dropout(input, weight, bias=None, p=0.5, training=True, seed=0):
    """torch's own dropout draws from its generator alone: here the elements that stay are given."""
    y = F.relu(F.linear(input, weight, bias))
    return y * dropout_factors(y, p, torch.tensor([seed], device=y.device)) if training else y


def torch_lpips_layer(input: Tensor, weight: Tensor, spatial: bool = False):
    """In float32 for 16 bits, where 1e-10 is 0."""
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    unit = wide / (wide.square().sum(1, keepdim=True).sqrt() + 1e-10)
    distance = F.conv2d(
        (unit[: len(unit) // 2] - unit[len(unit) // 2 :]) ** 2, weight.to(wide.dtype)[None, :, None, None]
    )
    return distance if spatial else distance.mean((2, 3), keepdim=True)


TORCH: dict[str, Callable[..., Tensor]] = {
    "lrn": torch_lrn,
    "max_pool": F.max_pool2d,
    "epilogue": torch_epilogue,
    "conv_relu": torch_conv_stage,
    "conv_stage": torch_conv_stage,
    "linear_relu": torch_linear_relu,
    "linear_relu_dropout": torch_linear_relu_dropout,
    "lpips_layer": torch_lpips_layer,
}


# ---- The list ------------------------------------------------------------------------------------------------------


def lrn(reason: str, input: tuple[int, ...], size: int, **arguments) -> Sample:
    return Sample("lrn", reason, input, {"size": size, **arguments})


def max_pool(reason: str, input: tuple[int, ...], kernel_size, stride=None, padding=0, **arguments) -> Sample:
    window = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    return Sample("max_pool", reason, input, {**window, **arguments})


def epilogue(reason: str, input: tuple[int, ...], *, bias: bool = True, **arguments) -> Sample:
    return Sample("epilogue", reason, input, arguments, bias=bias)


def conv_relu(reason: str, input: tuple[int, ...], weight: tuple[int, ...], *, bias: bool = True, **arguments):
    return Sample("conv_relu", reason, input, arguments, weight, bias)


def linear_relu(reason: str, input: tuple[int, ...], weight: tuple[int, ...], *, bias: bool = True, **arguments):
    return Sample("linear_relu", reason, input, arguments, weight, bias)


def linear_relu_dropout(reason: str, input: tuple[int, ...], weight: tuple[int, ...], *, bias: bool = True, **more):
    return Sample("linear_relu_dropout", reason, input, {"seed": 7, **more}, weight, bias)


def lpips_layer(reason: str, input: tuple[int, ...], **arguments) -> Sample:
    return Sample("lpips_layer", reason, input, arguments, (input[1],))


def conv_stage(reason: str, input: tuple[int, ...], weight: tuple[int, ...], *, bias: bool = True, **arguments):
    return Sample("conv_stage", reason, input, arguments, weight, bias)


PAPER = LRN(5, 5e-4, 0.75, 2.0)
SMALL = LRN(5, 1e-3)  # small enough to leave the order of `untied` as it is, so that a pool after it is well posed
OVERLAPPING = Pool(3, 2)

SAMPLES = [
    lrn("the 2012 paper", (2, 24, 5, 7), 5, alpha=5e-4, k=2.0),
    lrn("torch's defaults", (2, 16, 4, 4), 5),
    lrn("a window of one channel", (2, 8, 3, 3), 1, alpha=0.02),
    lrn("even window of 2", (2, 8, 3, 5), 2, alpha=0.02),
    lrn("window of 3", (2, 10, 3, 5), 3, alpha=0.02),
    lrn("even window of 4", (2, 11, 3, 5), 4, alpha=0.02),
    lrn("even window of 6", (1, 12, 3, 5), 6, alpha=0.02),
    lrn("window of 7", (1, 17, 3, 5), 7, alpha=0.02),
    lrn("a window wider than the channels", (2, 4, 3, 3), 11, alpha=0.02),
    lrn("one channel", (2, 1, 3, 3), 5, alpha=0.02),
    lrn("windows end at the border of two towers", (2, 16, 3, 3), 5, alpha=0.02, groups=2),
    lrn("groups narrower than the window", (2, 15, 3, 3), 7, alpha=0.02, groups=5),
    lrn("a group a channel", (2, 6, 3, 3), 4, alpha=0.02, groups=6),
    lrn("channels not a multiple of 8", (2, 13, 4, 4), 5, alpha=0.02),
    lrn("beta 1/2", (2, 9, 3, 3), 5, alpha=0.02, beta=0.5),
    lrn("beta 1", (2, 9, 3, 3), 5, alpha=0.02, beta=1.0),
    lrn("beta without a short cut", (2, 9, 3, 3), 5, alpha=0.02, beta=0.6),
    lrn("beta 0", (2, 9, 3, 3), 5, alpha=0.02, beta=0.0),
    lrn("one pixel", (3, 20, 1, 1), 5, alpha=0.02),
    lrn("several pieces of work", (2, 48, 21, 23), 5, alpha=5e-4, k=2.0),
    lrn("more channels than a tile", (1, 300, 2, 3), 5, alpha=5e-4, k=2.0),
    lrn("(N, C, L)", (2, 8, 7), 3, alpha=0.02),
    lrn("(N, C, D, H, W)", (2, 8, 2, 3, 2), 3, alpha=0.02),
    lrn("batch 0", (0, 8, 3, 3), 5),
    max_pool("AlexNet's overlapping windows", (2, 8, 13, 13), 3, 2),
    max_pool("windows side by side", (2, 8, 8, 8), 2),
    max_pool("stride 1, window of 2", (2, 5, 7, 9), 2, 1),
    max_pool("stride 1, window of 4", (2, 5, 7, 9), 4, 1),
    max_pool("stride 1, window of 5, padded", (2, 5, 7, 9), 5, 1, 2),
    max_pool("stride 1, window of 6, padded", (1, 5, 7, 9), 6, 1, 3),
    max_pool("window of 7", (1, 5, 15, 16), 7, 3, 3),
    max_pool("pixels that no window sees", (2, 5, 11, 12), 2, 3),
    max_pool("rectangular", (2, 5, 9, 8), (3, 2), (1, 2), (1, 0)),
    max_pool("a row", (2, 5, 6, 8), (1, 3), (1, 1), (0, 1)),
    max_pool("rounding up, as Caffe", (2, 5, 8, 9), 3, 2, ceil_mode=True),
    max_pool("rounding up would begin in the padding", (2, 5, 5, 6), 2, 2, 1, ceil_mode=True),
    max_pool("the window is the image", (2, 6, 5, 7), (5, 7)),
    max_pool("a window that reaches past the image on both sides", (2, 6, 1, 2), 4, 2, 2),
    max_pool("one pixel", (2, 6, 1, 1), 1),
    max_pool("channels not a multiple of 8", (2, 13, 7, 7), 3, 2),
    max_pool("wider than a register", (1, 3, 9, 71), 3, 2),
    max_pool("several pieces of work", (2, 40, 27, 27), 3, 2),
    max_pool("(C, H, W)", (6, 7, 7), 3, 2),
    max_pool("batch 0", (0, 6, 7, 7), 3, 2),
    epilogue("bias and ReLU", (2, 8, 5, 7)),
    epilogue("ReLU alone", (2, 8, 5, 7), bias=False),
    epilogue("LRN", (2, 16, 4, 5), lrn=PAPER),
    epilogue("LRN without bias, even window, two towers", (2, 12, 4, 5), bias=False, lrn=LRN(4, 0.2, groups=2)),
    epilogue("pool", (2, 8, 13, 13), pool=OVERLAPPING),
    epilogue("pool without bias", (2, 8, 9, 9), bias=False, pool=OVERLAPPING),
    epilogue("LRN and pool", (2, 16, 13, 13), lrn=SMALL, pool=OVERLAPPING),
    epilogue("LRN and pool, channels not a multiple of 8", (2, 13, 7, 9), lrn=SMALL, pool=Pool(2)),
    epilogue("padded pool, rounding up", (2, 5, 8, 9), pool=Pool(3, 2, 1, True)),
    epilogue("LRN and padded pool, stride 1", (2, 5, 6, 5), lrn=SMALL, pool=Pool((3, 5), 1, (1, 2))),
    epilogue("pixels that no window sees", (2, 5, 11, 12), pool=Pool(2, 3)),
    epilogue("one pixel", (3, 7, 1, 1), lrn=PAPER, pool=Pool(1)),
    epilogue("several pieces of an image", (1, 256, 12, 13)),
    epilogue("several pieces of work", (2, 40, 27, 27), lrn=SMALL, pool=OVERLAPPING),
    epilogue("several pieces of work, no LRN", (2, 40, 27, 27), pool=OVERLAPPING),
    epilogue("(C, H, W)", (6, 7, 7), lrn=SMALL, pool=OVERLAPPING),
    epilogue("batch 0", (0, 6, 7, 7), lrn=SMALL, pool=OVERLAPPING),
    conv_relu("AlexNet's first", (2, 3, 35, 35), (8, 3, 11, 11), stride=4, padding=2),
    conv_relu("3x3", (2, 8, 6, 7), (12, 8, 3, 3), padding=1),
    conv_relu("two towers", (2, 8, 6, 7), (6, 4, 5, 5), padding=2, groups=2),
    conv_relu("no bias", (2, 8, 6, 7), (6, 8, 3, 3), bias=False),
    conv_relu("1x1", (2, 7, 5, 5), (9, 7, 1, 1)),
    conv_relu("a channel alone", (2, 6, 5, 5), (6, 1, 3, 3), groups=6),
    conv_relu("rectangular", (2, 5, 9, 7), (3, 5, 3, 2), stride=(2, 1), padding=(0, 1)),
    conv_relu("dilated", (2, 5, 9, 9), (4, 5, 3, 3), dilation=2),
    conv_relu("padding 'same'", (2, 5, 6, 6), (4, 5, 5, 3), padding="same"),
    conv_relu("padding 'valid'", (2, 5, 6, 6), (4, 5, 3, 3), padding="valid"),
    conv_relu("padding wider than the window", (1, 3, 4, 4), (4, 3, 3, 3), padding=5),
    conv_relu("(C, H, W)", (5, 6, 6), (4, 5, 3, 3), padding=1),
    conv_relu("batch 0", (0, 5, 6, 6), (4, 5, 3, 3), padding=1),
    conv_stage("AlexNet's first", (2, 3, 51, 51), (16, 3, 11, 11), stride=4, padding=2, lrn=SMALL, pool=OVERLAPPING),
    conv_stage("two towers", (2, 8, 9, 9), (12, 4, 5, 5), padding=2, groups=2, pool=OVERLAPPING),
    conv_stage("LRN within towers", (1, 8, 6, 6), (12, 4, 3, 3), padding=1, groups=2, lrn=LRN(5, 0.2, groups=2)),
    conv_stage("no bias", (2, 5, 7, 7), (6, 5, 3, 3), bias=False, padding=1, pool=Pool(3, 2, 1, True)),
    conv_stage("neither LRN nor pool", (2, 5, 7, 7), (6, 5, 3, 3), padding=1),
    conv_stage("(C, H, W)", (5, 7, 7), (6, 5, 3, 3), padding=1, pool=OVERLAPPING),
    conv_stage("batch 0", (0, 5, 7, 7), (6, 5, 3, 3), padding=1, lrn=SMALL, pool=OVERLAPPING),
    linear_relu("a classifier's layer", (4, 24), (12, 24)),
    linear_relu("one row", (1, 32), (17, 32)),
    linear_relu("eight rows", (8, 40), (9, 40)),
    linear_relu("many rows", (70, 16), (300, 16)),
    linear_relu("the last layer", (2, 16), (10, 16), relu=False),
    linear_relu("no bias", (5, 7), (6, 7), bias=False),
    linear_relu("(C,)", (20,), (12, 20)),
    linear_relu("batch 0", (0, 8), (6, 8)),
    linear_relu_dropout("a classifier's layer", (4, 20), (12, 20)),
    linear_relu_dropout("three quarters zeroed", (3, 9), (40, 9), p=0.75),
    linear_relu_dropout("nothing zeroed", (4, 20), (12, 20), p=0.0),
    linear_relu_dropout("in evaluation", (4, 20), (12, 20), training=False),
    linear_relu_dropout("no bias", (5, 7), (6, 7), bias=False),
    linear_relu_dropout("several pieces of work", (70, 16), (300, 16)),
    linear_relu_dropout("(C,)", (20,), (12, 20)),
    linear_relu_dropout("batch 0", (0, 8), (6, 8)),
    lpips_layer("mean over pixels", (4, 16, 5, 7)),
    lpips_layer("of each pixel", (4, 16, 5, 7), spatial=True),
    lpips_layer("channels not a multiple of 8", (2, 13, 6, 3)),
    lpips_layer("more channels than a tile", (2, 300, 2, 3)),
    lpips_layer("one pixel", (6, 20, 1, 1), spatial=True),
    lpips_layer("several pieces of work", (4, 64, 21, 23)),
    lpips_layer("several pieces of work, of each pixel", (4, 40, 27, 27), spatial=True),
    lpips_layer("batch 0", (0, 8, 3, 3)),
]

# Operators whose results on whole numbers are no whole numbers.
ROUNDED = ("lrn", "lpips_layer")
