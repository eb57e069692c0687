"""conv_stage_fwd on the CPU: convolution, ReLU and pooling in one kernel, or two kernels in a row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ..ops.compare import as_exact
from ..ops.samples import torch_lrn
from . import host_build
from .conv import BF16, EDGES, F16, F32, MODES, TF32, TILES, Shape, Stage, put, stage, stages
from .params import LrnWindow
from .test_conv_relu import CUDA_ERROR_NOT_SUPPORTED, check

POOLING = {BF16: stages(60, seed=3), F16: stages(10, seed=4), TF32: stages(10, seed=5), F32: stages(10, seed=6)}
ADDRESS = stages(165, seed=7, pixels=64, depth=48)
FUSED = Stage(Shape("13 x 13", 1, 16, 13, 13, 24, (3, 3), padding=(1, 1)), (3, 3), (2, 2))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_pooling(mode):
    """Outputs, and codes where they are asked for, equal to the last bit."""
    rows = 2 if mode.dtype.itemsize == 2 else 1
    check("threads", [stage(s, mode) for s in POOLING[mode] if s.shape.tile <= rows])


def test_under_the_address_sanitizer():
    check("address", [stage(s, BF16) for s in ADDRESS])


def test_number_of_shapes():
    """200 random shapes in either build."""
    for table in (POOLING, {BF16: ADDRESS}):
        assert sum(len(set(shapes)) for shapes in table.values()) >= 200


def test_two_kernels_where_the_ring_does_not_fit():
    """A window as high as the image, rows as long as two tiles: the convolution's output goes through the workspace."""
    wide = Stage(Shape("wide", 1, 8, 7, 270, 8, (1, 1)), (7, 7), (1, 1))
    check("threads", [stage(wide, mode) for mode in (BF16, F32)])


def test_schedules():
    """The same bits in whichever order threads run."""
    (case, _), (odd, _) = stage(FUSED, BF16, schedules=20), stage(Stage(EDGES[6], (3, 3), (2, 2)), F32, schedules=20)
    assert [result.error for result in host_build.run("threads", [case, odd])] == [0, 0]


def test_misaligned():
    """Unaligned tensors: outputs are written in elements instead of 16 bytes, codes in bytes, and operands go through
    the workspace."""
    names = ("x", "weight", "bias", "pooled", "code")
    check("threads", [stage(FUSED, BF16, offsets={name: 1 if name == "code" else 2}) for name in names])


def test_reads_and_writes_no_convolution_output():
    """In training: x, weight and bias once or more, nothing of the convolution's size; y and codes, once."""
    case, _ = stage(FUSED, BF16)
    (result,) = host_build.run("threads", [case])
    outputs = sum(tensor.numel() * tensor.itemsize for tensor in case.outputs.values())
    assert result.written == outputs


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_lrn(pool, training):
    """With LRN two kernels run. In training the ReLU's output is kept, which LRN's gradient needs."""
    shape = Shape("3x3", 1, 16, 9, 9, 24, (3, 3), padding=(1, 1))
    lrn = {"size": 5, "alpha": 0.02, "beta": 0.75, "k": 1.0}
    case, _ = stage(Stage(shape, (3, 3), (2, 2), codes=pool and training), BF16)
    case.params.lrn = LrnWindow(groups=1, **lrn)
    r = F.relu(shape.convolution(*(case.inputs[name].double() for name in ("x", "weight", "bias"))))
    y = torch_lrn(r, **lrn)
    if pool:
        y = F.max_pool2d(y, 3, 2)
    else:
        case.params.pool.kernel_h = 0
        case.params.pooled_height, case.params.pooled_width = shape.out
    case.outputs["pooled"] = put(torch.empty_like(y), torch.bfloat16)
    if training:
        case.outputs["r"] = put(torch.empty_like(r), torch.bfloat16)
    (result,) = host_build.run("threads", [case])
    assert result.error == 0
    assert as_exact(result.outputs["pooled"], y.bfloat16(), y)
    if training:
        assert torch.equal(result.outputs["r"].double(), r)


def test_nan_wins():
    """max(0, NaN) is NaN, and so is the maximum of a window with one: its place is the last one's, as in PyTorch."""
    case, _ = stage(FUSED, F32)
    x = case.inputs["x"]
    x[0, 3, 6, 6] = float("nan")
    (result,) = host_build.run("threads", [case])
    r = F.relu(FUSED.shape.convolution(*(case.inputs[name].double() for name in ("x", "weight", "bias"))))
    y, code = FUSED.pool(r)
    assert y.isnan().any()
    torch.testing.assert_close(result.outputs["pooled"].double(), y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.outputs["code"], code)


def test_refusals():
    """float64 has no kernel, and the table of float32 has one row."""
    case, _ = stage(Stage(TILES[1], (3, 3), (2, 2)), F32)
    other, _ = stage(FUSED, F16)
    other.params.dtype = 3
    assert [result.error for result in host_build.run("address", [case, other])] == [1, 1]


def test_a_tile_that_does_not_take_the_stage_is_refused():
    """Without a tile's number two kernels run: rows too wide for shared memory, LRN."""
    wide = replace(TILES[0], reason="wide", height=3, width=270, channels=8)
    (case, _), (lrn, _) = stage(Stage(wide, (3, 3), (2, 2)), BF16), stage(Stage(TILES[0], (3, 3), (2, 2)), BF16)
    lrn.params.lrn = LrnWindow(groups=1, size=5, alpha=0.02, beta=0.75, k=1.0)
    errors = [result.error for result in host_build.run("address", [case, lrn])]
    assert errors == [CUDA_ERROR_NOT_SUPPORTED] * 2
