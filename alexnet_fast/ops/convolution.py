"""What conv_relu and conv_stage share: checked arguments, output shapes, the switch of their CUDA kernels, weights that
are prepared for these once, and the form by which one of several implementations is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

from alexnet_fast import tuning
from alexnet_fast.geometry import Geometry, IntPair, layout_of, memory_format, out_sides, sides_of
from alexnet_fast.ops.arguments import check_bias, check_groups, check_tensor, pair
from alexnet_fast.ops.registry import LIBRARY, NATIVE, define, empty
from alexnet_fast.reference.augment import space_to_depth
from alexnet_fast.tuning import Form

STRIDE_1 = (1, 1), (0, 0), (1, 1), 1  # the geometry of a convolution over folded images
GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"


def check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntPair,
    padding: IntPair | str,
    dilation: IntPair,
    groups: int,
) -> tuple[Geometry, list[int], str]:
    """The geometry, the output's sides, and what of the arguments only the reference covers."""
    check_tensor("input", input, (3, 4))
    check_tensor("weight", weight, (4,), input)
    groups = check_groups(groups, weight.shape[0], f"weight's {weight.shape[0]} output channels")
    if input.shape[-3] != weight.shape[1] * groups:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} input "
            f"channels, but input has {input.shape[-3]} (shape {tuple(input.shape)})"
        )
    if bias is not None:
        check_bias(bias, weight.shape[0], input)
    steps, dilations = pair("stride", stride, 1), pair("dilation", dilation, 1)
    refusal = ""
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if steps != [1, 1]:
            raise ValueError(f"padding: 'same' needs stride 1, got stride {stride}")
        totals = [d * (side - 1) for d, side in zip(dilations, weight.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            refusal = "padding='same' with an even kernel, which pads one side more than the other"
        padding = [(total + 1) // 2 for total in totals]
    elif isinstance(padding, str):
        raise ValueError(f"padding: expected 'same', 'valid', an int or a pair of ints, got {padding!r}")
    pads = pair("padding", padding, 0)
    return Geometry(steps, pads, dilations, groups), out_sides(input, weight, steps, pads, dilations), refusal


def cuda_refuses(weight: Tensor) -> str:
    return "" if weight.numel() else "a weight without elements"


def flops(x: Sequence[int], weight: Sequence[int], _bias, stride, padding, dilation, *_rest) -> int:
    """Of the convolution alone, a multiply-add counted as two, as torch counts it."""
    return 2 * x[0] * prod(sides_of(x, weight, stride, padding, dilation)) * prod(weight)


def flops_backward(dy: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest) -> int:
    """Of the gradients that are wanted; as torch, with groups too, of all pairs of channels for the weight's."""
    pixels, (want_x, want_weight, _) = dy[0] * prod(dy[2:]), rest[-1]
    return 2 * pixels * (want_x * prod(weight) + want_weight * x[1] * weight[0] * prod(weight[2:]))


def fake(x: Tensor, weight: Tensor, stride, padding, dilation) -> Tensor:
    """The convolution's output, unwritten."""
    sides = out_sides(x, weight, stride, padding, dilation)
    return empty(x, [x.shape[0], weight.shape[0], *sides], layout_of=layout_of(x, weight))


def autocast(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """Convolutions run in autocast's dtype; float64 stays, as in torch."""

    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    return cast(x), cast(weight), cast(bias)


# ---- Images that come folded -----------------------------------------------------------------------------------------


def is_folded(x: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> bool:
    """Whether ``x`` are images as ops.augment folds them for this convolution, which no others have the channels of."""
    return (
        x.dim() == 4
        and (dilation, groups) == STRIDE_1[2:]
        and type(stride) is type(padding) is tuple
        and prod(stride) > 1
        and x.shape[1] == weight.shape[1] * prod(stride)
    )


def fold_weight(weight: Tensor, stride: Sequence[int]) -> Tensor:
    """The weight by which a convolution of stride 1 makes of folded images what ``weight`` makes of plain ones, filled
    up with zeros to whole strides: AlexNet's (K, 3, 11, 11) is (K, 48, 3, 3). It has gradients."""
    sides = [-(-side // step) for side, step in zip(weight.shape[2:], stride, strict=True)]
    return space_to_depth(weight, stride, (0, 0), sides)


# ---- Weights that are prepared once ----------------------------------------------------------------------------------

CHUNK = 16  # bytes of channels that csrc/cuda reads at once, from a multiple of 16 on


def read_as_it_is(weight: Tensor) -> bool:
    """Whether csrc/cuda's convolutions read ``weight`` where it lies. Any other they bring into their form first, in
    each call: channels_last, and folded where channels do not fill whole chunks (csrc/cuda/common/conv.cuh)."""
    return (
        weight.shape[1] * weight.itemsize % CHUNK == 0
        and weight.is_contiguous(memory_format=torch.channels_last)
        and weight.data_ptr() % CHUNK == 0
    )


def _fake_prepare(weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    unit = CHUNK // weight.itemsize
    filters, channels, *kernel = weight.shape
    chunks = prod(kernel) * -(-channels // unit)
    if channels % unit and list(dilation) == [1, 1]:  # space to depth, where that is less
        taps = prod(-(-side // step) for side, step in zip(kernel, stride, strict=True))
        chunks = min(chunks, taps * -(-channels * prod(stride) // unit))
    return weight.new_empty(filters * chunks * unit)


def _no_gradient(*_):
    raise RuntimeError("alexnet_fast::conv_prepare is not differentiable: a convolution's gradient is its weight's own")


# weight as csrc/cuda's convolutions read it, in one dimension: what their operators take as `prepared`, beside the
# weight itself, whose shape and layout still count.
define(
    "conv_prepare",
    "(Tensor weight, int[2] stride, int[2] dilation) -> Tensor",
    fake=_fake_prepare,
    backward=_no_gradient,
    families=(NATIVE,),
)

Find = Callable[[Tensor, tuple[int, ...], tuple[int, ...]], Tensor | None]
_find: ContextVar[Find | None] = ContextVar("find", default=None)


@contextmanager
def prepared_by(find: Find) -> Iterator[None]:
    """Within, this thread's convolutions ask ``find(weight, stride, dilation)`` for each weight that is not read as it
    is; where it returns None they prepare the weight themselves."""
    token = _find.set(find)
    try:
        yield
    finally:
        _find.reset(token)


def _prepared(_x: Tensor, weight: Tensor, _bias: Tensor | None, stride, _padding, dilation, *_) -> Tensor | None:
    find = _find.get()
    return None if find is None or read_as_it_is(weight) else find(weight, tuple(stride), tuple(dilation))


def _takes_prepared(name: str) -> bool:
    return not name.endswith("backward")


# ---- This package's own kernels --------------------------------------------------------------------------------------


def own_kernel(name: str) -> Callable:
    """csrc's operator ``NAME_kernel``, told whether torch, at the call, lets float32 operands be rounded to TF32.

    torch.backends.cudnn.allow_tf32, the older switch, sets the one that is read here. ``tile``: which row of the
    kernel's table of tiles is taken, from 1; with 0 the launcher estimates.
    """
    kernel = getattr(torch.ops.alexnet_fast, f"{name}_kernel").default
    if _takes_prepared(name):
        return lambda *args, tile=0: kernel(*args, allows_tf32(), tile, _prepared(*args))
    return lambda *args, tile=0: kernel(*args, allows_tf32(), tile)


def sm90_kernel(name: str) -> Callable:
    """csrc's operator ``NAME_sm90``, told of TF32 as :func:`own_kernel`'s."""
    kernel = getattr(torch.ops.alexnet_fast, f"{name}_sm90").default
    if _takes_prepared(name):
        return lambda *args: kernel(*args, allows_tf32(), _prepared(*args))
    return lambda *args, **further: kernel(*args, allows_tf32(), **further)


def by_tile(operator: str, candidate: str, call: Callable) -> dict[str, Callable]:
    """The candidate once with each tile of ``tuning.TILES``, which ``call`` takes by its number, as ``tile=``."""

    def with_tile(name: str) -> Callable:
        def candidate_with_tile(first: Tensor, *rest):
            names = tuning.tiles(operator, candidate, first.dtype, allows_tf32())
            return call(first, *rest, tile=1 + names.index(name))

        return candidate_with_tile

    names = dict.fromkeys(name for table in tuning.TILES[operator][candidate].values() for name in table)
    return {f"{candidate}:{name}": with_tile(name) for name in names}


def allows_tf32() -> bool:
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def form(operator: str, x: Tensor, weight: Tensor, stride, padding, dilation, groups: int, *stage) -> Form:
    """What :mod:`alexnet_fast.tuning` chooses by; ``stage``: of conv_stage, the LRN's size, the pool's kernel, whether
    it is for training."""
    layout = str(memory_format(layout_of(x, weight))).removeprefix("torch.")
    lrn, pool, training = stage or (0, (0, 0), False)
    return Form(
        *(operator, x.dtype, tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), tuple(dilation)),
        *(groups, layout, lrn, tuple(pool), training, x.dtype == torch.float32 and allows_tf32()),
        torch._C._get_cudnn_deterministic(),
    )


def _of_own(name: str, schema: str, further: str = "") -> str:
    """``schema`` with the arguments that csrc's operators have beyond it."""
    arguments, returns = schema.split(") ->")
    prepared = ", Tensor? prepared=None" if _takes_prepared(name) else ""
    return f"{arguments}{further}{prepared}) ->{returns}"


def define_own_kernel(name: str, schema: str) -> None:
    """Makes that operator the CUDA implementation of ``NAME_cuda``, in whose own schema the switch would be frozen into
    compiled graphs, as would a tile."""
    LIBRARY.define(f"{name}_kernel{_of_own(name, schema, ', bool allow_tf32, int tile')}")
    LIBRARY.impl(f"{name}_cuda", own_kernel(name), "CUDA")


def define_sm90(name: str, schema: str, fake: Callable, further: str = "") -> None:
    """csrc/cuda/sm90's kernel, by a name of its own: on GPUs of compute capability 9.0 for tensors of 16 bits, or of
    float32 that may be rounded to TF32, an error elsewhere and for what it does not cover. No GPU has run these yet:
    they are taken only where they were measured, and their results compared with cuDNN's."""
    LIBRARY.define(
        f"{name}_sm90{_of_own(name, schema, f', bool allow_tf32{further}')}", tags=(torch.Tag.pt2_compliant_tag,)
    )
    torch.library.register_fake(f"alexnet_fast::{name}_sm90", fake, lib=LIBRARY)
