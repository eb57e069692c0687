"""csrc/cuda/sm90 on the CPU: bulk copies, mbarriers and wgmma as a card may order them, and the convolution of them.

No GPU has run these kernels.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ..ops.compare import as_exact, error
from . import host_build
from .conv import BF16, EDGES, F16, F32, TF32, Mode, Shape, Stage, backward, forward, gradients, stage
from .host_build import Case, HostFaultError, run_program
from .params import LrnWindow
from .test_conv_relu import CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED, TYPICAL, Expected, check, rounded

GROUPS, TILES = 4, 11  # kMaxGroups, kHalfInPieces
# Of stages' tables: outputs of the longest rows for which shared memory has room.
LONGEST = {2: (66, 35, 60, 130), 4: (128, 42, 76)}
STAGE_TILES = len(LONGEST[2])
FIRST_TILES = 2  # conv_first_fwd.cu's, whose numbers follow

# ---- Words -----------------------------------------------------------------------------------------------------------

HERE = Path(__file__).parent
NOT_LANDED, NO_END = "race: .*a bulk copy to it has not landed", "divergence: thread .* waits forever at the"
# Whether what is overwritten was read by a product or came by a copy is a matter of chance.
OVERWRITTEN = "race: .*(what a wgmma reads that|a bulk copy whose barrier it has not waited for|nobody has waited for)"
# What a report must say in the build `threads`.
FAULTS = {
    "missing_expect": NOT_LANDED,
    "expects_too_much": NO_END,
    "wrong_phase": f"{NOT_LANDED}|{NO_END}|{OVERWRITTEN}",
    "missing_wait": NOT_LANDED,
    "missing_free_wait": f"{NOT_LANDED}|{OVERWRITTEN}",
    "released_too_early": OVERWRITTEN,
    "released_by_one_warp": OVERWRITTEN,
    "arrival_missing": NO_END,
    "arrival_too_many": f"{OVERWRITTEN}|divergence: .* more than the 4 arrivals",
    "missing_init_fence": "uninitialized: .*no mbarrier_init_fence",
    "missing_init_barrier": "uninitialized: thread .* an mbarrier that nobody initialized|race: thread",
    "missing_proxy_fence": "race: .*no async_proxy_fence.. since it was written by thread",
    "missing_syncwarp": "race: .*written with no barrier between by thread|uninitialized",
    "staging_overwritten": "race: .*(a bulk store reads|with no barrier between)",
    "missing_store_wait": "race: .*ends before its bulk store",
    "missing_product_fence": "registers: .*no wgmma_fence",
    "missing_product_wait": f"{OVERWRITTEN}|race: .*before its last wgmma is waited for",
    "wrong_depth_step": "wrong result|race: .*|uninitialized: .*",
    "wrong_swizzle": "wrong result",
    "wrong_corner": "wrong result",
    "wrong_offset": "wrong result",
    "misaligned_stage": "misaligned: .*a bulk copy",
    "lanes_differ": "divergence: .*different products",
    "register_overwritten": "race: thread .* writes a register of A",
    "register_missing_fence": "registers: .*no wgmma_fence",
    "row_missing_wait": f"{NOT_LANDED}|{OVERWRITTEN}",
    "wrong_leading": "wrong result",
    "wrong_stride": "wrong result|race: .*|uninitialized: .*",
    "wrong_tap": "wrong result|race: .*|uninitialized: .*",
    "wrong_layout": "wrong result|race: .*|uninitialized: .*",
    "wrong_axes": "wrong result",
    "product_over_pixels": "wrong result",
    "registers": "registers: setmaxnreg hands out 65536 registers",
}


@cache
def words(kind: str) -> Path:
    return host_build.build(kind, kernels=[], main=HERE / "hopper_faults.cu")


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_reported(fault):
    """The fault is found in the first schedule that is tried, with the thread's number; the same kernel without the
    fault passes several schedules."""
    for kind in host_build.BUILDS:
        run_program([words(kind), fault, "right"])
    with pytest.raises(HostFaultError, match=f"host_simt: ({FAULTS[fault]})") as report:
        run_program([words("threads"), fault, "wrong"])
    assert re.search(r"thread(s from)? \(|row \d+, column \d+", str(report.value))


# ---- Shapes ----------------------------------------------------------------------------------------------------------


def hopper(shape: Shape, mode: Mode, whole_numbers: bool = True, **case) -> Expected:
    """As :func:`forward`, of Hopper's launcher."""
    general, exact = forward(shape, mode, whole_numbers, **case)
    return replace(general, launcher="sm90::conv_relu_fwd"), exact


def of_first(shape: Shape, tile: int) -> Shape:
    """With conv_first_fwd.cu's tile of that number."""
    return replace(shape, tile=TILES + tile)


def hopper_backward(
    shape: Shape, mode: Mode, whole_numbers: bool = True, masks: bool = True, mask_dx: bool = False, **case
) -> Expected:
    """As :func:`backward`, of Hopper's launcher, and of the gradients that it gives. ``mask_dx``: dx is masked too."""
    wanted = ("dx", "dweight", "dbias") if turns(shape, mode) and not shape.tile else ("dweight", "dbias")
    wanted = ("dx",) if mode is TF32 else wanted
    general, exact = backward(shape, mode, whole_numbers, masks, wanted, **case)
    if mask_dx and "dx" in exact:
        general.params.mask_dx = True
        exact["dx"] = exact["dx"].where(general.inputs["x"] > 0, 0)
    return replace(general, launcher="sm90::conv_relu_bwd"), exact


def chunk(mode: Mode) -> int:
    """Elements of 16 bytes."""
    return 16 // mode.dtype.itemsize


def turns(shape: Shape, mode: Mode = BF16) -> bool:
    """Whether the input gradient is covered: its outputs are the channels of x."""
    return shape.stride == (1, 1) and shape.channels // shape.groups % chunk(mode) == 0


def taken(shape: Shape, mode: Mode = BF16) -> bool:
    """What the kernel covers: stride 1, or a stride that the fold of few channels takes away."""
    unit, channels, (stride_h, stride_w) = chunk(mode), shape.channels // shape.groups, shape.stride
    taps = -(-shape.kernel[0] // stride_h) * -(-shape.kernel[1] // stride_w)
    folds = channels % unit != 0 and shape.dilation == (1, 1)
    folds = folds and taps * -(-stride_h * stride_w * channels // unit) < prod(shape.kernel) * -(-channels // unit)
    whole = shape.out_channels // shape.groups % unit == 0
    return (shape.stride == (1, 1) or folds) and whole and shape.groups <= GROUPS


ALEXNET = [
    Shape("torchvision's first", 1, 3, 224, 224, 64, (11, 11), (4, 4), (2, 2)),
    Shape("torchvision's second", 1, 64, 27, 27, 192, (5, 5), padding=(2, 2)),
    Shape("torchvision's third", 2, 192, 13, 13, 384, (3, 3), padding=(1, 1)),
    Shape("torchvision's fourth", 1, 384, 13, 13, 256, (3, 3), padding=(1, 1)),
    Shape("torchvision's fifth", 2, 256, 13, 13, 256, (3, 3), padding=(1, 1)),
    Shape("2012's first", 1, 3, 227, 227, 96, (11, 11), (4, 4)),
    Shape("2012's second, two towers", 1, 96, 27, 27, 256, (5, 5), padding=(2, 2), groups=2),
    Shape("2012's fourth, two towers", 1, 384, 13, 13, 384, (3, 3), padding=(1, 1), groups=2),
    Shape("2012's fifth, two towers", 2, 384, 13, 13, 256, (3, 3), padding=(1, 1), groups=2),
]


def shapes(count: int, seed: int, covers=taken, side: int = 14, depth: int = 600, mode: Mode = BF16) -> list[Shape]:
    """Shapes nobody thought of: ends of tiles, slabs, groups and images anywhere. In float32, whose slabs have half as
    many channels, with half as many."""
    draw = random.Random(seed)
    found: list[Shape] = []
    while len(found) < count:
        groups = draw.choice([1, 1, 1, 2, 3, 4])
        channels = draw.choice([1, 3, 5, 8, 16, 24, 40, 48, 64, 72, 96, 136])
        shape = Shape(
            f"random {len(found)}",
            batch=draw.choice([1, 1, 2, 3]),
            channels=groups * (channels if channels < 8 else channels // 8 * chunk(mode)),
            height=draw.randint(1, side),
            width=draw.randint(1, side),
            out_channels=groups * chunk(mode) * draw.choice([1, 1, 2, 3, 5, 8, 9, 12, 17, 26]),
            kernel=(draw.randint(1, 5), draw.randint(1, 5)),
            stride=draw.choice([(1, 1), (1, 1), (2, 2), (4, 4), (2, 3)]),
            padding=(draw.randint(0, 3), draw.randint(0, 3)),
            dilation=draw.choice([(1, 1), (1, 1), (2, 2), (1, 3)]),
            groups=groups,
            bias=draw.random() < 0.7,
        )
        small = prod(shape.kernel) * shape.channels // groups <= depth
        if min(shape.out) > 0 and small and taken(shape, mode) and covers(shape, mode):
            found.append(shape)
    return found


LISTED = [shape for shape in EDGES if taken(shape)] + [
    Shape(f"tile {tile}", 2, 56, 12, 13, 208, (2, 3), padding=(1, 1), groups=1 + tile % 2, tile=tile)
    for tile in range(1, TILES + 1)
]


modes = pytest.mark.parametrize("mode", [BF16, F16, TF32], ids=str)


@modes
def test_forward(mode):
    """The listed shapes, every tile, and 110 random ones, a fifth of which have their depth cut whether it is worth it
    or not: equal to float64."""
    drawn = shapes(110, seed={BF16: 21, F16: 22, TF32: 23}[mode], mode=mode)
    some = [shape for shape in LISTED if taken(shape, mode)] + [
        replace(shape, tile=TILES - n % 2 if n % 5 == 0 else 0) for n, shape in enumerate(drawn)
    ]
    check("threads", [hopper(shape, mode, seed=number) for number, shape in enumerate(some)])


def test_alexnet():
    """Whole layers, of one image or two; in float32 with an eighth of the outputs."""
    fewer = [replace(shape, out_channels=shape.out_channels // 8) for shape in ALEXNET]
    check("threads", [hopper(shape, BF16) for shape in ALEXNET] + [hopper(shape, TF32) for shape in fewer])


# Folds to 3 x 3 over 33 to 48 channels, and convolutions that are so already: channels, kernel, stride.
FIRST_FORMS = [
    (3, (11, 11), (4, 4)),
    (3, (9, 12), (4, 4)),
    (3, (11, 8), (4, 3)),
    (4, (7, 9), (3, 3)),
    (5, (9, 8), (3, 3)),
    (1, (16, 15), (6, 6)),
    (1, (13, 24), (6, 8)),
    (37, (3, 3), (1, 1)),
    (40, (3, 3), (1, 1)),
    (48, (3, 3), (1, 1)),
]


def first_shapes(count: int, seed: int, least: int = 1) -> list[Shape]:
    """Rows of all lengths around the tiles', ends of bands, filters and images anywhere."""
    draw = random.Random(seed)
    found: list[Shape] = []
    while len(found) < count:
        channels, kernel, stride = draw.choice(FIRST_FORMS)
        out = (
            draw.randint(least, 9),
            draw.choice([draw.randint(least, 20), draw.randint(50, 70), draw.randint(100, 130)]),
        )
        padding = draw.randint(0, 3), draw.randint(0, 3)
        sides = [(o - 1) * s + k - 2 * p for o, s, k, p in zip(out, stride, kernel, padding, strict=True)]
        shape = Shape(
            f"first {len(found)}",
            batch=draw.choice([1, 1, 2, 5]),
            channels=channels,
            height=sides[0],
            width=sides[1],
            out_channels=8 * draw.choice([1, 2, 3, 8, 8, 9, 12, 16]),
            kernel=kernel,
            stride=stride,
            padding=padding,
            bias=draw.random() < 0.7,
        )
        if min(sides) > 0 and prod(out) * shape.batch * shape.out_channels < 30_000:
            found.append(of_first(shape, draw.randint(1, FIRST_TILES)))
    return found


LISTED_FIRST = [
    of_first(shape, tile)
    for tile in range(1, FIRST_TILES + 1)
    for shape in (
        Shape("several bands a block", 3, 3, 99, 99, 64, (11, 11), (4, 4), (2, 2)),
        Shape("two tiles of filters", 2, 3, 63, 59, 96, (11, 11), (4, 4), bias=False),
        Shape("rows longer than a tile, padded", 1, 48, 6, 131, 16, (3, 3), padding=(1, 2)),
        Shape("a pixel", 1, 40, 3, 3, 8, (3, 3)),
        Shape("more padding than the kernel", 1, 40, 4, 57, 24, (3, 3), padding=(5, 4)),
    )
]


@pytest.mark.parametrize("mode", [BF16, F16], ids=str)
def test_first_convolution(mode):
    drawn = first_shapes(30, seed={BF16: 24, F16: 25}[mode])
    check("threads", [hopper(shape, mode, seed=n) for n, shape in enumerate([*LISTED_FIRST, *drawn])])


def test_first_convolution_sanitizers_and_schedules():
    check("address", [hopper(shape, (BF16, F16)[n % 2]) for n, shape in enumerate(LISTED_FIRST + first_shapes(10, 26))])
    for shape in LISTED_FIRST[1], LISTED_FIRST[7]:
        (result,) = host_build.run("threads", [hopper(shape, BF16, False, schedules=6)[0]])
        assert result.error == 0


@pytest.mark.soak
@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_two_hundred_random_first_convolutions(kind):
    some = first_shapes(200, seed=42)
    assert len({replace(shape, reason="") for shape in some}) == 200
    cases = [hopper(shape, (BF16, F16)[n % 2], seed=n) for n, shape in enumerate(some)]
    for first in range(0, 200, 50):
        check(kind, cases[first : first + 50])


def test_first_convolution_as_a_gradient():
    """dx of a convolution with 40 or 48 filters is one, without ReLU and bias; its tile is chosen by estimate. Masked,
    by another kernel, it takes no other memory."""
    some = [
        Shape("3x3", 2, 64, 9, 56, 48, (3, 3), padding=(1, 1)),
        Shape("not padded", 1, 24, 7, 58, 40, (3, 3)),
    ]
    check("threads", [hopper_backward(shape, BF16, mask_dx=masks) for shape in some for masks in (False, True)])


WHOLE, SMALLER, LARGER, SUM = (
    r"conv_relu_fwd<.*4, 2, 128, 4",
    r"conv_split_fwd<.*4, 1, 64, 4",
    r"conv_split_fwd<.*4, 2, 128, 4",
    "conv_add_splits<",
)
FOLD, FIRST = "conv_fold_", r"conv_first_fwd<.*FirstTile<.*, 56>, false"


@pytest.mark.parametrize(
    ("shape", "launched"),
    [
        (ALEXNET[3], [SMALLER, SUM]),
        (replace(ALEXNET[3], batch=64), [WHOLE]),
        (replace(ALEXNET[3], batch=128), [WHOLE, LARGER, SUM]),  # 170 tiles; 132 are a round
        (Shape("one step", 1, 8, 9, 9, 8, (1, 1)), ["conv_relu_fwd<"]),
        (ALEXNET[0], [FOLD, FOLD, FIRST]),
        (replace(ALEXNET[0], batch=128), [FOLD, FOLD, FIRST]),
        (replace(ALEXNET[5], batch=128), [FOLD, FOLD, FIRST]),
        (Shape("rows of half a tile", 128, 48, 27, 27, 64, (3, 3), padding=(1, 1)), ["conv_relu_fwd<"]),
    ],
    ids=str,
)
def test_where_the_depth_is_cut(shape, launched, tmp_path, monkeypatch):
    """Where there are fewer tiles than multiprocessors, and in the tiles that are left over from whole rounds."""
    monkeypatch.setenv("HOST_SIMT_LAUNCHES", str(tmp_path / "launches"))
    monkeypatch.setattr(Shape, "convolution", lambda self, **_: torch.zeros(self.batch, self.out_channels, *self.out))
    host_build.run("threads", [hopper(shape, BF16)[0]])
    names = (tmp_path / "launches").read_text().splitlines()
    assert len(names) == len(launched)
    assert all(map(re.search, launched, names))


def test_sanitizers():
    some = [*LISTED, *shapes(40, seed=23), *ALEXNET[1:7:2]]
    check("address", [hopper(shape, (BF16, F16)[number % 2]) for number, shape in enumerate(some)])
    check("address", [hopper(shape, TF32) for shape in shapes(100, seed=24, side=9, depth=100, mode=TF32)])


def test_schedules():
    """The same bits whatever lands first and runs first."""
    some = [Shape("3x3", 2, 96, 9, 9, 72, (3, 3), padding=(1, 1)), Shape("towers", 1, 96, 8, 9, 80, (2, 2), groups=2)]
    cases = [hopper(shape, BF16, False, schedules=8)[0] for shape in [*some, replace(some[0], tile=TILES - 1)]]
    for case in [*cases, hopper(some[1], TF32, False, schedules=8)[0]]:
        (result,) = host_build.run("threads", [case])
        assert result.error == 0


@modes
def test_as_exact_as_torch(mode):
    """For TF32 PyTorch of operands that were rounded to it before, as in test_conv_relu.py."""
    some = [shape for shape in [*TYPICAL, *LISTED] if taken(shape, mode)]
    some += [] if mode is TF32 else LISTED_FIRST[:3]
    expected = [hopper(shape, mode, False) for shape in some]
    results = host_build.run("threads", [case for case, _ in expected])
    for shape, (case, exact), result in zip(some, expected, results, strict=True):
        x, weight = (rounded(case.inputs[name], mode) for name in ("x", "weight"))
        peer = F.relu(shape.convolution(x, weight, case.inputs.get("bias")))
        y = result.outputs["y"]
        assert as_exact(y, peer, exact["y"]), f"{shape}: {error(y, exact['y']):.3g}, {error(peer, exact['y']):.3g}"


def test_float32_is_rounded():
    """And not cut off after ten bits, which would move every product towards zero: 3/4 of a unit is one."""
    shape, one = Shape("1x1", 2, 8, 5, 5, 8, (1, 1), bias=False), 1 + 3 * 2.0**-12
    forwards, backwards = hopper(shape, TF32), hopper_backward(shape, TF32, masks=False)
    for case, _ in (forwards, backwards):
        for tensor in case.inputs.values():
            tensor.fill_(one)
    y, gradients = host_build.run("threads", [forwards[0], backwards[0]])
    wanted = 8 * (1 + 2.0**-10) ** 2
    assert (y.outputs["y"] == wanted).all()
    assert (gradients.outputs["dx"] == wanted).all()


@modes
def test_values_that_are_not_finite(mode):
    """max(0, NaN) is NaN, infinities stay what they are, and the padding's zeros stay out of it."""
    shape = Shape("3x3", 1, 16, 6, 6, 16, (3, 3), padding=(1, 1))
    (case, _), (back, _) = hopper(shape, mode), hopper_backward(shape, mode)
    x = case.inputs["x"]
    x[0, 0, 1, 1], x[0, 1, 4, 4] = float("nan"), float("inf")
    back.inputs["y"][0, 2, 3, 3] = float("nan")
    back.inputs["dy"][0, 2, 3, 3] = float("inf")
    result, grads = host_build.run("threads", [case, back])
    y = F.relu(shape.convolution(*(case.inputs[name].double() for name in ("x", "weight", "bias"))))
    assert y.isnan().any()
    assert y.isinf().any()
    torch.testing.assert_close(result.outputs["y"].double(), y, rtol=0, atol=0, equal_nan=True)
    masked = torch.ops.aten.threshold_backward(back.inputs["dy"].double(), back.inputs["y"].double(), 0)
    dx = gradients(shape, back.inputs["x"].double(), back.inputs["weight"].double(), masked)["dx"]
    torch.testing.assert_close(grads.outputs["dx"].double(), dx, rtol=0, atol=0, equal_nan=True)


@modes
def test_backward(mode):
    """100 random shapes and the listed ones, dy masked by the launcher or already; AlexNet's third and the towers'. In
    float32 the input's gradient alone."""
    covers = turns if mode is TF32 else taken
    some = [shape for shape in LISTED if not shape.tile and covers(shape, mode)]
    some += shapes(100, seed={BF16: 31, F16: 32, TF32: 34}[mode], covers=covers, mode=mode)
    some += [ALEXNET[2], ALEXNET[6]] if mode == BF16 else []
    masked = [{"masks": n % 2 == 0, "mask_dx": n % 3 == 0, "seed": n} for n in range(len(some))]
    check("threads", [hopper_backward(shape, mode, **case) for shape, case in zip(some, masked, strict=True)])


MASKED = [
    Shape(f"tile {tile}", 2, 208, 12, 13, 24, (2, 3), padding=(1, 1), groups=1 + tile % 2, tile=tile)
    for tile in range(TILES + 1)
]


def dx_alone(shape: Shape, mode: Mode, mask_dx: bool) -> Case:
    case, _ = backward(shape, mode, False, True, ("dx",))
    case.params.mask_dx = mask_dx
    return replace(case, launcher="sm90::conv_relu_bwd")


@modes
def test_dx_is_masked_on_its_way(mode):
    """By each tile, by what adds pieces up, and with groups: the same bits as masked afterwards. A NaN in x lets the
    gradient pass, as in PyTorch."""
    plain, masked = ([dx_alone(shape, mode, mask_dx) for shape in MASKED] for mask_dx in (False, True))
    for case in masked:
        x = case.inputs["x"].relu_()
        x[0, 5, 3, 4] = x[1, 200, 11, 12] = float("nan")
    results = host_build.run("threads", [*plain, *masked])
    for case, one, other in zip(masked, results[: len(plain)], results[len(plain) :], strict=True):
        wanted = one.outputs["dx"].masked_fill(case.inputs["x"] <= 0, 0)
        assert 0.3 < (wanted == 0).float().mean() < 0.7
        assert torch.equal(other.outputs["dx"], wanted), case.params.tile
    misaligned = replace(masked[0], offsets={"x": 8})
    (result,) = host_build.run("threads", [misaligned])
    assert result.error == CUDA_ERROR_NOT_SUPPORTED


@pytest.mark.soak
@pytest.mark.parametrize(
    ("make", "covers", "kind"),
    [(hopper, taken, "address"), (hopper_backward, turns, "threads"), (hopper_backward, turns, "address")],
)
def test_two_hundred_random_shapes(make, covers, kind):
    """Forward, of which test_forward has as many in the other build, and both gradients of each shape."""
    some = shapes(200, seed=41, covers=covers, side=9, depth=72)
    assert len({replace(shape, reason="") for shape in some}) == 200
    cases = [make(shape, (BF16, F16)[number % 2], seed=number) for number, shape in enumerate(some)]
    assert make is hopper or all({"dx", "dweight"} == exact.keys() for _, exact in cases)
    for first in range(0, 200, 50):
        check(kind, cases[first : first + 50])


def test_backward_sanitizers_and_schedules():
    some = [shape for shape in LISTED if not shape.tile] + shapes(15, seed=33)
    check("address", [hopper_backward(shape, (BF16, F16)[n % 2]) for n, shape in enumerate(some)])
    floats = shapes(100, seed=35, covers=turns, side=9, depth=100, mode=TF32)
    check("address", [hopper_backward(shape, TF32, mask_dx=n % 2 == 0) for n, shape in enumerate(floats)])
    halves = shapes(50, seed=36, covers=turns, side=9, depth=100)
    check("address", [hopper_backward(shape, BF16, mask_dx=True) for shape in halves])
    several_runs = Shape("several runs", 3, 40, 14, 13, 24, (3, 2), padding=(1, 1))
    (result,) = host_build.run("threads", [hopper_backward(several_runs, BF16, False, schedules=10)[0]])
    assert result.error == 0


@pytest.mark.parametrize("mode", [BF16, TF32], ids=str)
def test_backward_is_as_exact_as_torch(mode):
    some = [shape for shape in TYPICAL if (turns if mode is TF32 else taken)(shape, mode)]
    expected = [hopper_backward(shape, mode, False) for shape in some]
    results = host_build.run("threads", [case for case, _ in expected])
    for shape, (case, exact), result in zip(some, expected, results, strict=True):
        x, weight, dy, y = (case.inputs[name] for name in ("x", "weight", "dy", "y"))
        masked = rounded(dy * (y > 0), mode)
        peers = gradients(shape, rounded(x, mode).clone(), rounded(weight, mode).clone(), masked)
        for name, value in exact.items():
            assert as_exact(result.outputs[name], peers[name], value), f"{shape}, {name}"


def test_nan_stays_in_its_tower():
    """Slabs are wider than a tower of 48 channels: what lies beyond it is zeros, not the next tower."""
    shape = Shape("towers", 1, 96, 5, 5, 32, (3, 3), padding=(1, 1), groups=2)
    case, exact = hopper(shape, BF16)
    case.inputs["x"][0, 48, 2, 2] = float("nan")
    (result,) = host_build.run("threads", [case])
    y = result.outputs["y"].double()
    assert torch.equal(y[:, :16], exact["y"][:, :16])
    assert y[:, 16:, 1:4, 1:4].isnan().all()


def test_batch_of_0():
    empty = Shape("empty", 0, 8, 5, 5, 8, (3, 3), padding=(1, 1))
    check("threads", [hopper(empty, BF16), hopper_backward(empty, BF16)])


def test_misaligned():
    """Through the workspace, or refused where it is the output."""
    names = ("x", "weight", "bias")
    check("threads", [hopper(TYPICAL[0], BF16, offsets={name: 2}) for name in names])
    (result,) = host_build.run("threads", [hopper(TYPICAL[0], BF16, offsets={"y": 2})[0]])
    assert result.error == CUDA_ERROR_NOT_SUPPORTED


# ---- Stages that pool ------------------------------------------------------------------------------------------------


def hopper_stage(one: Stage, mode: Mode, **case) -> Expected:
    """As :func:`stage`, of Hopper's launcher."""
    general, exact = stage(one, mode, **case)
    return replace(general, launcher="sm90::conv_stage_fwd"), exact


def pooled(shape: Shape, codes: bool = True) -> Stage:
    return Stage(shape, (3, 3), (2, 2), codes=codes)


def pooled_shapes(count: int, seed: int, **limits) -> list[Stage]:
    some = [shape for shape in shapes(4 * count, seed, side=16, **limits) if min(shape.out) >= 3][:count]
    assert len(some) == count
    return [pooled(shape, codes=n % 4 != 0) for n, shape in enumerate(some)]


# With fewer channels, but whole images.
ALEXNET_STAGES = [
    pooled(Shape("torchvision's first", 1, 3, 224, 224, 24, (11, 11), (4, 4), (2, 2))),
    pooled(Shape("torchvision's first, inference", 1, 3, 224, 224, 64, (11, 11), (4, 4), (2, 2)), codes=False),
    pooled(Shape("torchvision's first by im2col", 1, 3, 224, 224, 24, (11, 11), (4, 4), (2, 2), tile=1)),
    pooled(Shape("2012's first", 1, 3, 227, 227, 96, (11, 11), (4, 4))),
    pooled(Shape("torchvision's second", 1, 24, 27, 27, 72, (5, 5), padding=(2, 2), tile=2)),
    pooled(Shape("torchvision's fifth", 2, 72, 13, 13, 136, (3, 3), padding=(1, 1), tile=3)),
    pooled(Shape("2012's fifth, two towers", 1, 80, 13, 13, 80, (3, 3), padding=(1, 1), groups=2)),
]


# Three multiprocessors, host_simt has no more: few images are cut into bands, and of many each block takes several.
def listed_stages(mode: Mode) -> list[Stage]:
    return [
        pooled(shape)
        for tile, longest in enumerate(LONGEST[mode.dtype.itemsize], 1)
        for shape in (
            Shape(f"bands, tile {tile}", 1, 8, 27, 27, 72, (3, 3), padding=(1, 1), tile=tile),
            Shape(f"an image a block, tile {tile}", 3, 8, 19, 19, 24, (2, 2), tile=tile),
            Shape(f"several images a block, tile {tile}", 7, 8, 14, 12, 8, (1, 1), bias=False, tile=tile),
            Shape(f"rows as long as shared memory takes them, tile {tile}", 2, 8, 9, longest + 1, 8, (1, 2), tile=tile),
            Shape(f"a window, tile {tile}", 1, 8, 4, 4, 8, (2, 2), tile=tile),
        )
    ]


LISTED_STAGES = listed_stages(BF16)


@modes
def test_stages(mode):
    """Outputs and codes equal to the last bit; whole numbers, so that windows are full of equal ones."""
    some = [*listed_stages(mode), *pooled_shapes(20, seed={BF16: 51, F16: 52, TF32: 53}[mode], mode=mode)]
    check("threads", [hopper_stage(one, mode, seed=number) for number, one in enumerate(some)])


def test_alexnets_stages():
    check("threads", [hopper_stage(one, BF16) for one in ALEXNET_STAGES])
    check("threads", [hopper_stage(replace(one, shape=replace(one.shape, tile=0)), TF32) for one in ALEXNET_STAGES])


def test_stages_sanitizers_and_schedules():
    """And the same bits whatever lands first and runs first."""
    check("address", [hopper_stage(one, (BF16, F16)[n % 2]) for n, one in enumerate(LISTED_STAGES[::3])])
    check("address", [hopper_stage(one, TF32) for one in listed_stages(TF32)[::2]])
    for one in LISTED_STAGES[1], LISTED_STAGES[6]:
        (result,) = host_build.run("threads", [hopper_stage(one, BF16, schedules=4)[0]])
        assert result.error == 0


def first_stages(some: list[Shape]) -> list[Stage]:
    tiles = TILES - STAGE_TILES
    return [pooled(replace(shape, tile=shape.tile - tiles), codes=n % 4 != 0) for n, shape in enumerate(some)]


LISTED_FIRST_STAGES = first_stages([shape for shape in LISTED_FIRST if min(shape.out) >= 3])


@pytest.mark.parametrize("mode", [BF16, F16], ids=str)
def test_first_stages(mode):
    some = LISTED_FIRST_STAGES + first_stages(first_shapes(20, {BF16: 53, F16: 54}[mode], least=3))
    check("threads", [hopper_stage(one, mode, seed=n) for n, one in enumerate(some)])


def test_first_stages_sanitizers_and_schedules():
    check("address", [hopper_stage(one, (BF16, F16)[n % 2]) for n, one in enumerate(LISTED_FIRST_STAGES)])
    (result,) = host_build.run("threads", [hopper_stage(LISTED_FIRST_STAGES[1], BF16, schedules=6)[0]])
    assert result.error == 0


@pytest.mark.soak
@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_two_hundred_random_first_stages(kind):
    some = first_stages(first_shapes(200, seed=62, least=3))
    assert len({replace(one.shape, reason="") for one in some}) == 200
    cases = [hopper_stage(one, (BF16, F16)[n % 2], seed=n) for n, one in enumerate(some)]
    for first in range(0, 200, 50):
        check(kind, cases[first : first + 50])


@pytest.mark.soak
@pytest.mark.parametrize("kind", host_build.BUILDS)
def test_two_hundred_random_stages(kind):
    some = pooled_shapes(200, seed=61, depth=72)
    assert len({replace(one.shape, reason="") for one in some}) == 200
    check(kind, [hopper_stage(one, (BF16, F16)[n % 2], seed=n) for n, one in enumerate(some)])


OF_NAN = Shape("27 x 27", 1, 8, 27, 27, 24, (1, 1), bias=False)
OF_NAN_FIRST = Shape("first", 1, 40, 27, 59, 24, (3, 3), bias=False, tile=STAGE_TILES + 1)


@pytest.mark.parametrize(
    ("shape", "mode"),
    [*((OF_NAN, mode) for mode in (BF16, F16, TF32)), (OF_NAN_FIRST, BF16), (OF_NAN_FIRST, F16)],
    ids=str,
)
def test_nan_wins_its_windows(shape, mode):
    """The last one of a window, as in PyTorch; beside it an infinity, and a 0 for which the ReLU had -0."""
    one = pooled(shape)
    case, _ = hopper_stage(one, mode)
    case.inputs["weight"].abs_()
    x = case.inputs["x"].copy_(torch.where(case.inputs["x"] < 0, -0.0, case.inputs["x"]))
    x[..., :6] = -0.0
    x[0, 3, 6, 6] = x[0, 2, 7, 7] = x[0, 5, 20, 3] = float("nan")
    x[0, 1, 6, 5] = x[0, 0, 13, 2] = float("inf")
    (result,) = host_build.run("threads", [case])
    r = F.relu(one.shape.convolution(case.inputs["x"].double(), case.inputs["weight"].double()))
    y, code = one.pool(r)
    assert y.isnan().any()
    assert y.isinf().any()
    assert (code == 255).any()
    actual = result.outputs["pooled"].double()
    assert torch.equal(actual.isnan(), y.isnan())
    assert torch.equal(actual.nan_to_num(-1), y.nan_to_num(-1))
    assert not actual[~actual.isnan()].signbit().any()
    assert torch.equal(result.outputs["code"], code)


def test_stages_write_their_results_alone():
    case, _ = hopper_stage(LISTED_STAGES[1], BF16)
    (result,) = host_build.run("threads", [case])
    assert result.written == sum(tensor.numel() * tensor.itemsize for tensor in case.outputs.values())


def test_what_stages_refuse():
    fits = Shape("13 x 13", 1, 8, 13, 13, 8, (1, 1))
    wrong = [
        Stage(fits, (2, 2), (2, 2)),
        Stage(fits, (3, 3), (1, 1)),
        Stage(fits, (3, 3), (2, 2), (1, 1)),
        Stage(replace(fits, height=14), (3, 3), (2, 2), ceil_mode=True),
        pooled(replace(fits, out_channels=12)),
        pooled(replace(fits, width=900)),
        pooled(replace(fits, tile=STAGE_TILES + 1)),
    ]
    cases = [hopper_stage(one, BF16)[0] for one in wrong]
    cases += [hopper_stage(pooled(fits), BF16, offsets={name: 8})[0] for name in ("pooled", "code")]
    cases += [hopper_stage(pooled(fits), F32)[0], hopper_stage(pooled(fits), BF16)[0]]
    cases[-1].params.lrn = LrnWindow(groups=1, size=5, alpha=0.02, beta=0.75, k=1.0)
    errors = [result.error for result in host_build.run("threads", cases)]
    assert errors == [CUDA_ERROR_NOT_SUPPORTED] * len(cases)
    modes = {mode: len(LONGEST[mode.dtype.itemsize]) + FIRST_TILES + 1 for mode in (BF16, TF32)}
    beyond = [hopper_stage(pooled(replace(fits, tile=tile)), mode)[0] for mode, tile in modes.items()]
    assert [result.error for result in host_build.run("threads", beyond)] == [CUDA_ERROR_INVALID_VALUE] * 2
    check("threads", [hopper_stage(pooled(replace(fits, batch=0)), BF16)])


# ---- Refusals --------------------------------------------------------------------------------------------------------

REFUSED = [
    Shape("stride over whole chunks", 1, 16, 9, 9, 16, (3, 3), (2, 2)),
    Shape("output channels of no whole chunk", 1, 16, 5, 5, 12, (3, 3)),
    Shape("five towers", 1, 40, 5, 5, 40, (3, 3), groups=5),
    Shape("a kernel wider than offsets reach", 1, 8, 1, 300, 8, (1, 2), dilation=(1, 256)),
    Shape("more padding than corners reach", 1, 8, 1, 5, 8, (1, 2), padding=(0, 129)),
]


NOT_FIRST = [
    Shape("channels of four chunks", 1, 32, 9, 9, 16, (3, 3)),
    Shape("of seven", 1, 56, 9, 9, 16, (3, 3)),
    Shape("more than two tiles of filters", 1, 48, 9, 9, 136, (3, 3)),
    Shape("another kernel", 1, 48, 9, 9, 16, (3, 2)),
    Shape("dilated", 1, 48, 9, 9, 16, (3, 3), dilation=(2, 2)),
    Shape("groups", 1, 96, 9, 9, 16, (3, 3), groups=2),
]


def test_what_the_first_convolutions_tiles_refuse():
    cases = [hopper(of_first(shape, 1), BF16)[0] for shape in NOT_FIRST]
    errors = [result.error for result in host_build.run("threads", cases)]
    assert errors == [CUDA_ERROR_NOT_SUPPORTED] * len(NOT_FIRST)


@pytest.mark.parametrize("shape", REFUSED, ids=str)
def test_refused_shapes(shape):
    assert not taken(shape) or max(shape.padding) > 128 or max(shape.dilation) > 128
    (result,) = host_build.run("threads", [hopper(shape, BF16)[0]])
    assert result.error == CUDA_ERROR_NOT_SUPPORTED


def test_refused_dtype_and_tile():
    """float32 without TF32, and its weight gradient with it; a tile that there is not; the bias's gradient
    alone."""
    wrong = [hopper(TYPICAL[0], F32)[0], hopper(replace(TYPICAL[0], tile=TILES + FIRST_TILES + 1), BF16)[0]]
    wrong += [
        hopper_backward(TYPICAL[0], F32)[0],
        replace(backward(TYPICAL[0], F32, wanted=("dx",))[0], launcher=wrong[0].launcher[:-3] + "bwd"),
        replace(backward(TYPICAL[0], TF32, wanted=("dweight",))[0], launcher=wrong[0].launcher[:-3] + "bwd"),
        replace(backward(TYPICAL[0], BF16, wanted=("dbias",))[0], launcher=wrong[0].launcher[:-3] + "bwd"),
    ]
    errors = [result.error for result in host_build.run("threads", wrong)]
    unsupported = CUDA_ERROR_NOT_SUPPORTED
    assert errors == [unsupported, CUDA_ERROR_INVALID_VALUE, *[unsupported] * 4]


@pytest.mark.parametrize("architecture", ["80", "86", "89"])
def test_other_cards_never_launch_it(architecture, monkeypatch):
    monkeypatch.setenv("HOST_SIMT_ARCHITECTURE", architecture)
    for case, _ in (hopper(TYPICAL[0], BF16), hopper_backward(TYPICAL[0], BF16), hopper_stage(LISTED_STAGES[1], BF16)):
        (result,) = host_build.run("threads", [case])
        assert result.error == CUDA_ERROR_NOT_SUPPORTED
