"""Each operator on the samples of tests/ops, which hold the reasons and the tolerances."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import backends
from tests.ops.calls import Calls
from tests.ops.compare import as_exact, double, error, output_gradient, results
from tests.ops.layouts import relayout
from tests.ops.samples import ROUNDED, SAMPLES, Sample

# Every sample is run in float32 in both layouts, and once in another dtype or from other addresses, which take turns.
OTHERS = [
    (torch.float16, "contiguous"),
    (torch.bfloat16, "channels_last"),
    (torch.float32, "misaligned"),
    (torch.float16, "channels_last"),
    (torch.bfloat16, "contiguous"),
    (torch.float32, "transposed"),
    (torch.float32, "sliced"),
]
CASES = [(s, torch.float32, layout) for s in SAMPLES for layout in ("contiguous", "channels_last")]
CASES += [(s, *OTHERS[i % len(OTHERS)]) for i, s in enumerate(SAMPLES)]


def run(sample: Sample, data: dict, dy: torch.Tensor, device: str, layout: str) -> dict[str, torch.Tensor]:
    data = {name: relayout(tensor.to(device), layout) for name, tensor in data.items()}
    made = results(lambda leaves: sample.ours(leaves, "triton"), data, relayout(dy.to(device), layout))
    return {name: tensor.cpu() for name, tensor in made.items()}


@pytest.mark.parametrize(("sample", "dtype", "layout"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_as_exact_as_torch(sample, dtype, layout, device):
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
    for name, actual in run(sample, data, dy, device, layout).items():
        assert as_exact(actual, peer[name], exact[name]), (
            f"{name}: error {error(actual, exact[name]):.3g}, PyTorch's {error(peer[name], exact[name]):.3g}"
        )


@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.stem not in ROUNDED and not s.arguments.get("lrn")], ids=str
)
def test_whole_numbers_are_exact(sample, device):
    """Any difference is a wrong index, or another winner among equals. bfloat16: the interpreter truncates to it, which
    leaves whole numbers whole."""
    data, dy = sample.whole_numbers(torch.bfloat16), output_gradient(sample, torch.bfloat16, whole_numbers=True)
    exact = results(sample.torch, double(data), dy.double())
    for name, actual in run(sample, data, dy, device, "channels_last").items():
        assert torch.equal(actual.double(), exact[name]), name


# ---- Gradients, and what the dispatcher is told ----------------------------------------------------------------------

# One sample for each way that outputs, saved tensors and layouts can differ.
REASONS = {
    "lrn": ["windows end at the border of two towers", "one pixel"],
    "max_pool": ["rounding up would begin in the padding", "one pixel"],
    "epilogue": ["bias and ReLU", "pool without bias", "LRN and padded pool, stride 1"],
    "conv_relu": ["two towers", "no bias", "1x1"],
    "conv_stage": ["AlexNet's first", "LRN within towers", "no bias"],
    "linear_relu": ["a classifier's layer", "no bias"],
    "linear_relu_dropout": ["a classifier's layer", "no bias"],
    "lpips_layer": ["mean over pixels", "one pixel"],
}
CHECKED = [s for s in SAMPLES if s.reason in REASONS[s.stem]]


def test_every_sample_is_found():
    assert len(CHECKED) == sum(len(reasons) for reasons in REASONS.values())


@pytest.mark.parametrize("sample", CHECKED, ids=str)
def test_gradcheck(sample, monkeypatch, device):
    """By finite differences, in float64, which the kernels have for this test alone."""
    if device == "cuda" and sample.weight:
        pytest.skip("Triton compiles no float64 matrix product of the tuned tiles' depth")
    monkeypatch.setitem(backends.DTYPES, "triton", (torch.float64,))
    data = {name: tensor.to(device).requires_grad_() for name, tensor in sample.data(torch.float64).items()}

    def call(*leaves):
        return sample.ours(dict(zip(data, leaves, strict=True)), "triton")

    assert torch.autograd.gradcheck(call, tuple(data.values()), fast_mode=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sample", CHECKED, ids=str)
def test_fakes_tell_the_truth(sample, layout, device):
    """Shapes, dtypes and strides of every operator that forward and backward reach. (opcheck as a whole runs on the
    native operators, whose schema, fake and autograd formula these are.)"""
    data = {name: relayout(tensor.to(device), layout) for name, tensor in sample.data(torch.float32).items()}
    with Calls() as mode:
        results(
            lambda leaves: sample.ours(leaves, "triton"), data, relayout(output_gradient(sample, torch.float32), layout)
        )
    assert {function.name().endswith("_backward_triton") for function, _ in mode.calls} == {True, False}
    for function, arguments in mode.calls:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("sample", [s for s in CHECKED if s.reason in ("two towers", "LRN within towers")], ids=str)
def test_second_derivative(sample, device):
    """torch's operators compute it, from what Triton's kernels kept."""
    seconds = []
    for backend in ("triton", "reference"):
        data = {name: tensor.to(device).requires_grad_() for name, tensor in sample.data(torch.float32).items()}
        first = torch.autograd.grad(sample.ours(data, backend).square().sum(), list(data.values()), create_graph=True)
        seconds.append(torch.autograd.grad(sum(grad.square().sum() for grad in first), list(data.values())))
    for ours, reference in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())
