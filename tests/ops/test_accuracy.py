"""Outputs and gradients are as exact as PyTorch's, whatever the dtype and the layout, and the test for it has power."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from .compare import DTYPES, as_exact, double, error, output_gradient, results
from .layouts import LAYOUTS, relayout
from .samples import ROUNDED, SAMPLES, Sample, max_pool, torch_lrn

DENSE = [("contiguous", "contiguous"), ("channels_last", "channels_last")]
OTHERS = [  # layouts of the inputs and of the output's gradient
    ("contiguous", "channels_last"),
    ("channels_last", "contiguous"),
    ("misaligned", "misaligned"),
    ("transposed", "sliced"),
    ("sliced", "transposed"),
]
CASES = [(dtype, *layouts) for dtype in DTYPES for layouts in DENSE] + [(torch.float32, *layouts) for layouts in OTHERS]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@cache
def expected(number: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """PyTorch's results for sample ``number``: computed in ``dtype``, and in float64 from the same data."""
    sample = SAMPLES[number]
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    return results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())


def check(actual: dict[str, Tensor], peer: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    for name, value in actual.items():
        assert as_exact(value, peer[name], exact[name]), (
            f"{name}: error {error(value, exact[name]):.3g}, PyTorch's {error(peer[name], exact[name]):.3g}"
        )


@pytest.mark.parametrize(("dtype", "layout", "gradient_layout"), CASES)
@samples
def test_as_exact_as_torch(sample, dtype, layout, gradient_layout, backend, device):
    data = {name: relayout(tensor.to(device), layout) for name, tensor in sample.data(dtype).items()}
    dy = relayout(output_gradient(sample, dtype).to(device), gradient_layout)
    actual = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    check({name: value.cpu() for name, value in actual.items()}, *expected(SAMPLES.index(sample), dtype))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("sample", [s for s in SAMPLES if len(s.input) > 1], ids=str)
def test_expanded_inputs_and_gradients(sample, axis, backend, device):
    """Many elements at one address, as ``sum().backward()`` gives gradients: the same as of a dense copy."""

    def expanded(tensor: Tensor) -> Tensor:
        return tensor.to(device).narrow(axis, 0, min(1, tensor.shape[axis])).expand(tensor.shape)

    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    data["input"], dy = expanded(data["input"]), expanded(output_gradient(sample, torch.float32))
    actual = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    dense = {name: tensor.contiguous() for name, tensor in data.items()}
    for name, value in results(lambda leaves: sample.ours(leaves, backend), dense, dy.contiguous()).items():
        torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("layout", LAYOUTS)
@samples
def test_input_is_left_alone(sample, layout, backend, device):
    """A kernel that writes to its input, or saves memory by reusing it, would break the caller's tensors."""
    data = {name: relayout(tensor.to(device), layout) for name, tensor in sample.data(torch.float32).items()}
    copies = {name: tensor.clone() for name, tensor in data.items()}
    results(lambda leaves: sample.ours(leaves, backend), data, output_gradient(sample, torch.float32).to(device))
    assert all(torch.equal(copies[name], data[name]) for name in data)


@samples
def test_without_gradient_the_output_is_the_same(sample, backend, device):
    """Inference takes other paths: no code is written, no ReLU output kept."""
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    training = sample.ours({name: tensor.clone().requires_grad_() for name, tensor in data.items()}, backend)
    with torch.inference_mode():
        assert torch.equal(sample.ours(data, backend), training)


@samples
def test_each_gradient_can_be_asked_alone(sample, backend, device):
    """Frozen layers ask for some gradients and not for others."""
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    dy = output_gradient(sample, torch.float32).to(device)
    whole = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    for name, tensor in data.items():
        leaf = tensor.clone().requires_grad_()
        (grad,) = torch.autograd.grad(sample.ours({**data, name: leaf}, backend), leaf, dy)
        torch.testing.assert_close(grad, whole[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sample", [s for s in SAMPLES if s.stem not in ROUNDED and not s.arguments.get("lrn")], ids=str
)
def test_whole_numbers_are_exact(sample, dtype, backend, device):
    """Sums of small integers are not rounded, so any difference is a wrong index, or another winner among equals."""
    data = {name: tensor.to(device) for name, tensor in sample.whole_numbers(dtype).items()}
    dy = output_gradient(sample, dtype, whole_numbers=True).to(device)
    actual = results(lambda leaves: sample.ours(leaves, backend), data, dy)
    exact = results(sample.torch, double(sample.whole_numbers(dtype)), dy.cpu().double())
    for name, value in exact.items():
        assert value.numel() == 0 or value.abs().max() <= 256, "not exact in bfloat16: choose another sample"
        assert torch.equal(actual[name].cpu().double(), value), name


# ---- Power: what must not pass -------------------------------------------------------------------------------------


def shifted(sample: Sample, data: dict[str, Tensor]) -> Tensor:
    """The sample's output with every window one place off: one channel for LRN, one column for the others."""
    if sample.stem == "lrn":
        x = data["input"]
        scale = torch_lrn(x, **sample.arguments) / x
        return x * scale.roll(1, 1)
    return sample.torch({**data, "input": data["input"].roll(1, -1)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", [s for s in SAMPLES if 0 not in s.input], ids=str)
def test_power(sample, dtype):
    """Tolerances wider than what they compare would accept these too."""
    peer, exact = expected(SAMPLES.index(sample), dtype)
    data = sample.data(dtype)
    for name in peer:
        assert not as_exact(torch.zeros_like(peer[name]), peer[name], exact[name]), f"a {name} of zeros"
    if "bias" in data:
        without = sample.torch({name: tensor for name, tensor in data.items() if name != "bias"})
        assert not as_exact(without, peer["output"], exact["output"]), "a dropped bias"
    # Some samples are symmetric: a window over the whole image, say. 16-bit LRN is too coarse for a window one off.
    moved = shifted(sample, double(data))
    if not as_exact(moved, exact["output"], exact["output"]) and not (sample.stem == "lrn" and dtype.itemsize == 2):
        assert not as_exact(moved.to(dtype), peer["output"], exact["output"]), "a shifted window"


def test_comparison_sees_special_values():
    """NaN where a number belongs, infinity of the wrong sign and a wrong shape are infinite errors, equal ones none."""
    nan, inf = float("nan"), float("inf")
    values = torch.tensor([1.0, nan, inf, -inf])
    assert error(values, values.double()) == 0
    for wrong in ([nan, nan, inf, -inf], [1, 1, inf, -inf], [1, nan, -inf, -inf], [1, nan, 1, -inf]):
        assert error(torch.tensor(wrong), values.double()) == inf
    assert error(values[:3], values.double()) == inf
    assert max_pool("", (1, 1, 3, 3), 3).data(torch.float32)["input"].unique().numel() == 9
