"""conv_relu_fwd and conv_relu_bwd on the CPU: the same sources as on the card, with their races and bounds watched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.compare import as_exact, error
from . import host_build
from .conv import (
    BF16,
    EDGES,
    F16,
    F32,
    MODES,
    TF32,
    TILE_ROWS,
    TILES,
    Mode,
    Shape,
    backward,
    folded,
    forward,
    gradients,
    prepared,
    random_shapes,
)
from .host_build import Case

Expected = tuple[host_build.Case, dict[str, Tensor]]
modes = pytest.mark.parametrize("mode", MODES, ids=str)

# At least 200 shapes forward, in every mode, and 200 backward, which cost three times as much, in all of them together.
FORWARD = EDGES + random_shapes(180, seed=1)
TINY = random_shapes(200, seed=8, pixels=64, depth=48)
BACKWARD = {
    BF16: EDGES + random_shapes(40, seed=2) + TINY[:40],
    F16: EDGES[::3] + TINY[40:80],
    TF32: EDGES + TINY[80:120],
    F32: EDGES[::2] + TINY[120:140],
}
TYPICAL = [
    Shape("3x3", 2, 24, 7, 9, 40, (3, 3), padding=(1, 1)),
    Shape("space to depth", 1, 3, 27, 27, 16, (11, 11), (4, 4), (2, 2)),
    Shape("two towers of odd channels", 2, 14, 5, 6, 10, (3, 3), (2, 1), (1, 1), groups=2),
    Shape("deep", 1, 136, 4, 4, 8, (5, 5), padding=(2, 2)),
    Shape("several splits of pixels", 2, 8, 19, 18, 8, (1, 2)),
]


def check(kind: str, expected: list[Expected]) -> None:
    """Every output equals its exact value: with whole numbers nothing is rounded."""
    results = host_build.run(kind, [case for case, _ in expected])
    for (case, exact), result in zip(expected, results, strict=True):
        assert result.error == 0
        for name, value in exact.items():
            actual = result.outputs[name].double()
            assert torch.equal(actual, value), (
                f"{case.launcher}, {name}: {(actual != value).sum()} of {value.numel()} elements differ, by up to "
                f"{error(actual, value):.3g}; {case.inputs['x'].shape} * {case.inputs['weight'].shape}, "
                f"stride {case.params.window.stride_h}, {case.params.window.stride_w}"
            )


@modes
def test_forward(mode):
    check("threads", [forward(shape, mode) for shape in FORWARD])


@modes
def test_backward(mode):
    """All three gradients at once, dy masked on its way in."""
    check("threads", [backward(shape, mode) for shape in BACKWARD[mode]])


ADDRESS_FORWARD = {BF16: EDGES + TINY, F32: EDGES[::3]}
ADDRESS_BACKWARD = {BF16: EDGES[::3] + TINY, F32: EDGES[::9]}


@pytest.mark.parametrize("mode", [BF16, F32], ids=str)
def test_under_the_address_sanitizer(mode):
    check("address", [forward(shape, mode) for shape in ADDRESS_FORWARD[mode]])
    check("address", [backward(shape, mode) for shape in ADDRESS_BACKWARD[mode]])


def test_number_of_shapes():
    """200 random shapes in either build, forward and backward."""
    for table in ({BF16: FORWARD}, BACKWARD, ADDRESS_FORWARD, ADDRESS_BACKWARD):
        assert sum(len(set(shapes)) for shapes in table.values()) >= 200


@modes
def test_tiles(mode):
    """Every tile of the forward table, which the input gradient takes too, and every tile of the weight gradient's,
    whatever the launcher would choose."""
    rows = [shape for shape in TILES if shape.tile <= TILE_ROWS[mode.name]]
    weight_rows = [shape for shape in rows if shape.tile <= TILE_ROWS[mode.name] // 2 or shape.tile == 1]
    weights = [backward(shape, mode, wanted=("dweight",)) for shape in weight_rows]
    inputs = [backward(shape, mode, wanted=("dx", "dbias")) for shape in rows]
    check("threads", [forward(shape, mode) for shape in rows] + inputs + weights)


@pytest.mark.parametrize("mode", [BF16, F32], ids=str)
def test_masked_already(mode):
    """Without y the kernel takes dy as it is; conv_stage's backward pass masks it before."""
    check("threads", [backward(shape, mode, masks=False) for shape in EDGES[::4]])


@modes
def test_prepared_weights(mode):
    """What conv_prepare writes, and forward from it, wherever x begins."""
    some = EDGES if mode is BF16 else EDGES[1::3]
    weights = [forward(shape, mode)[0].inputs["weight"] for shape in some]
    wanted = [folded(shape, weight) for shape, weight in zip(some, weights, strict=True)]
    cases = [
        Case("conv_prepare", shape.params(mode), {"weight": weight}, {"workspace": result})
        for shape, weight, result in zip(some, weights, wanted, strict=True)
    ]
    for result, exact in zip(host_build.run("threads", cases), wanted, strict=True):
        assert torch.equal(result.outputs["workspace"], exact)
    offsets = {"x": mode.dtype.itemsize}
    check("threads", [prepared(shape, *forward(shape, mode)) for shape in some])
    check("threads", [prepared(shape, *forward(shape, mode, offsets=offsets)) for shape in some])


WANTED = [("dx",), ("dweight",), ("dbias",), ("dx", "dbias"), ("dweight", "dbias")]


def test_gradients_wanted():
    """Each gradient alone, and each pair: an output that nobody asked for has no pointer to write to."""
    check("threads", [backward(shape, BF16, wanted=wanted) for shape in TYPICAL[:3] for wanted in WANTED])


def test_batch_of_0():
    """With an empty batch the weight's gradient is zero, and is written."""
    empty = Shape("empty", 0, 8, 5, 5, 8, (3, 3), padding=(1, 1))
    odd = Shape("empty", 0, 3, 9, 9, 5, (3, 3), (2, 2))
    check("threads", [forward(empty, BF16), forward(odd, BF16), backward(empty, BF16), backward(odd, BF16)])


def test_misaligned():
    """A tensor that begins between two multiples of 16 bytes goes through the workspace, or is written in elements."""
    shape, odd = TYPICAL[0], TYPICAL[2]
    step = {BF16: 2, F32: 4}
    fwd = [
        forward(s, mode, offsets={name: step[mode]})
        for s in (shape, odd)
        for mode in step
        for name in ("x", "weight", "bias", "y")
    ]
    names = ("x", "weight", "dy", "y", "dx", "dweight", "dbias")
    check("threads", fwd + [backward(shape, mode, offsets={name: step[mode]}) for mode in step for name in names])


def test_schedules():
    """The same bits in whichever order blocks and threads run; the splits' sum has its own order."""
    cases = [forward(TYPICAL[0], BF16, False, schedules=20), forward(TYPICAL[1], F32, False, schedules=20)]
    cases += [backward(TYPICAL[4], BF16, False, schedules=20), backward(TYPICAL[0], TF32, False, schedules=10)]
    for result in host_build.run("threads", [case for case, _ in cases]):
        assert result.error == 0


# ---- Accuracy --------------------------------------------------------------------------------------------------------


def rounded(tensor: Tensor, mode: Mode) -> Tensor:
    """Operands as the multiplier sees them: TF32 keeps ten bits of mantissa and rounds ties away from zero."""
    if not mode.allow_tf32:
        return tensor
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@modes
def test_as_exact_as_torch(mode):
    """Against float64, in the maximum norm; PyTorch's own result in that dtype is the measure, for TF32 on operands
    that were rounded to it before."""
    expected = [forward(shape, mode, False) for shape in TYPICAL] + [backward(shape, mode, False) for shape in TYPICAL]
    results = host_build.run("threads", [case for case, _ in expected])
    for i, ((case, exact), result) in enumerate(zip(expected, results, strict=True)):
        shape, inputs = TYPICAL[i % len(TYPICAL)], case.inputs
        x, weight = rounded(inputs["x"], mode), rounded(inputs["weight"], mode)
        if case.launcher == "conv_relu_fwd":
            peers = {"y": F.relu(shape.convolution(x, weight, inputs["bias"]))}
        else:
            masked = inputs["dy"] * (inputs["y"] > 0)
            peers = gradients(shape, x.clone(), weight.clone(), rounded(masked, mode)) | {
                "dbias": masked.sum((0, 2, 3))
            }
        for name, peer in peers.items():
            actual = result.outputs[name]
            assert as_exact(actual, peer, exact[name]), (
                f"{shape}, {name}: errs by {error(actual, exact[name]):.3g}, PyTorch by {error(peer, exact[name]):.3g}"
            )


@pytest.mark.parametrize("fault", ["zero", "shifted", "no bias", "not masked"])
def test_accuracy_has_power(fault):
    """Wrong results that the comparison must not accept."""
    shape = TYPICAL[0]
    (case, exact), (_, grads) = forward(shape, BF16, False), backward(shape, BF16, False)
    inputs = {name: tensor.double() for name, tensor in case.inputs.items()}
    wrong = {
        "zero": torch.zeros_like(exact["y"]),
        "shifted": exact["y"].roll(1, 3),
        "no bias": F.relu(shape.convolution(inputs["x"], inputs["weight"])),
        "not masked": backward(shape, BF16, False, masks=False)[1]["dx"],
    }[fault]
    right = grads["dx"] if fault == "not masked" else exact["y"]
    assert as_exact(right.bfloat16(), right.bfloat16(), right)
    assert not as_exact(wrong.bfloat16(), right.bfloat16(), right)


# ---- Values that are not finite --------------------------------------------------------------------------------------


@modes
def test_nan_and_infinity(mode):
    """max(0, NaN) is NaN; the padding's zeros stay out of it; and a NaN in y lets the gradient pass, as in PyTorch."""
    shape = Shape("3x3", 1, 8, 6, 6, 8, (3, 3), padding=(1, 1))
    (case, _), (back, _) = forward(shape, mode), backward(shape, mode)
    x = case.inputs["x"]
    x[0, 0, 1, 1], x[0, 1, 4, 4] = float("nan"), float("inf")
    back.inputs["y"][0, 2, 3, 3] = float("nan")
    back.inputs["dy"][0, 2, 3, 3] = 1
    result, grads = host_build.run("threads", [case, back])
    y = F.relu(shape.convolution(*(case.inputs[name].double() for name in ("x", "weight", "bias"))))
    assert y.isnan().any()
    assert y.isinf().any()
    torch.testing.assert_close(result.outputs["y"].double(), y, rtol=0, atol=0, equal_nan=True)
    masked = torch.ops.aten.threshold_backward(back.inputs["dy"].double(), back.inputs["y"].double(), 0)
    for name, exact in gradients(shape, back.inputs["x"].double(), back.inputs["weight"].double(), masked).items():
        assert torch.equal(grads.outputs[name].double(), exact), name


# ---- Refusals --------------------------------------------------------------------------------------------------------

CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED = 1, 801


@pytest.mark.parametrize(
    "wrong",
    [{"dtype": 3}, {"tile": 5}, {"tile": -1}, {"groups": 3}, {"channels": 0}, {"height": 2**31}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_refusals(wrong):
    """What no kernel covers comes back as an error, before anything runs."""
    cases = [forward(TYPICAL[0], BF16)[0], backward(TYPICAL[0], BF16)[0]]
    for case in cases:
        for name, value in wrong.items():
            setattr(case.params, name, value)
    assert [result.error for result in host_build.run("address", cases)] == [CUDA_ERROR_INVALID_VALUE] * 2


def test_a_masked_dx_is_refused():
    """It is Hopper's alone."""
    case, _ = backward(TYPICAL[0], BF16)
    case.params.mask_dx = True
    (result,) = host_build.run("address", [case])
    assert result.error == CUDA_ERROR_NOT_SUPPORTED


@pytest.mark.parametrize(("gradient", "tile"), [("dx", 5), ("dweight", 3)])
def test_a_gradient_is_refused_a_tile_that_it_lacks(gradient, tile):
    case, _ = backward(replace(TYPICAL[0], tile=tile), BF16, wanted=(gradient,))
    (result,) = host_build.run("address", [case])
    assert result.error == CUDA_ERROR_INVALID_VALUE
