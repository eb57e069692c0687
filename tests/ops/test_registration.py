"""Schemas, fakes, strides and autograd registration, by torch's own opcheck on the calls that the samples make."""

from __future__ import annotations

import pytest
import torch

from .calls import calls_of
from .compare import output_gradient, results
from .layouts import relayout
from .samples import SAMPLES

# One sample for each way that an operator's outputs, saved tensors and layouts can differ.
REASONS = {
    "lrn": ["windows end at the border of two towers", "(N, C, L)", "one pixel", "batch 0"],
    "max_pool": ["rounding up would begin in the padding", "(C, H, W)", "one pixel", "batch 0"],
    "epilogue": [
        "bias and ReLU",
        "ReLU alone",
        "LRN without bias, even window, two towers",
        "pool without bias",
        "LRN and padded pool, stride 1",
        "one pixel",
        "batch 0",
    ],
    "conv_relu": ["two towers", "no bias", "1x1", "a channel alone", "batch 0"],
    "conv_stage": ["AlexNet's first", "two towers", "LRN within towers", "no bias", "batch 0"],
    "linear_relu": ["a classifier's layer", "no bias", "batch 0"],
    "linear_relu_dropout": ["a classifier's layer", "in evaluation", "no bias", "batch 0"],
    "lpips_layer": ["mean over pixels", "of each pixel", "one pixel", "batch 0"],
}
CHECKED = [s for s in SAMPLES if s.reason in REASONS[s.stem]]


def test_every_sample_is_found():
    assert len(CHECKED) == sum(len(reasons) for reasons in REASONS.values())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("sample", CHECKED, ids=str)
def test_opcheck(sample, layout):
    calls = calls_of(sample, layout)
    assert {"_backward" in func.name() for func, _ in calls} == {True, False}, "a pass reached no operator of ours"
    for func, args in calls:
        forward = "_backward" not in func.name()
        leaves = [
            arg.detach().requires_grad_(forward and arg.is_floating_point()) if isinstance(arg, torch.Tensor) else arg
            for arg in args
        ]
        torch.library.opcheck(func, leaves)


@pytest.mark.parametrize("sample", [s for s in SAMPLES if len(s.input) == 4 and 0 not in s.input], ids=str)
def test_channels_last_stays(sample, backend, device):
    """Between two stages a change of layout costs a pass over memory."""
    data = {name: relayout(tensor.to(device), "channels_last") for name, tensor in sample.data(torch.float32).items()}
    dy = relayout(output_gradient(sample, torch.float32).to(device), "channels_last")
    actual = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    # torch's gradient of a sum over channels is laid out as it likes.
    kept = ("output",) if (backend, sample.stem) == ("reference", "lpips_layer") else ("output", "input")
    for name in kept:
        assert actual[name].is_contiguous(memory_format=torch.channels_last), name
