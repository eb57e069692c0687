"""What only a card can show of the CUDA kernels: graphs, streams, devices, tensors of more than 2³¹ elements."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet_fast import AlexNet, backend, ops
from alexnet_fast.models import VARIANTS
from alexnet_fast.ops import LRN, Pool

pytestmark = pytest.mark.gpu

SMALL, OVERLAPPING = LRN(5, 1e-3), Pool(3, 2)
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def ones(x: Tensor, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=x.dtype, device=x.device)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "lrn": lambda x: ops.local_response_norm(x, 5, backend="cuda"),
    "max_pool": lambda x: ops.max_pool2d(x, 3, 2, backend="cuda"),
    "epilogue": lambda x: ops.epilogue(x, ones(x, x.shape[1]), backend="cuda"),
    "epilogue, LRN and pool": lambda x: ops.epilogue(x, lrn=SMALL, pool=OVERLAPPING, backend="cuda"),
    "conv_relu": lambda x: ops.conv_relu(x, ones(x, 8, x.shape[1], 3, 3), padding=1, backend="cuda"),
    "conv_stage": lambda x: ops.conv_stage(x, ones(x, 8, x.shape[1], 1, 1), pool=OVERLAPPING, backend="cuda"),
}
each_operator = pytest.mark.parametrize("call", OPERATORS.values(), ids=OPERATORS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=["NCHW", "NHWC"])


def images(*shape: int, layout: torch.memory_format = torch.channels_last, device: str = "cuda:0") -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16, memory_format=layout)


def both_passes(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the input's gradient at it."""
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, y.detach())[0]


def same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(some, others, strict=True))


# ---- Graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["auto", "cuda"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_graph_of_the_whole_net(variant, named):
    """Every launch is recorded, and replays follow the input's new values and allocate nothing."""
    net = AlexNet(variant=variant).eval().to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    x = images(2, 3, 224, 224)
    with torch.no_grad(), backend(named):
        warm = torch.cuda.Stream()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            net(x)
        torch.cuda.current_stream().wait_stream(warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = net(x)
        y.fill_(torch.nan)
        x.neg_()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        graph.replay()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
        torch.testing.assert_close(y, net(x))


class Outputs(TorchDispatchMode):
    """Counts the tensors that operators return, and the calls of convolutions."""

    tensors = convolutions = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "alexnet_fast":
            results = result if isinstance(result, (tuple, list)) else [result]
            self.tensors += sum(isinstance(one, Tensor) and one.numel() > 0 for one in results)
            self.convolutions += "conv" in function._opname
        return result


@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_inference_allocates_outputs_alone(variant):
    """Each call allocates its outputs, and a workspace if the convolution asks for one."""
    net = AlexNet(variant=variant).eval().to("cuda", torch.bfloat16, memory_format=torch.channels_last).features
    x = images(2, 3, 224, 224)
    with torch.no_grad(), backend("cuda"):
        with Outputs() as counted:
            net(x)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        net(x)
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    assert 0 < allocations <= counted.tensors + counted.convolutions


# ---- Streams, devices, memory ----------------------------------------------------------------------------------------


@each_layout
@each_operator
def test_side_stream(call, layout):
    """The input is written late, on a side stream: work on any other stream would read what was there before."""
    data = images(2, 16, 33, 35, layout=layout)
    expected = both_passes(call, data)
    x = torch.zeros_like(data)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles
        x.copy_(data)
        found = both_passes(call, x)
    side.synchronize()
    assert same(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second CUDA device")
@each_operator
def test_second_device(call):
    """Work on the second device while the first is the current one, and stays so."""
    data = images(2, 16, 33, 35)
    found = both_passes(call, data.to("cuda:1"))
    assert [tensor.device.index for tensor in found] == [1, 1]
    assert torch.cuda.current_device() == 0
    assert same(found, both_passes(call, data))


@each_layout
@each_operator
def test_memory_full_of_nan(call, layout):
    """Outputs, codes and workspaces come from memory that others have used."""
    data = images(2, 13, 33, 35, layout=layout)
    expected = both_passes(call, data)
    torch.cuda.empty_cache()
    poison = [torch.full((2**bits,), torch.nan, device="cuda") for bits in range(8, 25) for _ in range(3)]
    del poison
    found = both_passes(call, data)
    assert not any(tensor.isnan().any() for tensor in found)
    assert same(found, expected)


@each_layout
@each_operator
def test_more_than_two_to_the_31st_elements(call, layout):
    """The last image, whose elements lie beyond 2³¹, comes out as it does alone."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("less than 48 GiB of the card's memory is free")
    batch = 2**31 // (64 * 128 * 128) + 1
    x = torch.empty(batch, 64, 128, 128, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    y, dx = both_passes(call, x)
    found = y[-1:].clone(), dx[-1:].clone()
    del y, dx
    assert same(found, both_passes(call, x[-1:].clone(memory_format=layout)))
