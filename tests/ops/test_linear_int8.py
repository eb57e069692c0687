"""Linear layers with int8 weights: as exact as torch's layer of the same rounded weights, in every shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_fast import AlexNet, FusedSequential, features, ops
from alexnet_fast.nn import Int8Linear, weight_only_int8
from alexnet_fast.reference.linear_int8 import quantize_weight
from benchmarks.memory import peak_bytes

from .compare import DTYPES, as_exact, error, saved_bytes

# Rows, inputs, outputs: vectors and not, outputs past a unit, rows past a tile, several pieces of work, inputs past a
# chunk; from 65 rows on by the library's product on a CPU, of 256 outputs at a time.
SHAPES = [(1, 64, 16), (1, 1, 1), (3, 37, 13), (5, 16, 8), (6, 200, 30), (70, 48, 9), (2, 4096, 70)]
SHAPES += [(11, 1100, 13), (22, 48, 9), (65, 33, 600)]


def data(rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    """Input, weight, scales, bias."""
    generator = torch.Generator().manual_seed(rows + inputs)
    weight, scales = quantize_weight(torch.randn(outputs, inputs, generator=generator))
    x, bias = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return [x.to(device, dtype), weight.to(device), scales.to(device), bias.to(device, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, backend, device):
    """As its linear layer, by weights that are scaled before; 16 bits are rounded once."""
    x, weight, scales, bias = data(*shape, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for added in (bias, None):
        exact, peer = (
            F.linear(
                x.to(accurate), weight * scales.to(accurate)[:, None], None if added is None else bias.to(accurate)
            )
            for accurate in (torch.float64, wide)
        )
        peer = peer.to(dtype)
        arguments = [None if t is None else t.to(device) for t in (x, weight, scales, added)]
        y = ops.linear_int8(*arguments, backend=backend).cpu()
        assert as_exact(y, peer, exact), (error(y, exact), error(peer, exact))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_their_number(dtype):
    """Few rows, some, many, each of the kernel's ways: they add up in the same order."""
    x, *others = data(11, 1100, 13, dtype)
    y = ops.linear_int8(x, *others, backend="cpu")
    assert all(torch.equal(ops.linear_int8(part, *others, backend="cpu"), y[: len(part)]) for part in (x[:1], x[:5]))
    assert torch.equal(ops.linear_int8(x[3:], *others, backend="cpu"), y[3:])


@pytest.mark.parametrize("rows", [3, 20, 70])
def test_values_that_are_no_numbers(rows, backend, device):
    """NaN and infinity stay in their row, and are there whatever the weight."""
    x, weight, scales, bias = data(rows, 40, 10, torch.float32, device)
    x[1, 39] = torch.nan
    x[2, 0] = torch.inf
    y = ops.linear_int8(x, weight, scales, bias, backend=backend)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


def test_layouts_and_dimensions(backend, device):
    """Strided input, weight, scales and bias; and input of any dimensions."""
    x, weight, scales, bias = data(6, 40, 10, torch.float32, device)
    expected = ops.linear_int8(x, weight, scales, bias, backend=backend)
    strided = [t.mT.contiguous().mT for t in (x, weight)] + [t.repeat_interleave(2)[::2] for t in (scales, bias)]
    assert not any(t.is_contiguous() for t in strided)
    # The reference's product is torch's, which may add up strided operands in another order.
    rounding = 1e-5 if backend == "reference" else 0
    torch.testing.assert_close(ops.linear_int8(*strided, backend=backend), expected, rtol=rounding, atol=rounding)
    assert torch.equal(
        ops.linear_int8(x.view(2, 3, 40), weight, scales, bias, backend=backend), expected.view(2, 3, 10)
    )
    assert ops.linear_int8(x[0], weight, scales, bias, backend=backend).shape == (10,)
    assert ops.linear_int8(x[:0], weight, scales, bias, backend=backend).shape == (0, 10)


def test_gradients(backend, device):
    """Of input and bias, and theirs; weights and scales have none."""
    x, weight, scales, bias = (t.requires_grad_(t.is_floating_point()) for t in data(3, 20, 6, torch.float32, device))
    y = ops.linear_int8(x, weight, scales.detach(), bias, backend=backend)
    dy = torch.rand_like(y).requires_grad_()
    found = torch.autograd.grad(y, (x, bias), dy, create_graph=True)
    plain = F.linear(x, (weight * scales[:, None]).detach(), bias)
    torch.testing.assert_close(found, torch.autograd.grad(plain, (x, bias), dy, create_graph=True))
    (again,) = torch.autograd.grad(found[0].square().sum(), dy)
    assert again.any()


def test_gradcheck():
    x, weight, scales, bias = data(2, 9, 5, torch.float64)
    call = lambda x, bias: ops.linear_int8(x, weight, scales, bias, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), bias.requires_grad_()))
    assert torch.autograd.gradgradcheck(call, (x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    call = torch.ops.alexnet_fast.linear_int8.default
    for arguments in (data(3, 20, 6, dtype), [*data(1, 16, 8, dtype)[:3], None]):
        torch.library.opcheck(call, arguments)


def test_saves_the_weights_alone():
    x, weight, scales, bias = data(64, 20, 6, torch.float32)
    saved = saved_bytes(lambda: ops.linear_int8(x.requires_grad_(), weight, scales, bias, backend="cpu"))
    assert saved == weight.numel() + 4 * scales.numel()


def test_many_rows_take_the_memory_of_a_block():
    """Of 2048 outputs, the floats of 256 at a time, beside the result; 16 bits are added up in float32."""
    for dtype, bytes_of_rows in ((torch.float32, 4 * 2048), (torch.bfloat16, (2 + 4) * 2048 + 4 * 1024)):
        arguments = data(96, 1024, 2048, dtype)
        peak = peak_bytes(lambda arguments=arguments: ops.linear_int8(*arguments, backend="cpu"), "cpu")
        assert peak <= 96 * bytes_of_rows + 4 * (256 * 1024 + 2048) + 4096


def test_quantize_weight():
    """To the nearest of 255 steps of each row, with the largest at the end; rows of zeros too, and 16 bits."""
    weight = torch.randn(7, 33)
    weight[3] = 0
    q, scales = quantize_weight(weight)
    assert q.dtype == torch.int8
    assert q.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert ((q * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantize_weight(weight.bfloat16()), quantize_weight(weight.bfloat16().float()), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"input": [1]}, TypeError, ["input", "Tensor", "list"]),
        ({"input": torch.ones(2, 8).int()}, TypeError, ["input", "float32", "torch.int32"]),
        ({"input": torch.ones(2, 7)}, ValueError, ["weight", "takes 8", "got 7"]),
        ({"weight": torch.ones(4, 8)}, TypeError, ["weight", "int8", "torch.float32"]),
        ({"weight": None}, TypeError, ["weight", "int8", "NoneType"]),
        ({"scales": torch.ones(3)}, ValueError, ["scales", "4 outputs", "got 3"]),
        ({"scales": torch.ones(4, 1)}, ValueError, ["scales", "1 dimensions", "got 2"]),
        ({"scales": torch.ones(4, device="meta")}, ValueError, ["scales", "meta", "cpu"]),
        ({"bias": torch.ones(3)}, ValueError, ["bias", "4 channels", "got 3"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, exception, pieces):
    good = {"input": torch.ones(2, 8), "weight": torch.ones(4, 8, dtype=torch.int8), "scales": torch.ones(4)}
    with pytest.raises(exception) as caught:
        ops.linear_int8(**{**good, **arguments})
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)


def test_past_the_function():
    """The operator itself keeps kernels from reading foreign memory."""
    x, weight, scales, bias = data(2, 8, 4, torch.float32)
    call = torch.ops.alexnet_fast.linear_int8
    for wrong in ([x[:, :7], weight, scales, bias], [x, weight, scales[:3], bias], [x, weight, scales, bias[:3]]):
        with pytest.raises(RuntimeError, match="linear_int8: "):
            call(*wrong)


# ---- In a net --------------------------------------------------------------------------------------------------------


def test_a_net_of_int8_weights():
    """fc6 … fc8 are replaced, with keys and names as they were, and a logit moves little."""
    torch.manual_seed(0)
    net = AlexNet(5, widths=(8, 12, 16, 12, 8, 40, 24)).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = net(images)
        assert weight_only_int8(net) is net
        after = net(images)
    assert [type(m) for m in net.classifier if isinstance(m, nn.Linear)] == [Int8Linear] * 3
    assert (after - before).abs().max() < 0.02 * before.abs().max()
    assert not torch.equal(after, before)
    state = net.state_dict()
    assert state["classifier.1.weight"].dtype == torch.int8
    assert state["classifier.6.scales"].shape == (5,)
    assert features(net, "fc7")(images)["fc7"].shape == (2, 24)
    again = weight_only_int8(AlexNet(5, widths=(8, 12, 16, 12, 8, 40, 24))).eval()
    again.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(again(images), after)


def test_compiled_exported_and_cast():
    model = weight_only_int8(FusedSequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))).eval()
    x = torch.randn(4, 20)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,))
        assert not [node for node in program.graph.nodes if "alexnet_fast" in str(node.target)]
        torch.testing.assert_close(program.module()(x), expected)
        free = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        torch.testing.assert_close(free(x[:3]), expected[:3])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        weight_only_int8(3)
    with pytest.raises(TypeError, match=r"model: expected .* with linear layers in it, got nn\.Linear"):
        weight_only_int8(nn.Linear(3, 2))


def test_a_layer_that_stands_twice():
    """It is one layer afterwards, in its mode, wherever it stood."""
    layer = nn.Linear(6, 6)
    model = weight_only_int8(nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer)).eval())
    assert type(model[0]) is Int8Linear
    assert model[0] is model[2] is model[3][0]
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("ranks", [(0, 0), (6, 5)], ids=["whole", "low rank"])
def test_other_forms_of_a_net(ranks):
    """Linear layers as convolutions, TorchScript's two, and torch.fx's graph give what the int8 net gives; a gradient
    reaches the image in each."""
    torch.manual_seed(0)
    net = weight_only_int8(AlexNet(5, widths=(8, 12, 16, 12, 8, 40, 24), ranks=ranks)).eval()
    images = torch.randn(2, 3, 224, 224, requires_grad=True)
    expected = net(images)
    (slope,) = torch.autograd.grad(expected.square().sum(), images)
    close = {"rtol": 1e-4, "atol": 1e-5 * expected.abs().max().item()}
    forms = [torch.jit.trace(net, images), torch.jit.script(net), torch.fx.symbolic_trace(net)]
    for made in (lambda x: net.fully_convolutional()(x).flatten(1), *forms):
        y = made(images)
        torch.testing.assert_close(y, expected, **close)
        (own,) = torch.autograd.grad(y.square().sum(), images)
        torch.testing.assert_close(own, slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())
    assert "alexnet_fast::" not in str(forms[0].inlined_graph)  # it runs where this package is not installed
    more = torch.randn(3, 3, 224, 224)
    torch.testing.assert_close(forms[0](more), net(more), **close)
    seen = features(net, ["fc6", "fc8"])(images)
    assert torch.equal(seen["fc8"], expected)
    assert seen["fc6"].shape == (2, 40)
