"""The operators inside what PyTorch offers around them: compile, export, autocast, vmap, functional gradients."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from alexnet_fast import BackendError, ops
from alexnet_fast.ops import LRN, Pool

from .compare import output_gradient, results
from .samples import SAMPLES, Sample

REASONS = {  # the first sample of each operator, and those whose operators return other tensors
    "lrn": ["the 2012 paper", "(N, C, L)"],
    "max_pool": ["AlexNet's overlapping windows", "(C, H, W)"],
    "epilogue": ["bias and ReLU", "ReLU alone", "LRN", "pool", "LRN and pool"],
    "conv_relu": ["AlexNet's first", "no bias"],
    "conv_stage": ["AlexNet's first", "two towers"],
    "linear_relu": ["a classifier's layer", "the last layer"],
    "linear_relu_dropout": ["a classifier's layer", "in evaluation"],
    "lpips_layer": ["mean over pixels", "of each pixel"],
}
CHOSEN = [s for s in SAMPLES if s.reason in REASONS[s.stem]]
samples = pytest.mark.parametrize("sample", CHOSEN, ids=str)


class Net(nn.Module):
    """All five operators in a row."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 5, 2), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = ops.conv_stage(x, self.conv1.weight, self.conv1.bias, 2, lrn=LRN(5, 0.1), pool=Pool(3, 2))
        x = ops.conv_relu(x, self.conv2.weight, None, padding=1)
        x = ops.max_pool2d(ops.local_response_norm(x, 5), 3, 1)
        return ops.epilogue(x, self.conv2.bias, pool=Pool(2))


def test_every_sample_is_found():
    assert len(CHOSEN) == sum(len(reasons) for reasons in REASONS.values())


@samples
def test_compile_forward_and_backward(sample):
    """One graph, traced with fakes, autograd included."""
    torch._dynamo.reset()
    data, dy = sample.data(torch.float32), output_gradient(sample, torch.float32)
    compiled = torch.compile(
        lambda leaves: sample.ours(leaves, "cpu"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    actual, expected = results(compiled, data, dy), results(lambda leaves: sample.ours(leaves, "cpu"), data, dy)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_net_takes_any_size(compiler):
    """Sizes stay symbols in the fakes: the second and third call must not compile again."""
    torch._dynamo.reset()
    net = Net()
    counter = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for shape in [(2, 3, 33, 37), (3, 3, 41, 29), (5, 3, 51, 39)]:
        x = torch.randn(shape)
        expected, actual = net(x), compiled(x)
        torch.testing.assert_close(actual, expected)
        dy = torch.randn_like(expected)
        parameters = list(net.parameters())
        for a, b in zip(
            torch.autograd.grad(actual, parameters, dy), torch.autograd.grad(expected, parameters, dy), strict=True
        ):
            torch.testing.assert_close(a, b)
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


def test_compile_does_not_break_on_a_refusal():
    """auto hands dilated pooling to the reference, inside a graph too."""
    torch._dynamo.reset()
    x = torch.randn(2, 3, 15, 15)
    pool = torch.compile(lambda x: ops.max_pool2d(x, 3, 2, dilation=2), fullgraph=True, backend="aot_eager")
    assert torch.equal(pool(x), F.max_pool2d(x, 3, 2, dilation=2))


def test_export():
    """With any batch size; the program holds our operators and runs without the Python pages."""
    net = Net().eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 3, 33, 33),), dynamic_shapes=({0: batch},))
    called = {str(node.target) for node in program.graph.nodes if "alexnet_fast" in str(node.target)}
    assert called == {
        f"alexnet_fast.{name}.default" for name in ("conv_stage", "conv_relu", "lrn", "max_pool", "epilogue")
    }
    x = torch.randn(5, 3, 33, 33)
    torch.testing.assert_close(program.module()(x), net(x))


# ---- Autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@samples
def test_autocast(sample, dtype, backend, device):
    """Convolutions run in autocast's dtype and give gradients in the parameters' own; LRN ends in float32, and other
    pointwise operators keep what comes; all as PyTorch's functions."""
    data = {name: tensor.to(device) for name, tensor in sample.data(torch.float32).items()}
    with torch.autocast(device, dtype):
        expected = sample.torch(data)
        actual = results(lambda leaves: sample.ours(leaves, backend), data, torch.ones_like(expected))
    eps = torch.finfo(expected.dtype).eps
    norm = sample.stem in ("lrn", "lpips_layer") or sample.arguments.get("lrn")
    assert actual["output"].dtype == (dtype if sample.weight and not norm else torch.float32)
    torch.testing.assert_close(actual["output"].float(), expected.float(), rtol=4 * eps, atol=4 * eps)
    assert all(actual[name].dtype == torch.float32 for name in data)


def test_autocast_between_operators(backend, device):
    """What comes from a convolution under autocast meets a float32 bias."""
    z, bias = torch.randn(2, 6, 5, 5, device=device).bfloat16(), torch.randn(6, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        y = ops.epilogue(z, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert bias.grad.dtype == torch.float32


def test_autocast_leaves_float64(backend, device):
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, device=device)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert ops.conv_relu(x, weight, backend=backend).dtype == F.conv2d(x, weight).dtype


def test_autocast_of_lrn_after_a_convolution(backend, device):
    """Alone, in an epilogue and in a stage, float32 as the plain functions give it."""
    x, weight = torch.randn(2, 3, 9, 9, device=device), torch.randn(8, 3, 3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        z = F.conv2d(x, weight)
        expected = F.max_pool2d(F.local_response_norm(F.relu(z), 5, 0.1), 3, 2)
        made = [
            ops.max_pool2d(ops.local_response_norm(F.relu(z), 5, 0.1, backend=backend), 3, 2, backend=backend),
            ops.epilogue(z, lrn=LRN(5, 0.1), pool=Pool(3, 2), backend=backend),
            ops.conv_stage(x, weight, lrn=LRN(5, 0.1), pool=Pool(3, 2), backend=backend),
        ]
    assert expected.dtype == torch.float32
    for y in made:
        torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


# ---- Forward mode, counted operations, graphs made in inference ------------------------------------------------------


@samples
def test_forward_mode(sample):
    """Tangents are torch's, by the reference; kernels have none, and say so."""
    data = sample.data(torch.float32)
    tangents = {name: torch.randn_like(tensor) for name, tensor in data.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(data[name], tangents[name]) for name in data}
        made, expected = (forward_ad.unpack_dual(call(duals)).tangent for call in (sample.ours, sample.torch))
        with pytest.raises(BackendError, match=f"{sample.stem}: backend 'cpu' does not cover forward-mode"):
            sample.ours(duals, "cpu")
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"padding": "same", "groups": 2}, {"dilation": 2}])
@pytest.mark.parametrize("pool", [None, Pool(2)], ids=["conv_relu", "conv_stage"])
def test_flops_are_counted(options, pool):
    """Of operators called directly, both passes, as of torch's functions."""

    def flops(call) -> int:
        x, weight = torch.randn(2, 6, 9, 9), torch.randn(4, 6 // options.get("groups", 1), 3, 3)
        with FlopCounterMode(display=False) as counter:
            call(x.requires_grad_(), weight.requires_grad_()).sum().backward()
        return counter.get_total_flops()

    ours = flops(lambda x, weight: ops.conv_stage(x, weight, None, **options, pool=pool))
    assert ours == flops(lambda x, weight: F.relu(F.conv2d(x, weight, None, **options))) > 0


def test_a_graph_made_in_inference_may_be_differentiated():
    """A program of torch.export does not freeze whether gradients are wanted."""
    torch._dynamo.reset()
    net, x = Net(), torch.randn(2, 3, 30, 30)
    with torch.no_grad():
        program = torch.export.export(net, (x,))
    grads = {}
    for name, call in (("exported", program.module()), ("eager", net)):
        leaf = x.clone().requires_grad_()
        grads[name] = torch.autograd.grad(call(leaf).sum(), leaf)[0]
    torch.testing.assert_close(grads["exported"], grads["eager"])


# ---- Function transforms -------------------------------------------------------------------------------------------


@samples
def test_functional_gradient(sample):
    """torch.func.grad, as for per-sample gradients, runs on the reference: kernels have no rules for it, and say so."""
    data, dy = sample.data(torch.float32), output_gradient(sample, torch.float32)
    grads = torch.func.grad(lambda leaves: (sample.ours(leaves) * dy).sum())(data)
    expected = results(sample.ours, data, dy)
    for name in data:
        torch.testing.assert_close(grads[name], expected[name])
    with pytest.raises(BackendError, match=f"{sample.stem}: backend 'cpu' does not cover torch.func transforms"):
        torch.func.grad(lambda leaves: (sample.ours(leaves, "cpu") * dy).sum())(data)


@pytest.mark.parametrize("sample", [s for s in CHOSEN if len(s.input) == 4], ids=str)
def test_vmap(sample: Sample):
    """Over a new leading axis of the input, the parameters shared: the same as one call after another."""
    data = sample.data(torch.float32)
    inputs = torch.stack([data["input"], -data["input"], data["input"].flip(0)])
    mapped = torch.func.vmap(lambda x: sample.ours({**data, "input": x}))(inputs)
    torch.testing.assert_close(mapped, torch.stack([sample.ours({**data, "input": x}) for x in inputs]))
    with pytest.raises(BackendError, match=f"{sample.stem}: backend 'cpu' does not cover torch.func transforms"):
        torch.func.vmap(lambda x: sample.ours({**data, "input": x}, "cpu"))(inputs)
