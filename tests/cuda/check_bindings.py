"""Runs the samples of tests/ops through the bindings of the CUDA kernels: for the process that bindings.run starts."""

from __future__ import annotations

import sys
from importlib import import_module
from itertools import cycle

import pytest
import torch
from torch import Tensor, nn

from alexnet_fast import FusedSequential, backends, tuning
from alexnet_fast.ops import conv_relu, convolution
from alexnet_fast.ops.conv_relu import FORWARDS, INPUT_GRADIENTS, WEIGHT_GRADIENTS
from alexnet_fast.ops.conv_stage import FORWARDS as STAGES

from ..ops import test_linear_int8, test_linear_relu
from ..ops.calls import Calls
from ..ops.compare import as_exact, double, error, output_gradient, results
from ..ops.layouts import relayout
from ..ops.samples import SAMPLES, Sample
from . import bindings

DENSE, OTHERS = ("contiguous", "channels_last"), ("misaligned", "transposed", "sliced")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(sample: Sample, dtype: torch.dtype, layout: str, wrong: list[str]) -> list[tuple]:
    """Compares output and gradients, and adds to ``wrong``; returns the calls that reached our operators."""
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
    moved = {name: relayout(tensor, layout) for name, tensor in data.items()}
    with Calls() as mode:
        actual = results(sample.ours, moved, relayout(dy, layout))
    for name in actual:
        if not as_exact(actual[name], peer[name], exact[name]):
            errors = error(actual[name], exact[name]), error(peer[name], exact[name])
            wrong.append(f"{sample}, {dtype}, {layout}: {name} errs by %.3g, PyTorch by %.3g" % errors)
    return mode.calls


def check_tf32() -> None:
    """1 + 2^-12 becomes 1 when it is rounded to ten bits of mantissa; both of torch's switches decide whether it is."""
    x, weight = torch.full((1, 8, 3, 3), 1 + 2.0**-12), torch.ones(8, 8, 1, 1)
    switch = torch.backends.cudnn.conv
    for allow in (True, False):
        switch.fp32_precision = "tf32" if allow else "ieee"
        assert torch.equal(conv_relu(x, weight), torch.full_like(x, 8 if allow else 8 + 2.0**-9))
        torch.backends.cudnn.allow_tf32 = not allow
        assert torch.equal(conv_relu(x, weight), torch.full_like(x, 8 + 2.0**-9 if allow else 8))
    switch.fp32_precision = "ieee"


def check_sm90() -> None:
    """Hopper's operators under their own names, in both layouts; what they refuse is an error."""
    kernel = torch.ops.alexnet_fast.conv_relu_sm90.default
    x, weight, bias = torch.ones(2, 24, 5, 6).bfloat16(), torch.ones(16, 24, 3, 3).bfloat16(), torch.ones(16).bfloat16()
    for layout in (torch.contiguous_format, torch.channels_last):
        y = kernel(x.contiguous(memory_format=layout), weight, bias, [1, 1], [1, 1], [1, 1], 1, False)
        assert y.is_contiguous(memory_format=layout)
        assert torch.equal(y, conv_relu(x, weight, bias, padding=1, backend="reference"))
        dx, dweight, _ = torch.ops.alexnet_fast.conv_relu_backward_sm90(
            torch.ones_like(y), x, weight, y, [1, 1], [1, 1], [1, 1], 1, [True, True, False], False
        )
        assert dx[0, 0, 2, 2] == 9 * 16
        assert dweight[0, 0, 1, 1] == 2 * 5 * 6
        checkered = (x * (torch.arange(6) % 2)).contiguous(memory_format=layout)
        operands = torch.ones_like(y), checkered, weight, y, [1, 1], [1, 1], [1, 1], 1, [True, False, False], False
        masked, *_ = torch.ops.alexnet_fast.conv_relu_backward_sm90(*operands, mask_dx=True)
        assert masked.is_contiguous(memory_format=layout)
        assert torch.equal(masked, dx * (checkered > 0))
    with pytest.raises(RuntimeError, match="conv_relu_sm90: "):
        kernel(x, weight, bias, [2, 2], [1, 1], [1, 1], 1, False)
    with pytest.raises(RuntimeError, match="conv_relu_sm90: operation not supported"):
        kernel(x.float(), weight.float(), bias.float(), [1, 1], [1, 1], [1, 1], 1, False)
    geometry = [1, 1], [1, 1], [1, 1], 1
    with pytest.raises(RuntimeError, match="conv_stage_sm90: operation not supported"):
        torch.ops.alexnet_fast.conv_stage_sm90(
            *(x, weight, bias, *geometry, 5, 1e-4, 0.75, 1.0, 1, [3, 3], [2, 2], [0, 0], False, True, False)
        )


def check_masked_run() -> None:
    """Convolutions behind one another in a run, the input's gradients by Hopper's kernel: each masks for the one
    before, which has no pass for it. Whole numbers, so equal by TF32 too."""
    pages = {stem: import_module(f"alexnet_fast.ops.{stem}") for stem in ("conv_relu", "conv_stage")}
    plain = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(12, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(48, 2)),
    )
    draw = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=draw).float()
    x = torch.randint(-1, 2, (2, 4, 9, 8), generator=draw).float()
    noted = []

    def backward(*arguments):
        *gradients, masked = pages["conv_relu"]._backward_in_run(*arguments)
        noted.append(
            (arguments[3] is None, arguments[-1], masked.numel() == 1)
        )  # dy is masked already; dx may be; dx is
        return *gradients, masked

    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("alexnet_fast", "IMPL") as library:
        library.impl("conv_relu_backward_in_run", backward, "CPU")
        for stem, page in pages.items():
            library.impl(f"{stem}_tuned", page._tuned, "CPU")
            patch.setitem(backends.AUTO["cpu"], stem, "tuned")
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        patch.setattr(tuning, "capability", lambda device: (9, 0))
        patch.setattr(tuning, "shipped", lambda form, device: "cuda_sm90" if "input" in form.operator else "cuda")
        backends.forget()
        found = torch.autograd.grad(FusedSequential(*plain)(x).sum(), list(plain.parameters()))
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    backends.forget()
    assert noted == [(True, True, True), (True, True, True), (True, False, False)]
    for one, other in zip(found, torch.autograd.grad(plain(x).sum(), list(plain.parameters())), strict=True):
        assert torch.equal(one, other)


def check_candidates() -> None:
    """Each of this package's candidates in tuning.py, with each of its tiles, gives the same whole numbers."""
    draw = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 24, 9, 9), "weight": (16, 24, 3, 3), "bias": (16,), "dy": (2, 16, 9, 9)}
    t = {name: torch.randint(-1, 2, size, generator=draw).bfloat16() for name, size in sizes.items()}
    t = {name: v.contiguous(memory_format=torch.channels_last) if v.dim() == 4 else v for name, v in t.items()}
    geometry = [1, 1], [1, 1], [1, 1], 1
    forward = t["x"], t["weight"], t["bias"], *geometry
    for table, arguments in (
        (FORWARDS, forward),
        (STAGES, (*forward, 0, 0.0, 0.0, 0.0, 1, [3, 3], [2, 2], [0, 0], False, True)),
        *((gradients, (t["dy"], t["x"], t["weight"], *geometry)) for gradients in (INPUT_GRADIENTS, WEIGHT_GRADIENTS)),
    ):
        wanted = table["cuda"](*arguments)
        for name in table:
            if name.startswith("cuda"):
                for one, other in zip(listed(table[name](*arguments)), listed(wanted), strict=True):
                    assert torch.equal(one, other), name
    with pytest.raises(RuntimeError, match="conv_relu: invalid argument"):
        convolution.own_kernel("conv_relu")(*forward, tile=5)


def check_linear_int8() -> list[tuple]:
    """The tests of tests/ops, in every shape and layout of theirs; returns the calls that reached the operator."""
    with Calls() as mode:
        for shape, dtype in zip(test_linear_int8.SHAPES, cycle(DTYPES)):
            test_linear_int8.test_as_exact_as_torch(shape, dtype, "auto", "cpu")
        test_linear_int8.test_values_that_are_no_numbers(3, "auto", "cpu")
        test_linear_int8.test_layouts_and_dimensions("auto", "cpu")
        test_linear_int8.test_gradients("auto", "cpu")
    test_linear_int8.test_past_the_function()
    test_linear_relu.past_the_function()
    return mode.calls


def listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


def main() -> None:
    bindings.take_over(sys.argv[1])
    check_tf32()
    check_candidates()
    check_sm90()
    check_masked_run()
    # AlexNet's first convolution is check_variants'; the gradient of its image takes long here.
    samples = [s for s in SAMPLES if s.stem in bindings.STEMS and not (s.weight and "AlexNet" in s.reason)]
    int8 = check_linear_int8()
    for func, args in int8[::4]:
        torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
    reached, wrong = {func.name() for func, _ in int8}, []
    for number, sample in enumerate(samples):
        for turn, layout in enumerate((DENSE[number % 2], OTHERS[number % 3])):
            calls = check(sample, DTYPES[(number + turn) % 3], layout, wrong)
            reached |= {func.name() for func, _ in calls}
            if layout in DENSE:
                for func, args in calls:
                    torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
    assert not wrong, "\n" + "\n".join(wrong)
    print(len(samples), *sorted(reached))


if __name__ == "__main__":
    main()
