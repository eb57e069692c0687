"""Shapes, strides and parameters nobody thought of, drawn by hypothesis. Failures it finds are kept as samples.

Whole numbers make the comparison exact, so nothing here depends on a tolerance; LRN is compared in float64.
"""

from __future__ import annotations

import pytest
import torch

from alexnet_fast.backends import DTYPES
from alexnet_fast.ops import Pool

from .compare import double, output_gradient, results
from .layouts import LAYOUTS, relayout
from .samples import Sample

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed: the extra dev brings it")
st = pytest.importorskip("hypothesis.strategies")
# The same examples each time: rarely, oneDNN's own convolutions fail on them (see test_conv_stage).
fuzz = hypothesis.settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
layouts = st.sampled_from(LAYOUTS)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
sides = st.integers(1, 20)


def inputs(channels: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(st.integers(1, 3), channels, sides, sides)


@st.composite
def pools(draw, height: int, width: int) -> dict:
    """A window that fits the image."""
    kernel = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    stride = draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, side // 2)) for side in kernel)
    hypothesis.assume(all(side + 2 * p >= k for side, p, k in zip((height, width), padding, kernel, strict=True)))
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": draw(st.booleans())}


def check_exact(sample: Sample, dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    hypothesis.assume(dtype in DTYPES.get(backend, [dtype]))
    data, dy = sample.whole_numbers(dtype), output_gradient(sample, dtype, whole_numbers=True)
    moved = {name: relayout(tensor.to(device), layout) for name, tensor in data.items()}
    actual = results(lambda leaves: sample.ours(leaves, backend), moved, relayout(dy.to(device), layout))
    for name, value in results(sample.torch, double(data), dy.double()).items():
        if value.abs().max() <= 256:  # beyond it bfloat16 rounds
            assert torch.equal(actual[name].cpu().double(), value), name


@fuzz
@hypothesis.given(st.data())
def test_lrn(backend, device, data):
    shape = data.draw(inputs(st.integers(1, 60)))
    groups = data.draw(st.sampled_from([g for g in range(1, shape[1] + 1) if shape[1] % g == 0]))
    parameters = {"size": data.draw(st.integers(1, 20)), "groups": groups}
    parameters |= {
        "alpha": data.draw(st.floats(0, 0.1)),
        "beta": data.draw(st.sampled_from([0.5, 0.75, 1.0, 0.3, 2.0])),
    }
    sample = Sample("lrn", "", shape, {**parameters, "k": data.draw(st.floats(0.5, 3))})
    tensors, dy = sample.data(torch.float64), output_gradient(sample, torch.float64)
    layout = data.draw(layouts)
    moved = {"input": relayout(tensors["input"].to(device), layout)}
    actual = results(lambda leaves: sample.ours(leaves, backend), moved, relayout(dy.to(device), layout))
    for name, value in results(sample.torch, tensors, dy).items():
        torch.testing.assert_close(actual[name].cpu(), value, rtol=1e-11, atol=1e-11)


@fuzz
@hypothesis.given(st.data())
def test_max_pool(backend, device, data):
    shape = data.draw(inputs(st.integers(1, 40)))
    sample = Sample("max_pool", "", shape, data.draw(pools(*shape[2:])))
    check_exact(sample, data.draw(dtypes), data.draw(layouts), backend, device)


@fuzz
@hypothesis.given(st.data())
def test_epilogue(backend, device, data):
    shape = data.draw(inputs(st.integers(1, 40)))
    arguments = {"pool": Pool(**data.draw(pools(*shape[2:])))} if data.draw(st.booleans()) else {}
    sample = Sample("epilogue", "", shape, arguments, bias=data.draw(st.booleans()))
    check_exact(sample, data.draw(dtypes), data.draw(layouts), backend, device)


@fuzz
@hypothesis.given(st.data())
def test_conv_stage(backend, device, data):
    groups = data.draw(st.integers(1, 3))
    shape = data.draw(inputs(st.integers(1, 6).map(lambda channels: channels * groups)))
    weight = (
        groups * data.draw(st.integers(1, 6)),
        shape[1] // groups,
        *data.draw(st.tuples(*[st.integers(1, 5)] * 2)),
    )
    geometry = {
        name: data.draw(st.tuples(*[st.integers(least, 3)] * 2)) for name, least in (("stride", 1), ("padding", 0))
    }
    geometry["dilation"] = data.draw(st.tuples(*[st.integers(1, 2)] * 2))
    rows, columns = (
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, k, s, p, d in zip(shape[2:], weight[2:], *geometry.values(), strict=True)
    )
    hypothesis.assume(rows > 0 and columns > 0)
    # Where a tap sees nothing but padding, the gradient of F.conv2d in bfloat16 may hold what was in memory. Without
    # this a oneDNN kernel once crashed here too, on a shape that nobody knows.
    for side, k, p, d in zip(shape[2:], weight[2:], geometry["padding"], geometry["dilation"], strict=True):
        hypothesis.assume(p < d * (k - 1) + 1 <= side + p)
    arguments = {**geometry, "groups": groups}
    if data.draw(st.booleans()):
        arguments["pool"] = Pool(**data.draw(pools(rows, columns)))
    sample = Sample("conv_stage", "", shape, arguments, weight, bias=data.draw(st.booleans()))
    check_exact(sample, data.draw(dtypes), data.draw(layouts), backend, device)
