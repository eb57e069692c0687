"""The whole stage: the same as its parts, and what it keeps for backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import BackendError, ops
from alexnet_fast.ops import LRN, Pool

from .compare import results, saved_bytes


def test_without_lrn_and_pool_it_is_conv_relu(operators):
    x, weight, bias = torch.randn(2, 5, 7, 7, requires_grad=True), torch.randn(6, 5, 3, 3), torch.randn(6)
    y = ops.conv_stage(x, weight, bias, backend="cpu")
    assert torch.equal(y, ops.conv_relu(x, weight, bias, backend="cpu"))
    assert operators(lambda x: ops.conv_stage(x, weight, bias, backend="cpu"), x) == ["conv_relu"]


def test_equals_the_parts_in_a_row(backend, device):
    """conv_stage against convolution, then epilogue: bit for bit, as they are the same kernels."""
    data = {"x": torch.randn(2, 6, 9, 9), "weight": torch.randn(8, 3, 3, 3), "bias": torch.randn(8)}
    data = {name: tensor.to(device) for name, tensor in data.items()}
    windows = {"lrn": LRN(5, 0.1, groups=2), "pool": Pool(3, 2)}
    whole = lambda t: ops.conv_stage(t["x"], t["weight"], t["bias"], 1, 1, groups=2, **windows, backend=backend)  # noqa: E731
    parts = lambda t: ops.epilogue(  # noqa: E731
        F.conv2d(t["x"], t["weight"], None, 1, 1, groups=2), t["bias"], **windows, backend=backend
    )
    dy = torch.randn(2, 8, 4, 4, device=device)
    for (name, a), b in zip(results(whole, data, dy).items(), results(parts, data, dy).values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_keeps_no_activation_of_the_convolutions_size():
    """Input, weight and one byte an output."""
    x, weight = torch.randn(2, 5, 15, 15, requires_grad=True), torch.randn(6, 5, 3, 3, requires_grad=True)
    saved = saved_bytes(lambda: ops.conv_stage(x, weight, torch.zeros(6), pool=Pool(3, 2), backend="cpu"))
    assert saved == 4 * (x.numel() + weight.numel()) + 2 * 6 * 6 * 6


@pytest.mark.gpu
def test_inference_allocates_its_output_alone():
    """Channels in whole chunks of 16 bytes need no workspace, and nothing of the convolution's size is ever there."""
    x, weight = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for size in ((2, 32, 27, 27), (64, 32, 3, 3))
    )
    allocations = []
    for _ in range(2):  # the first call may set up what torch keeps
        with torch.inference_mode():
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            y = ops.conv_stage(x, weight, padding=1, pool=Pool(3, 2), backend="cuda")
            allocations.append(torch.cuda.memory_stats()["allocation.all.allocated"] - before)
    assert y.shape == (2, 64, 13, 13)
    assert allocations[1] == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"padding": "same"}, "padding='same' with an even kernel"),
        ({"pool": Pool(16)}, "windows of more than 255 elements"),
    ],
)
def test_what_only_the_reference_covers(arguments, reason):
    x, weight = torch.randn(1, 3, 20, 20), torch.randn(4, 3, 2, 2)
    arguments = {"lrn": LRN(3), **arguments}
    expected = ops.conv_stage(x, weight, **arguments, backend="reference")
    assert torch.equal(ops.conv_stage(x, weight, **arguments), expected)
    with pytest.raises(BackendError, match=f"conv_stage: backend 'cpu' does not cover {reason}"):
        ops.conv_stage(x, weight, **arguments, backend="cpu")
