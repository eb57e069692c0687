"""Graphs for other tools: ONNX in both of torch's exporters, and torch.export as quantizers read it."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet, backend, fuse, ops
from alexnet_fast.models import VARIANTS

EXPORTERS = pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])


class Operators(nn.Module):
    """Operators that are called directly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5)

    def forward(self, x):
        lrn, pool = ops.LRN(5, 0.1, k=2.0), ops.Pool(3, 2)
        y = ops.conv_stage(x, self.conv.weight, self.conv.bias, lrn=lrn, pool=pool)
        y = ops.epilogue(y, self.conv.bias, lrn=lrn)
        return ops.max_pool2d(ops.local_response_norm(y, 5, 0.1), 2)


def normalized(size: int, *front: nn.Module) -> nn.Module:
    return fuse(nn.Sequential(*front, nn.LocalResponseNorm(size, 0.1), nn.MaxPool2d(2)))


def small(name: str) -> nn.Module:
    """A variant without its linear layers, which are torch's own and most of its bytes."""
    net = AlexNet(5, variant=name)
    net.classifier = nn.Flatten()
    return net


IMAGE = (2, 3, 24, 24)
# A net, its input's shape, and the LRN nodes in its graph.
VARIANTS_LRNS = {"torchvision": 0, "alex2012": 2}
NETS = {
    **{
        name: (lambda name=name: small(name), (1, 3, *[VARIANTS[name].image_size] * 2), lrns)
        for name, lrns in VARIANTS_LRNS.items()
    },
    "operators": (Operators, IMAGE, 3),
    "stage": (lambda: normalized(5, nn.Conv2d(3, 6, 3), nn.ReLU()), IMAGE, 1),
    "even window": (lambda: normalized(4), IMAGE, 0),  # leans to the other side in ONNX
    "volumes": (lambda: fuse(nn.Sequential(nn.LocalResponseNorm(3, 0.1))), (2, 6, 3, 3, 3), 1),
}


def to_onnx(net: nn.Module, x: torch.Tensor, dynamo: bool) -> bytes:
    """The graph for any batch size."""
    pytest.importorskip("onnxscript" if dynamo else "onnx", reason="the extra dev brings it")
    file = io.BytesIO()
    if dynamo:
        free = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)}
    else:
        free = {"input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(net, (x,), file, dynamo=dynamo, verbose=False, **free)
    return file.getvalue()


def onnxruntime(graph: bytes, x: torch.Tensor) -> torch.Tensor:
    runtime = pytest.importorskip("onnxruntime", reason="the extra dev brings it")
    session = runtime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def openvino(graph: bytes, x: torch.Tensor) -> torch.Tensor:
    core = pytest.importorskip("openvino", reason="the extra dev brings it").Core()
    model = core.compile_model(core.read_model(io.BytesIO(graph)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model(x.numpy())[0])


@pytest.mark.filterwarnings("ignore")  # torch's exporters warn of their own parts
@pytest.mark.parametrize("name", NETS)
@EXPORTERS
def test_onnx(name, dynamo):
    """Normalization is ONNX's own node where it has one, and two runtimes give the net's numbers, at another batch."""
    onnx = pytest.importorskip("onnx", reason="the extra dev brings it")
    build, shape, lrns = NETS[name]
    net, x = build().eval(), torch.randn(shape)
    with torch.no_grad():
        graph = to_onnx(net, torch.cat([x, x]), dynamo)
        x = torch.cat([x, x - 1, 2 * x])
        expected = net(x)
    nodes = Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)
    assert nodes["LRN"] == lrns
    for runtime in (onnxruntime, openvino):
        torch.testing.assert_close(runtime(graph, x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.filterwarnings("ignore")
@EXPORTERS
def test_onnx_of_float16(dynamo):
    """The exported node computes in float32, as the operator does."""
    net, x = fuse(nn.Sequential(nn.LocalResponseNorm(5, 0.1))).eval(), torch.randn(2, 6, 8, 8).half()
    torch.testing.assert_close(onnxruntime(to_onnx(net, x, dynamo), x), net(x))


def test_torch_export_gives_torchs_operators():
    """What stands for torch's modules goes out as such, under their names, so that other tools know it; a named backend
    keeps this package's operators."""
    free = torch.export.Dim.DYNAMIC
    x = torch.randn(2, 3, 70, 70)
    for name in ("torchvision", "paper"):
        net = small(name).eval()
        program = torch.export.export(net, (x,), dynamic_shapes=({0: free},))
        called = [node for node in program.graph.nodes if node.op == "call_function"]
        assert not any("alexnet_fast" in str(node.target) for node in called)
        convolutions = [node for node in called if node.target is torch.ops.aten.conv2d.default]
        modules = [list(node.meta["nn_module_stack"].values())[-1][0] for node in convolutions]
        assert modules == [key for key, module in net.named_modules() if isinstance(module, nn.Conv2d)]
        torch.testing.assert_close(program.module()(x[:1]), net(x[:1]), rtol=1e-4, atol=1e-5)
        with backend("cpu"):
            kept = torch.export.export(net, (x,), dynamic_shapes=({0: free},))
        assert "alexnet_fast.conv_stage.default" in str(kept.graph)
        torch.testing.assert_close(kept.module()(x[:1]), net(x[:1]), rtol=1e-4, atol=1e-5)
