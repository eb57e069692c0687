"""The kernels of LRN, max-pooling and the epilogue on the CPU: exact, within bounds, and the same in any schedule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

from alexnet_fast import reference
from alexnet_fast.ops import LRN, Pool

from ..ops.samples import Sample, epilogue, lpips_layer, lrn, max_pool, torch_lrn
from . import host_build
from .host_build import Case, run
from .params import LrnParams
from .pointwise import CLOSED, TASKS, Task, codes, tasks

STEMS = ("lrn", "max_pool", "epilogue", "lpips_layer")
COUNT = 210
each_stem = pytest.mark.parametrize("stem", STEMS)
each_build = pytest.mark.parametrize("kind", host_build.BUILDS)


@cache
def all_tasks(stem: str) -> list[Task]:
    return tasks(stem, COUNT)


def run_and_check(kind: str, some: list[Task]) -> None:
    for task, result in zip(some, run(kind, [task.case for task in some]), strict=True):
        task.check(result)


def of(sample: Sample, dtype: torch.dtype, channels_last: bool) -> list[Task]:
    layout = "NHWC" if channels_last else "NCHW"
    return list(TASKS[sample.stem](sample, dtype, channels_last, f"{sample} {dtype} {layout}"))


# ---- Results ---------------------------------------------------------------------------------------------------------


@each_build
@each_stem
def test_as_exact_as_torch(stem, kind):
    """Forward, inference and backward; a shape that no vector fits, a wrong window or a lost mask shows here.

    AddressSanitizer sees every second shape: what a kernel reads and writes, the other build watches too."""
    run_and_check(kind, all_tasks(stem)[:: 1 + (kind == "address")])


@each_build
@each_stem
def test_misaligned_tensors(stem, kind):
    """Tensors that begin between two multiples of 16 bytes: each in turn, and all of them."""
    some = []
    for task in all_tasks(stem)[:: len(all_tasks(stem)) // 40]:
        tensors = {**task.case.inputs, **task.case.outputs}
        shift = {key: tensor.element_size() for key, tensor in tensors.items()}
        for offsets in [shift, *({key: value} for key, value in shift.items())]:
            some.append(replace(task, case=replace(task.case, offsets=offsets)))
    run_and_check(kind, some)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sample",
    [
        lrn("several blocks of one wave", (1, 40, 3, 7), 5, alpha=0.02),
        lrn("tiles of planes", (1, 60, 5, 13), 5, alpha=0.02),
        epilogue("tiles of planes", (1, 28, 5, 13), lrn=LRN(5, 1e-3), pool=Pool(3, 2)),
        max_pool("overlapping", (1, 24, 7, 9), 3, 2),
        epilogue("sums over blocks", (1, 24, 5, 6)),
        epilogue("pool", (1, 24, 7, 9), pool=Pool(3, 2)),
        epilogue("LRN and pool", (1, 24, 7, 7), lrn=LRN(5, 1e-3), pool=Pool(3, 2)),
        lpips_layer("lanes and lines", (2, 24, 9, 8)),
        lpips_layer("slices", (2, 9, 9, 7)),
    ],
    ids=str,
)
def test_a_thousand_schedules(sample, dtype):
    """Every order of blocks and threads gives the same bits, and none of them races."""
    some = [task for channels_last in (False, True) for task in of(sample, dtype, channels_last)]
    schedules = 1000 // len(some) + 1
    run_and_check("threads", [replace(task, case=replace(task.case, schedules=schedules)) for task in some])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ties(dtype, channels_last):
    """Of equal elements the first in row order wins: data of -1, 0 and 1 are full of them, and sums are exact."""
    some = []
    for sample in (
        max_pool("overlapping", (2, 16, 13, 13), 3, 2),
        max_pool("padded", (2, 16, 9, 8), 3, 2, 1),
        max_pool("wide", (1, 8, 9, 8), (5, 4), (1, 3), (2, 2)),
        epilogue("overlapping", (2, 16, 13, 13), pool=Pool(3, 2)),
        epilogue("wide", (1, 8, 9, 8), pool=Pool((5, 4), (1, 3), (2, 2))),
    ):
        whole = replace(sample)
        object.__setattr__(whole, "data", sample.whole_numbers)
        some += of(whole, dtype, channels_last)
    run_and_check("threads", some)


FIVE = LRN(5, 0.02, 0.75, 2.0)


def pairs(dtype: torch.dtype) -> list[Task]:
    """What the kernels for AlexNet's stages alone take: edges of tiles, patches and groups."""
    some = []
    for shape, norm, pool in (
        ((2, 16, 13, 13), FIVE, Pool(3, 2)),
        ((1, 24, 8, 10), FIVE, Pool(3, 2)),  # the last row and column are in no window
        ((1, 8, 9, 8), FIVE, Pool(3, 2, 1)),
        ((1, 16, 8, 8), FIVE, Pool(3, 2, 0, True)),
        ((1, 48, 7, 3), LRN(5, 0.02, 0.75, 1.0, 2), Pool(3, 2)),
        ((1, 264, 5, 27), FIVE, Pool(3, 2)),  # tiles of channels, the last not full
        ((1, 8, 39, 21), FIVE, Pool(3, 2)),
    ):
        some += of(epilogue("pairs", shape, lrn=norm, pool=pool), dtype, True)
    return some


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lrn_and_pool_in_pairs(dtype):
    run_and_check("threads", pairs(dtype))


def planes(dtype: torch.dtype) -> list[Task]:
    """What the kernels over NCHW planes in shared memory take: several planes a block, and bands of a plane's rows."""
    some = []
    for shape, pool in (
        ((2, 1030, 4, 5), Pool(3, 2)),  # two planes a block, and the last row in no window
        ((2, 1030, 3, 5), Pool(3, 2, 1)),
        ((1, 3, 24, 4), Pool(3, 2)),  # one column of windows, in two strips
        ((1, 3, 23, 10), Pool(3, 2)),  # four columns, in pairs
        ((2, 1, 55, 55), Pool(3, 2)),
        ((1, 3, 61, 151), Pool(3, 2, 1)),  # planes beyond 16 KB in every dtype
        ((1, 2, 60, 150), Pool(3, 2, 0, True)),
        ((1, 2, 9, 1000), Pool(3, 2)),  # a row or two
        ((1, 2, 5, 5000), Pool(3, 2)),  # not even that: without shared memory
    ):
        some += of(max_pool("planes", shape, **pool._asdict()), dtype, False)
        some += of(epilogue("planes", shape, pool=pool), dtype, False)
    return some


@each_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_planes_in_shared_memory(dtype, kind):
    """Each tensor begins elsewhere within 16 bytes."""
    some = []
    for number, task in enumerate(planes(dtype)):
        tensors = {**task.case.inputs, **task.case.outputs}
        offsets = {key: (number + n) * tensor.element_size() for n, (key, tensor) in enumerate(tensors.items())}
        some.append(replace(task, case=replace(task.case, offsets=offsets)))
    run_and_check(kind, some)


def lrn_planes(dtype: torch.dtype) -> list[Task]:
    """What LRN's kernels over tiles of NCHW planes take: all remainders of a plane by 16 bytes, tiles of a plane and
    chunks of a group, windows of AlexNet's kind and of others. All tensors begin alike within 16 bytes, at every place;
    then x elsewhere, and then each."""
    found, some = [], []
    for shape, size, more in (
        ((2, 12, 1, 65), 5, {}),
        ((1, 6, 6, 11), 5, {"k": 2.0}),
        ((1, 5, 1, 67), 4, {}),
        ((2, 3, 4, 17), 5, {}),  # fewer channels than a window has
        ((1, 9, 3, 23), 16, {}),
        ((1, 24, 7, 10), 5, {"groups": 2}),
        ((1, 10, 1, 71), 3, {"beta": 0.5}),
        ((1, 8, 8, 9), 5, {"beta": 0.6, "k": 0.5}),
        ((1, 104, 9, 29), 5, {}),
        ((1, 66, 11, 23), 9, {"groups": 2, "beta": 1.0}),
        ((2, 1, 55, 55), 5, {}),
        ((1, 1, 1, 15501), 5, {}),  # forward in float32 the last tile has one pixel
        ((1, 1, 1, 16257), 5, {}),  # and backward
    ):
        some += of(lrn("planes", shape, size, **{"alpha": 0.02, "k": 1.0, **more}), dtype, False)
    for number, task in enumerate(some):
        tensors = {**task.case.inputs, **task.case.outputs}
        for moved in ((0, 0, 0), (1, 0, 0), (0, 1, 2)):
            offsets = {key: (number + n) * dtype.itemsize % 16 for key, n in zip(tensors, moved, strict=False)}
            found.append(replace(task, case=replace(task.case, offsets=offsets)))
    return found


def epilogue_planes(dtype: torch.dtype) -> list[Task]:
    """The same with bias and ReLU, and of these with a pool behind them: bands of rows, odd and even, one or several.
    All tensors begin alike within 16 bytes, at every place; then r elsewhere."""
    found, some = [], []
    for shape, groups, pool in (
        ((2, 12, 1, 65), 1, None),
        ((1, 24, 7, 10), 2, None),
        ((2, 3, 4, 17), 1, None),
        ((1, 52, 5, 29), 1, None),
        ((2, 12, 9, 13), 1, Pool(3, 2)),
        ((1, 52, 8, 10), 2, Pool(3, 2)),  # the last row and column are in no window
        ((1, 27, 9, 27), 1, Pool(3, 2)),
        ((1, 3, 29, 31), 1, Pool(3, 2)),
        ((1, 5, 31, 3), 1, Pool(3, 2)),
        ((1, 4, 7, 112), 1, Pool(3, 2)),
        ((1, 4, 7, 150), 1, Pool(3, 2)),  # too wide for tiles
        # Rows as far apart as AlexNet's, several slices of a chunk, the last one cut, and four rows of 55 pixels but in
        # the last tile; then eight of 27.
        ((1, 50, 23, 55), 2, Pool(3, 2)),
        ((1, 28, 27, 27), 1, Pool(3, 2)),
    ):
        alpha = 0.5 if shape[1] > 27 else 0.02  # what is lost between slices shows in 16 bits too
        some += of(epilogue("planes", shape, lrn=LRN(5, alpha, 0.75, 1.0, groups), pool=pool), dtype, False)
    for number, task in enumerate(some):
        tensors = {**task.case.inputs, **task.case.outputs}
        alike = {key: number * tensor.element_size() % 16 for key, tensor in tensors.items()}
        found.append(replace(task, case=replace(task.case, offsets=alike)))
        if number % 3 == 0:
            moved = alike | {"r": alike.get("r", 0) + dtype.itemsize}
            found.append(replace(task, case=replace(task.case, offsets=moved)))
    return found


def columns(dtype: torch.dtype) -> list[Task]:
    """What goes down columns in inference: several bands and slices, a slice that is not full, and edges of groups. Of
    planes single elements, so that these may begin anywhere."""
    found = []
    for shape, groups, pool, channels_last in (
        ((1, 120, 27, 27), 1, Pool(3, 2), False),
        ((2, 16, 27, 27), 2, Pool(3, 2), False),
        ((1, 16, 55, 55), 1, Pool(3, 2), False),
        ((1, 360, 7, 15), 1, Pool(3, 2, 1), True),
        ((2, 20, 17, 9), 5, Pool(3, 2, 1), True),
        ((1, 40, 14, 53), 1, Pool(3, 2, 0, True), True),
        ((1, 16, 22, 22), 2, Pool(3, 2, 1), True),
    ):
        sample = epilogue("columns", shape, lrn=LRN(5, 0.5, 0.75, 1.0, groups), pool=pool)
        task = next(task for task in of(sample, dtype, channels_last) if "inference" in task.name)
        offsets = {} if channels_last else {"z": dtype.itemsize, "y": 3 * dtype.itemsize}
        found.append(replace(task, case=replace(task.case, offsets=offsets)))
    return found


@each_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lrn_and_pool_down_columns(dtype, kind):
    run_and_check(kind, columns(dtype))


@each_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lrn_of_planes_in_shared_memory(dtype, kind):
    run_and_check(kind, lrn_planes(dtype) + epilogue_planes(dtype))


# ---- Special values --------------------------------------------------------------------------------------------------


def single(launcher: str, task: Task, **inputs: Tensor) -> dict[str, Tensor]:
    (result,) = run("threads", [replace(task.case, inputs={**task.case.inputs, **inputs})])
    assert result.error == 0
    return result.outputs


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [16, 13])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pixels", [(2, 3), (5, 13)], ids=["few pixels", "a tile of a plane"])
def test_nan_stays_within_its_windows(pixels, channels, channels_last, groups):
    """A NaN or infinity reaches the channels whose windows hold it, backward twice as far; never another group."""
    channels *= groups
    sample = lrn("", (1, channels, *pixels), 5, alpha=0.02, groups=groups)
    forward, backward = of(sample, torch.float32, channels_last)
    group = channels // groups
    for place, value in product((0, group - 1, group // 2), (torch.nan, torch.inf)):
        x = forward.case.inputs["x"].clone()
        x[0, place, 1, 1] = value
        y = single("lrn_fwd", forward, x=x)["y"]
        dx = single("lrn_bwd", backward, x=x)["dx"]
        distance = (torch.arange(channels) - place).abs()[None, :, None, None].expand_as(x)
        here = torch.zeros_like(x, dtype=torch.bool)
        here[0, :, 1, 1] = True
        here &= (torch.arange(channels) < group)[:, None, None]
        assert y[0, place, 1, 1].isnan()
        if value != value:
            assert torch.equal(y.isnan(), here & (distance <= 2))
            assert torch.equal(dx.isnan(), here & (distance <= 4))
        else:  # t is infinite, its power 0
            assert torch.equal(
                y[here & (distance > 0) & (distance <= 2)],
                torch.zeros(int((here & (distance > 0) & (distance <= 2)).sum())),
            )
            assert dx[here & (distance > 2)].isfinite().all()
        assert y[~here].isfinite().all()
        assert dx[~here].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pixels", [(2, 3), (5, 13)], ids=["few pixels", "a tile of a plane"])
def test_nothing_comes_back_from_beyond_a_group(pixels, channels_last):
    """With k = 0 and zeros at a group's ends t is 0 beyond them, where no window is, and nowhere within."""
    sample = lrn("", (1, 26, *pixels), 5, alpha=0.02, k=0.0, groups=2)
    _, backward = of(sample, torch.float32, channels_last)
    x = backward.case.inputs["x"].clone()
    x[:, [0, 1, 11, 12, 13, 14, 24, 25]] = 0
    assert single("lrn_bwd", backward, x=x)["dx"].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 300.0), (torch.bfloat16, 10.0), (torch.float16, 6e-8)])
def test_squares_do_not_overflow(dtype, scale, channels_last):
    """300 squared is beyond float16; subnormal float16 numbers are numbers."""
    sample = lrn("", (2, 16, 3, 3), 5, alpha=1.0)
    loud = replace(sample)
    object.__setattr__(
        loud, "data", lambda dtype: {"input": (scale * torch.randn(2, 16, 3, 3).sign().double()).to(dtype)}
    )
    run_and_check("threads", of(loud, dtype, channels_last))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_of_special_values(dtype, channels_last):
    """NaN beats infinity, -infinity alone is a maximum, the code names NaN's place: PyTorch's results to the bit."""
    x = torch.full((1, 8, 7, 7), -torch.inf, dtype=dtype)
    x[0, 1, 3, 3] = torch.nan
    x[0, 2, 2, 4], x[0, 2, 3, 4] = torch.inf, torch.nan
    x[0, 3] = 0.0
    x[0, 3, 1, 1] = -0.0
    x[0, 4, 5, 5] = torch.finfo(dtype).smallest_normal / 2
    for arguments in ((3, 2), (3, 2, 1), (2, 1)):
        forward = of(max_pool("", x.shape, *arguments), dtype, channels_last)[0]
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        outputs = single("max_pool_fwd", forward, x=x)
        expected = torch.nn.functional.max_pool2d(x.double(), *arguments)
        assert torch.equal(outputs["y"].double().nan_to_num(7e9), expected.nan_to_num(7e9))
        assert torch.equal(outputs["code"], codes(x, *arguments))


# Zeros, the smallest and the largest numbers, infinities and NaN of either sign, and what float16 takes for them.
BITS = {
    torch.float16: [0x0000, 0x8000, 0x0001, 0x8001, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E01, 0xFFFF],
    torch.bfloat16: [0x0000, 0x8000, 0x0001, 0x8001, 0x7C00, 0x7C01, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF],
}


@pytest.mark.parametrize(
    ("channels_last", "shape"),
    [(False, (2, 16, 9, 11)), (False, (3, 685, 5, 5)), (True, (2, 16, 9, 11))],
    ids=["NCHW", "NCHW, two planes a block", "NHWC"],
)
@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize("numbers", [2, 4, 10, 12])
def test_every_bit_of_pooling(dtype, channels_last, shape, numbers):
    """y is the very element that PyTorch's rule names, in inference too: the first of equals, the sign of a 0 included;
    of several NaN the last, as the dtype's one NaN."""
    torch.manual_seed(numbers)
    palette = torch.tensor(BITS[dtype][:numbers], dtype=torch.int32).to(torch.int16).view(dtype)
    x = palette[torch.randint(numbers, shape)]
    x[0, :8] = (x[0, :8].view(torch.int16) & 0x7FFF).view(dtype)  # a vector of channels without a sign
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for padding in (0, 1):
        training, inference, _ = of(max_pool("", shape, 3, 2, padding), dtype, channels_last)
        (trained,) = run("threads", [replace(training.case, inputs={"x": x})])
        (inferred,) = run("address", [replace(inference.case, inputs={"x": x})])
        y, code = trained.outputs["y"], trained.outputs["code"].long()
        assert torch.equal(code, codes(x, 3, 2, padding).long())
        row = 2 * torch.arange(y.shape[2])[:, None] - padding + code // 3
        column = 2 * torch.arange(y.shape[3]) - padding + code % 3
        named = x.flatten(2).gather(2, (row * shape[3] + column).flatten(2)).view(y.shape)
        named = torch.where(named.isnan(), torch.tensor(0x7FFF, dtype=torch.int16).view(dtype), named)
        assert torch.equal(y.view(torch.int16), named.view(torch.int16))
        assert torch.equal(inferred.outputs["y"].view(torch.int16), y.view(torch.int16))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_through_lrn_and_pool(dtype, channels_last):
    """Of a window's NaN the last one is named, and numbers that pairs cannot tell from NaN are numbers."""
    sample = epilogue("", (1, 16, 9, 9), lrn=LRN(5, 1e-30, 0.75, 1.0), pool=Pool(3, 2))
    forward = of(sample, dtype, channels_last)[0]
    z = forward.case.inputs["z"].clone()
    z[0, 3, 2:5, 3:6] = torch.nan
    z[0, 9, 4, 4] = torch.finfo(dtype).max
    z[0, 14] = 0.0
    outputs = single("epilogue_fwd", forward, z=z, bias=torch.zeros(16, dtype=dtype))
    r = z.relu()
    normalized = torch_lrn(r.float(), *sample.arguments["lrn"]).to(dtype)
    assert torch.equal(outputs["r"].double().nan_to_num(7e9), r.double().nan_to_num(7e9))
    assert torch.equal(outputs["code"], codes(normalized, 3, 2))
    assert outputs["y"][0, 1:6].isnan().any()
    assert outputs["y"][0, 8:].isfinite().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_special_values_down_columns(dtype, channels_last):
    """Inference has NaN, zeros and numbers where training has them; the kernels add up squares in another order."""
    training, inference = of(epilogue("", (1, 16, 27, 27), lrn=FIVE, pool=Pool(3, 2)), dtype, channels_last)[:2]
    z = training.case.inputs["z"].clone()
    z[0, 3, 2:5, 3:6], z[0, 8, 26, 26] = torch.nan, -torch.nan
    z[0, 6, 7, 7], z[0, 0, 12, 0], z[0, 12, 5] = torch.inf, torch.inf, -torch.inf
    z[0, 9, 4, 4], z[0, 15, 20, 3] = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal / 2
    z[0, 14] = -0.0
    trained, inferred = (single("epilogue_fwd", task, z=z)["y"].double() for task in (training, inference))
    assert 0 < trained.isnan().sum() < trained.numel() / 4
    assert torch.equal(trained.isnan(), inferred.isnan())
    assert torch.equal(trained == 0, inferred == 0)
    torch.testing.assert_close(inferred, trained, rtol=torch.finfo(dtype).eps * 4, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_relu_lets_nan_through(dtype, channels_last):
    """As in PyTorch: relu(NaN) is NaN, a pool over it is open, and its gradient passes."""
    z = torch.full((1, 8, 5, 5), -1.0, dtype=dtype)
    z[0, 2, 2, 2] = torch.nan
    z[0, 3] = torch.inf
    z = z.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    zero = torch.zeros(8, dtype=dtype)
    forward, _, backward, _ = of(epilogue("", z.shape, pool=Pool(3, 2)), dtype, channels_last)
    outputs = single("epilogue_fwd", forward, z=z, bias=zero)
    expected = torch.nn.functional.max_pool2d(z.double().relu(), 3, 2)
    assert torch.equal(outputs["y"].double().nan_to_num(7e9), expected.nan_to_num(7e9))
    closed = torch.where(expected <= 0, CLOSED, codes(z.relu(), 3, 2))
    assert torch.equal(outputs["code"], closed.to(torch.uint8))
    dz = single("epilogue_bwd", backward, code=outputs["code"])["dz"]
    assert dz[0, 2, 2, 2] != 0
    assert dz[0, :2].abs().max() == 0
    forward, _, backward, _ = of(epilogue("", z.shape), dtype, channels_last)
    r = single("epilogue_fwd", forward, z=z, bias=zero)["y"]
    assert torch.equal(r.double().nan_to_num(7e9), z.double().relu().nan_to_num(7e9))
    dz = single("epilogue_bwd", backward, r=r)["dz"]
    assert torch.equal(dz != 0, r != 0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pixels_without_features(dtype, channels_last):
    """Their direction is 0 and so is their gradient, of one image or of both; NaN stays at its pixel."""
    forward, backward, *_ = of(lpips_layer("", (2, 16, 3, 5), spatial=True), dtype, channels_last)
    x = forward.case.inputs["x"].clone()
    x[0, :, 0, 0] = 0
    x[:, :, 1, 1] = 0
    x[1, 3, 2, 2] = torch.nan
    y, dx = single("", forward, x=x)["y"], single("", backward, x=x)["dx"]
    there = torch.ones(3, 5, dtype=torch.bool)
    there[2, 2] = False
    expected = reference.lpips_layer(x.double(), forward.case.inputs["weight"].double(), True)
    torch.testing.assert_close(y.double()[..., there], expected[..., there], rtol=1e-5, atol=1e-7)
    assert torch.equal(y.isnan()[0, 0], ~there)
    assert dx[0, :, 0, 0].eq(0).all()
    assert dx[:, :, 1, 1].eq(0).all()
    assert dx[1, :, 0, 0].abs().gt(0).all()
    assert torch.equal(dx.isnan().any(1).any(0), ~there)


# ---- Memory ----------------------------------------------------------------------------------------------------------

# Bytes read, as a multiple of each input once, on tensors wider than a block. What is above 1 comes out of L1 or L2:
# LRN's halo of channels, and the rows and columns that windows share.
TRAFFIC = [
    (lrn("", (2, 96, 8, 8), 5), True, 1.5, 1.5),
    (lrn("", (2, 96, 8, 8), 5), False, 1.1, 1.2),
    (max_pool("", (2, 64, 23, 23), 3, 2), True, 2.0, 2.0),
    (max_pool("", (2, 64, 23, 23), 3, 2), False, 2.0, 2.0),
    (epilogue("", (2, 64, 8, 8)), True, 1.1, 1.1),
    (epilogue("", (2, 64, 8, 8)), False, 1.1, 1.1),
    (epilogue("", (2, 64, 23, 23), lrn=LRN(5), pool=Pool(3, 2)), True, 2.0, 3.5),
    (epilogue("", (2, 64, 23, 23), lrn=LRN(5), pool=Pool(3, 2)), False, 1.5, 1.6),
    (epilogue("", (2, 64, 23, 23), lrn=LRN(5)), False, 1.2, 1.3),
    (lpips_layer("", (2, 64, 13, 13), spatial=True), False, 1.2, 1.2),
]


@pytest.mark.parametrize(("sample", "channels_last", "forward_bound", "backward_bound"), TRAFFIC)
def test_traffic(sample, channels_last, forward_bound, backward_bound):
    """Outputs are written once, inputs read no more often than the kernel's comment says."""
    tried = [task for task in of(sample, torch.bfloat16, channels_last) if "inference" not in task.name]
    for task, result in zip(tried, run("threads", [task.case for task in tried]), strict=True):
        inputs = sum(tensor.numel() * tensor.element_size() for tensor in task.case.inputs.values())
        outputs = sum(tensor.numel() * tensor.element_size() for tensor in task.case.outputs.values())
        bound = forward_bound if task.case.launcher.endswith("fwd") else backward_bound
        # Rows of partial sums are written and read again.
        sums = 0 if {"db", "dweight"}.isdisjoint(task.case.outputs) else 0.2 * outputs
        assert outputs <= result.written <= outputs + sums
        assert inputs <= result.read <= bound * inputs + sums, f"{task.case.launcher}: {result.read / inputs:.2f}"


# ---- What a launcher refuses -----------------------------------------------------------------------------------------


def test_refusals():
    """cudaErrorInvalidValue, and nothing is written: float64, and windows wider than 16 channels."""
    forward, backward = of(lrn("", (1, 20, 2, 2), 16), torch.float32, True)
    for task in (forward, backward):
        for change in ({"dtype": 3}, {"size": 17}, {"size": 0}):
            params = LrnParams.from_buffer_copy(task.case.params)
            for key, value in change.items():
                setattr(params if key == "dtype" else params.lrn, key, value)
            (result,) = run("threads", [replace(task.case, params=params)])
            assert result.error == 1
            assert all(tensor.isnan().all() for tensor in result.outputs.values())


def test_empty_batch():
    """Nothing to do is no error, and no launch of an empty grid."""
    some = []
    for sample in (
        lrn("", (1, 8, 3, 3), 5),
        max_pool("", (1, 8, 5, 5), 3, 2),
        epilogue("", (1, 8, 5, 5), pool=Pool(3, 2)),
    ):
        for task in of(sample, torch.float32, True):
            params = type(task.case.params).from_buffer_copy(task.case.params)
            params.batch = 0
            empty = {key: tensor[:0] for key, tensor in task.case.outputs.items() if key != "db"}
            some.append(Case(task.case.launcher, params, {}, empty))
    assert [result.error for result in run("threads", some)] == [0] * len(some)


def test_more_than_two_to_the_31st_elements():
    """Offsets have 64 bits, whether the batch or the image is large."""
    host_build.run_program([host_build.build("threads", main=host_build.HERE / "large.cu")])
