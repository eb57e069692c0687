"""pack() on the CUDA kernels, whose weights it prepares once: for the process that bindings.run starts.

Values are whole numbers so small that every sum is exact: any order of addition gives the same.
"""

from __future__ import annotations

import copy
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from alexnet_fast import FusedSequential, pack, recording
from alexnet_fast.models import AlexNet
from alexnet_fast.nn import packed
from alexnet_fast.nn.replays import Prepared
from alexnet_fast.ops import convolution
from alexnet_fast.ops.conv_relu import FORWARDS
from alexnet_fast.ops.conv_stage import FORWARDS as STAGES

from ..ops.layouts import relayout
from ..ops.samples import SAMPLES
from ..recorders import StandIn
from . import bindings

PREPARE = torch.ops.alexnet_fast.conv_prepare.default


def check_samples() -> int:
    """Each sample's result, to the last bit, from weights that are prepared before the call; returns how many were."""
    asked = []

    def find(weight: Tensor, *geometry: tuple[int, ...]) -> Tensor:
        asked.append((weight, *geometry))
        return PREPARE(weight, *geometry)

    for sample in SAMPLES:
        if sample.stem in ("conv_relu", "conv_stage"):
            for dtype, layout in ((torch.bfloat16, "channels_last"), (torch.float32, "misaligned")):
                data = {name: relayout(tensor, layout) for name, tensor in sample.data(dtype).items()}
                before, wanted = len(asked), sample.ours(data)
                with convolution.prepared_by(find):
                    assert torch.equal(sample.ours(data), wanted), sample
                reads = convolution.read_as_it_is(data["weight"])
                assert reads == (len(asked) == before), sample
    for arguments in asked[::3]:
        torch.library.opcheck(PREPARE, arguments, test_utils=("test_schema", "test_faketensor"))
    return len(asked)


def check_candidates() -> None:
    """Each of this package's candidates in tuning.py, Hopper's too, takes the prepared weight, and none other."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randint(-1, 2, size, generator=draw).bfloat16() for size in ((2, 24, 9, 9), (16, 24, 3, 3), (16,))
    )
    geometry = [1, 1], [1, 1], [1, 1], 1
    prepared = PREPARE(weight, [1, 1], [1, 1])
    wrong = torch.zeros_like(weight)
    for table, rest in ((FORWARDS, ()), (STAGES, (0, 0.0, 0.0, 0.0, 1, [3, 3], [2, 2], [0, 0], False, False))):
        wanted = table["cuda"](x, weight, bias, *geometry, *rest)
        for name in table:
            if name.startswith("cuda"):
                with convolution.prepared_by(lambda *_: prepared):
                    result = table[name](x, wrong, bias, *geometry, *rest)
                for one, other in zip(listed(result), listed(wanted), strict=True):
                    assert torch.equal(one, other), name


def listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


def check_refusals() -> None:
    x, weight = torch.ones(1, 3, 9, 9), torch.ones(4, 3, 3, 3)
    kernel, geometry = torch.ops.alexnet_fast.conv_relu_kernel.default, ([2, 2], [1, 1], [1, 1], 1, False, 0)
    right = PREPARE(weight, [2, 2], [1, 1])
    longer = torch.cat([right, right])
    for wrong in (right[:-4], longer, right.half(), longer[1 : 1 + len(right)], longer[::2], weight):
        with pytest.raises(RuntimeError, match="conv_relu: prepared "):
            kernel(x, weight, None, *geometry, wrong)
    with pytest.raises(RuntimeError, match="conv_prepare: "):
        PREPARE(weight, [2, 2], [1])
    with pytest.raises(RuntimeError, match="conv_prepare is not differentiable"):
        PREPARE(weight.requires_grad_(), [2, 2], [1, 1]).sum().backward()


# ---- Nets ------------------------------------------------------------------------------------------------------------


def whole(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randint(-1, 2, parameter.shape))
    return net.eval()


def small() -> FusedSequential:
    return FusedSequential(
        *(nn.Conv2d(3, 16, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 3)),
    )


def image(batch: int = 1) -> Tensor:
    return torch.randint(-1, 2, (batch, 3, 25, 25)).float()


class Counted:
    """A packed net; ``prepared`` counts the weights that its calls have prepared."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.plain = copy.deepcopy(net)
        pack(net)

    def call(self, x: Tensor, prepared: int, stale: bool = False) -> None:
        """The net's result is the plain net's, or if ``stale`` what that was; the call has prepared so many weights."""
        with mock.patch.object(Prepared, "_prepare", autospec=True, side_effect=Prepared._prepare) as counted:
            y = self.net(x)
        assert counted.call_count == prepared, f"{counted.call_count} weights prepared, expected {prepared}"
        if not stale:
            self.plain.load_state_dict(self.net.state_dict())
        assert torch.equal(y, self.plain(x))


def check_life(form: torch.memory_format, count: int) -> None:
    """``count``: how many of the two weights have to be prepared in that layout."""
    net = Counted(whole(small()).to(memory_format=form))
    first, x = net.net[0], image().contiguous(memory_format=form)
    other, data = nn.Parameter(first.weight.detach().neg()), first.weight.detach().roll(1, 0)
    with torch.inference_mode():
        for prepared in (0, count, 0, 0):
            net.call(x, prepared)
        first.weight.mul_(-1)
        net.call(x, 1)
        net.call(x, 0)
        two = image(2).contiguous(memory_format=form)
        for _ in range(2):
            net.call(two, 0)  # by another recording, from the same memory
        first.bias.add_(1)
        net.call(x, 0)
        first.weight.data.neg_()
        net.call(x, 0, stale=True)  # it leaves no trace; and the weight itself is not read
        pack(net.net)
        for prepared in (0, count, 0):
            net.call(x, prepared)
        first.weight = other
        for prepared in (0, count, 0):
            net.call(x, prepared)
        first.weight.data = data
        for prepared in (0, count, 0):
            net.call(x, prepared)
        first.weight = nn.Parameter(other.neg(), requires_grad=False)  # made here: counts no versions
        for prepared in (0, count - 1, 0):
            net.call(x, prepared)


@torch.no_grad()
def check_alexnet() -> None:
    """One recording, in which all weights but those that are read as they are have been prepared."""
    net = whole(AlexNet(3, widths=(8, 8, 8, 8, 8, 16, 16)))
    x = torch.randint(-1, 2, (1, 3, 63, 63)).float()
    StandIn.made = 0
    counted = Counted(net)
    for prepared in (0, 5, 0):
        counted.call(x, prepared)
    assert StandIn.made == 1
    net.features[3].weight.neg_()
    counted.call(x, 1)
    assert StandIn.made == 1


def main() -> None:
    bindings.take_over(sys.argv[1])
    recording.RECORDERS["cpu"] = StandIn
    torch.manual_seed(0)
    count = check_samples()
    check_candidates()
    check_refusals()
    packed.onednn_runs = lambda dtype: False  # it would have the CPU's tensors first
    check_life(torch.contiguous_format, 2)
    check_life(torch.channels_last, 1)
    check_alexnet()
    print(count)


if __name__ == "__main__":
    main()
