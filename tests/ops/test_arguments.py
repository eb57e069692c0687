"""What an operator refuses, PyTorch's refuses too, and the message names the argument, what came and what is wanted."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from alexnet_fast import BackendError, backend, backends, fuse, ops, pack
from alexnet_fast.ops import LRN, Pool, arguments

from .samples import TORCH

X = torch.randn(2, 6, 9, 9)
WEIGHT = torch.randn(4, 6, 3, 3)
BIAS = torch.randn(4)

# ---- The result, or the error, that PyTorch gives ------------------------------------------------------------------

POOLS = {
    "kernel larger than input": (X, (10, 3)),
    "kernel larger than input, rounding up": (X, 11, 2, 0, 1, True),
    "kernel as large as the padded input": (X, 11, 2, 1),
    "padding over half the kernel": (X, 3, 2, 2),
    "padding over half a side of the kernel": (X, (5, 3), 1, (2, 2)),
    "negative padding": (X, 3, 2, -1),
    "stride 0": (X, 3, 0),
    "kernel 0": (X, 0),
    "dilated": (X, 3, 2, 1, 2),
    "dilated past the input": (X, 3, 2, 0, 5),
    "a list": (X, [3, 2], [2, 1]),
    "three sides": (X, (3, 3, 3)),
    "a kernel of floats": (X, 2.5),
    "no rows": (X[:, :, :0], 1),
    "no rows but padding": (X[:, :, :0], 2, 2, 1),
    "no channels": (X[:, :0], 3),
    "no images": (X[:0], 3, 2),
    "no images, two dimensions of none": (X[:0, :0], 3, 2),
    "2-D": (X[0, 0], 3),
    "5-D": (X[None], 3),
}
CONVOLUTIONS = {
    "kernel larger than input": (X, torch.randn(4, 6, 10, 3)),
    "kernel as large as the padded input": (X, torch.randn(4, 6, 11, 3), BIAS, 1, 1),
    "dilated past the input": (X, WEIGHT, BIAS, 1, 0, 5),
    "negative padding": (X, WEIGHT, BIAS, 1, -1),
    "stride 0": (X, WEIGHT, BIAS, 0),
    "dilation 0": (X, WEIGHT, BIAS, 1, 0, 0),
    "groups 0": (X, WEIGHT, BIAS, 1, 0, 1, 0),
    "groups that do not divide": (X, torch.randn(4, 2, 3, 3), BIAS, 1, 0, 1, 3),
    "other channels": (X, torch.randn(4, 5, 3, 3)),
    "bias of another length": (X, WEIGHT, torch.randn(5)),
    "bias of two dimensions": (X, WEIGHT, torch.randn(4, 1)),
    "3-D weight": (X, WEIGHT[0]),
    "2-D input": (X[0, 0], WEIGHT),
    "5-D input": (X[None], WEIGHT),
    "no images": (X[:0], WEIGHT, BIAS),
    "no input channels": (X[:, :0], WEIGHT[:, :0], BIAS),
    "no output channels": (X, WEIGHT[:0]),
    "no rows": (X[:, :, :0], WEIGHT, BIAS),
    "no rows but padding": (X[:, :, :0], WEIGHT, BIAS, 1, 2),
    "'same' with a stride": (X, WEIGHT, BIAS, 2, "same"),
    "a misspelled padding": (X, WEIGHT, BIAS, 1, "sme"),
}
NORMS = {
    "2-D": (X[0, 0], 3),
    "6-D": (X[..., None, None], 3),
    "no images": (X[:0], 3),
    "no channels": (X[:, :0], 3),
    "no rows": (X[:, :, :0], 3),
    "size 0": (X, 0),
}


@pytest.mark.parametrize(
    ("stem", "arguments"),
    [
        pytest.param(stem, arguments, id=f"{stem}: {reason}")
        for stem, table in (("max_pool", POOLS), ("conv_relu", CONVOLUTIONS), ("lrn", NORMS))
        for reason, arguments in table.items()
    ],
)
def test_result_or_error_as_torch(stem, arguments, backend, device):
    function = {"max_pool": ops.max_pool2d, "conv_relu": ops.conv_relu, "lrn": ops.local_response_norm}[stem]
    if "dilated" in str(arguments) or (stem == "max_pool" and arguments[4:5] == (2,)):
        backend = "auto"
    try:
        expected = TORCH[stem](*arguments)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            function(*arguments, backend=backend)
    else:
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        torch.testing.assert_close(function(*arguments, backend=backend).cpu(), expected)


# ---- Messages ------------------------------------------------------------------------------------------------------


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


BAD_INPUTS = {  # of every operator; pieces of the message
    "a list": ([1.0], TypeError, ["input", "expected a Tensor", "got list"]),
    "None": (None, TypeError, ["input", "expected a Tensor", "got NoneType"]),
    "integers": (torch.ones(2, 6, 9, 9, dtype=torch.int64), TypeError, ["input", "float32", "got torch.int64"]),
    "complex": (torch.ones(2, 6, 9, 9, dtype=torch.complex64), TypeError, ["input", "float32", "got torch.complex64"]),
    "2-D": (torch.ones(9, 9), ValueError, ["input", "3", "4", "got 2", "(9, 9)"]),
}
CALLS = {
    "lrn": lambda x, **more: ops.local_response_norm(x, **{"size": 5, **more}),
    "max_pool": lambda x, **more: ops.max_pool2d(x, **{"kernel_size": 3, **more}),
    "epilogue": lambda x, **more: ops.epilogue(x, **more),
    "conv_relu": lambda x, **more: ops.conv_relu(x, **{"weight": WEIGHT, **more}),
    "conv_stage": lambda x, **more: ops.conv_stage(x, **{"weight": WEIGHT, "pool": Pool(2), **more}),
}
WEIGHTS = [
    ({"weight": [1]}, TypeError, ["weight", "expected a Tensor", "got list"]),
    ({"weight": WEIGHT.long()}, TypeError, ["weight", "float32", "got torch.int64"]),
    ({"weight": WEIGHT.half()}, TypeError, ["weight", "torch.float16", "input is torch.float32"]),
    ({"weight": meta(WEIGHT)}, ValueError, ["weight", "meta", "input is on cpu"]),
    ({"weight": WEIGHT[0]}, ValueError, ["weight", "expected 4", "got 3", "(6, 3, 3)"]),
    ({"weight": WEIGHT[:, :5]}, ValueError, ["weight", "(4, 5, 3, 3)", "5 input channels", "input has 6"]),
    ({"weight": torch.randn(4, 6, 10, 3)}, ValueError, ["weight", "10", "larger", "9"]),
    ({"bias": BIAS.double()}, TypeError, ["bias", "torch.float64", "input is torch.float32"]),
    ({"bias": meta(BIAS)}, ValueError, ["bias", "meta", "input is on cpu"]),
    ({"bias": BIAS[None]}, ValueError, ["bias", "expected 1", "got 2", "(1, 4)"]),
    ({"bias": torch.ones(5)}, ValueError, ["bias", "4 channels", "got 5"]),
    ({"bias": 1.0}, TypeError, ["bias", "expected a Tensor", "got float"]),
    ({"stride": 0}, ValueError, ["stride", "at least 1", "got 0"]),
    ({"stride": (1, 2, 3)}, ValueError, ["stride", "pair", "3 values"]),
    ({"stride": 1.5}, TypeError, ["stride", "pair of ints", "1.5"]),
    ({"padding": -1}, ValueError, ["padding", "at least 0", "got -1"]),
    ({"padding": "sme"}, ValueError, ["padding", "'same'", "'sme'"]),
    ({"padding": "same", "stride": 2}, ValueError, ["padding", "'same' needs stride 1", "2"]),
    ({"dilation": 2**31}, ValueError, ["dilation", "at most 2147483647", "2147483648"]),
    ({"groups": 3}, ValueError, ["groups", "divisor", "4 output channels", "got 3"]),
    ({"groups": 0}, ValueError, ["groups", "divisor", "got 0"]),
    ({"groups": 1.0}, ValueError, ["groups", "got 1.0"]),
    ({"groups": 2}, ValueError, ["groups=2", "12", "input has 6"]),
]
POOL_ARGUMENTS = [
    ({"kernel_size": 10}, ValueError, ["kernel_size", "10", "larger", "9"]),
    ({"kernel_size": 0}, ValueError, ["kernel_size", "at least 1", "got 0"]),
    ({"kernel_size": "3"}, TypeError, ["kernel_size", "pair of ints", "'3'"]),
    ({"stride": 0}, ValueError, ["stride", "at least 1", "got 0"]),
    ({"padding": 2}, ValueError, ["padding", "half of kernel_size 3", "got 2"]),
    ({"padding": (0, 2)}, ValueError, ["padding", "half of kernel_size 3", "(0, 2)"]),
]
NORM_ARGUMENTS = [
    ({"size": 0}, ValueError, ["size", "positive int", "got 0"]),
    ({"size": 2.0}, ValueError, ["size", "positive int", "got 2.0"]),
    ({"size": 2**31}, ValueError, ["size", "2147483648"]),
    ({"groups": 4}, ValueError, ["groups", "divisor", "6 channels", "got 4"]),
    ({"groups": 0}, ValueError, ["groups", "divisor", "got 0"]),
    ({"alpha": "1"}, TypeError, ["alpha", "number", "'1'"]),
    ({"beta": None}, TypeError, ["beta", "number", "None"]),
    ({"k": torch.ones(2)}, TypeError, ["k", "number", "tensor"]),
    ({"alpha": 1j}, TypeError, ["alpha", "number", "1j"]),
    ({"k": torch.ones(1, requires_grad=True)}, ValueError, ["k", "number", "requires its gradient"]),
    ({"size": torch.ones(2).int()}, ValueError, ["size", "positive int", "tensor"]),
]
TABLE = {
    "lrn": NORM_ARGUMENTS,
    "max_pool": [*POOL_ARGUMENTS, ({"dilation": 0}, ValueError, ["dilation", "at least 1", "got 0"])],
    "epilogue": [
        ({"bias": torch.ones(5)}, ValueError, ["bias", "6 channels", "got 5"]),
        ({"bias": torch.ones(6).half()}, TypeError, ["bias", "torch.float16", "input is torch.float32"]),
        ({"bias": meta(torch.ones(6))}, ValueError, ["bias", "meta", "input is on cpu"]),
        *(({"pool": Pool(**{"kernel_size": 3, **bad})}, *rest) for bad, *rest in POOL_ARGUMENTS),
        *(({"lrn": LRN(**{"size": 5, **bad})}, *rest) for bad, *rest in NORM_ARGUMENTS),
        ({"pool": 3}, TypeError, ["pool", "Pool", "got 3"]),
        ({"lrn": 5}, TypeError, ["lrn", "LRN", "got 5"]),
    ],
    "conv_relu": WEIGHTS,
    "conv_stage": [
        *WEIGHTS,
        ({"pool": Pool(8)}, ValueError, ["kernel_size", "8", "larger", "7"]),
        ({"lrn": LRN(5, groups=3)}, ValueError, ["groups", "divisor", "4 channels", "got 3"]),
        ({"pool": 3}, TypeError, ["pool", "Pool", "got 3"]),
        ({"lrn": 5}, TypeError, ["lrn", "LRN", "got 5"]),
    ],
}


def refused(call, exception: type[Exception], pieces: list[str]) -> None:
    with pytest.raises(exception) as caught:
        call()
    message = str(caught.value)
    assert all(piece in message for piece in pieces), message
    assert "\n" not in message


@pytest.mark.parametrize("bad", BAD_INPUTS)
@pytest.mark.parametrize("stem", CALLS)
def test_bad_input(stem, bad, backend):
    value, exception, pieces = BAD_INPUTS[bad]
    if (stem, bad) == ("max_pool", "integers"):
        pytest.skip("max-pooling takes integers: test_integers")
    if (stem, bad) == ("lrn", "2-D"):
        pieces = ["input", "at least 3", "got 2", "(9, 9)"]
    refused(lambda: CALLS[stem](value, backend=backend), exception, pieces)


@pytest.mark.parametrize(
    ("stem", "arguments", "exception", "pieces"),
    [pytest.param(stem, *row, id=f"{stem}: {row[2]}") for stem, rows in TABLE.items() for row in rows],
)
def test_bad_argument(stem, arguments, exception, pieces, backend):
    refused(lambda: CALLS[stem](X, **arguments, backend=backend), exception, pieces)


# ---- Numbers and inputs as torch takes them --------------------------------------------------------------------------

WHOLE = [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3)]
whole = pytest.mark.parametrize("three", WHOLE, ids=lambda value: f"{type(value).__name__} {value.dtype}{value.shape}")


@whole
def test_whole_numbers(three, backend, device):
    """Options given as numbers of numpy and of torch, alone and in pairs."""
    x, weight, bias = (tensor.to(device) for tensor in (X, WEIGHT, BIAS))
    for stride, plain in ((three, 3), ((three, 2), (3, 2)), ([2, three], (2, 3))):
        assert torch.equal(ops.max_pool2d(x, stride, stride, backend=backend), F.max_pool2d(x, plain, plain))
        y = ops.conv_relu(x, weight, bias, stride, three, backend=backend)
        torch.testing.assert_close(y, F.relu(F.conv2d(x, weight, bias, plain, 3)), rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.max_pool2d(x, 7, 1, three, backend=backend), F.max_pool2d(x, 7, 1, 3))
    y = ops.local_response_norm(x, three, groups=three, backend=backend)
    assert torch.equal(y, ops.local_response_norm(x, 3, groups=3, backend=backend))
    stage = {"lrn": LRN(three), "pool": Pool(three, (three, 2)), "backend": backend}
    expected = ops.conv_stage(x, weight, bias, 1, 3, lrn=LRN(3), pool=Pool(3, (3, 2)), backend=backend)
    assert torch.equal(ops.conv_stage(x, weight, bias, 1, three, **stage), expected)


@pytest.mark.parametrize("half", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])], ids=repr)
def test_numbers(half, backend, device):
    x = X.to(device)
    for value, plain in ((half, 0.5), (np.int64(1), 1), (torch.tensor(1), 1)):
        y = ops.local_response_norm(x, 3, value, value, value, backend=backend)
        assert torch.equal(y, ops.local_response_norm(x, 3, plain, plain, plain, backend=backend))


def test_a_number_in_a_tensor_may_change():
    """A changed value is seen: nothing that was prepared for the value before is used again."""
    side = torch.tensor(3)
    assert ops.max_pool2d(X, side).shape == (2, 6, 3, 3)
    side.fill_(4)
    assert ops.max_pool2d(X, side).shape == (2, 6, 2, 2)


@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3)], ids=["numpy", "torch"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("prepare", [fuse, lambda net: pack(fuse(net))], ids=["fuse", "pack"])
def test_whole_numbers_in_modules(three, gradients, prepare):
    conv = nn.Conv2d(6, 4, 3)
    conv.stride = three  # the constructor would make a pair of it
    plain = nn.Sequential(conv, nn.ReLU(), nn.LocalResponseNorm(three), nn.MaxPool2d(three, np.int64(1), np.int32(1)))
    net = prepare(copy.deepcopy(plain))
    with torch.set_grad_enabled(gradients):
        for _ in range(2):
            torch.testing.assert_close(net(X), plain(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("left_out", [(), []], ids=repr)
def test_an_empty_stride_is_the_windows(left_out, backend, device):
    x = X.to(device)
    assert torch.equal(ops.max_pool2d(x, 3, left_out, backend=backend), F.max_pool2d(x, 3))
    net = nn.Sequential(nn.MaxPool2d(3, left_out))
    assert torch.equal(fuse(copy.deepcopy(net))(x), net(x))


@pytest.mark.parametrize("true", [True, 1, np.bool_(True), torch.tensor(True)], ids=repr)
def test_flags(true, backend, device):
    x = X.to(device)
    assert torch.equal(ops.max_pool2d(x, 2, ceil_mode=true, backend=backend), F.max_pool2d(x, 2, ceil_mode=True))
    assert ops.max_pool2d(x, 2, return_indices=true)[1].dtype == torch.int64


@pytest.mark.parametrize("word", ["no", None, 2, math.nan], ids=repr)
@pytest.mark.parametrize("name", ["ceil_mode", "return_indices"])
def test_what_is_no_flag(name, word, backend, device):
    refused(lambda: ops.max_pool2d(X.to(device), 2, **{name: word}, backend=backend), TypeError, [name, repr(word)])


def test_a_convolution_of_no_channels():
    """torch's result has no channels either, and the bias a gradient of its own size."""
    tensors = [torch.randn(2, 0, 8, 8), torch.randn(6, 0, 3, 3), torch.randn(6)]
    for tensor in tensors:
        tensor.requires_grad_()
    y = ops.conv_relu(*tensors)
    assert y.shape == F.conv2d(*tensors).shape
    y.sum().backward()
    assert tensors[2].grad.shape == (6,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(dtype):
    x = (10 * X).to(dtype)
    for made in (ops.max_pool2d(x, 3, 2), fuse(nn.Sequential(nn.MaxPool2d(3, 2)))(x)):
        assert torch.equal(made, F.max_pool2d(x, 3, 2))
    with pytest.raises(BackendError, match=f"backend 'cpu' takes .* got {dtype}"):
        ops.max_pool2d(x, 3, 2, backend="cpu")


@pytest.mark.parametrize("x", [X, X[0]], ids=["batch", "image"])
def test_return_indices(x):
    made = ops.max_pool2d(x, 3, 2, return_indices=True)
    for mine, theirs in zip(made, F.max_pool2d(x, 3, 2, return_indices=True), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(BackendError, match="does not cover return_indices"):
        ops.max_pool2d(x, 3, 2, return_indices=True, backend="cpu")


# ---- Past the Python functions -------------------------------------------------------------------------------------

NATIVE = torch.ops.alexnet_fast
BYTES = torch.zeros(2, 6, 4, 4, dtype=torch.uint8)
Y = torch.zeros(2, 6, 4, 4)
THREE_TWO = ([3, 3], [2, 2], [0, 0])
NORM = (5, 1e-4, 0.75, 1.0, 1)
NO_NORM = (0, 1e-4, 0.75, 1.0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NATIVE.lrn(X[0], *NORM), "lrn: x must have 4 dimensions"),
        (lambda: NATIVE.lrn(X.long(), *NORM), "expected float32"),
        (lambda: NATIVE.lrn(X, 0, 1.0, 1.0, 1.0, 1), "lrn: size must be positive"),
        (lambda: NATIVE.lrn(X, 2**31, 1.0, 1.0, 1.0, 1), "lrn: size"),
        (lambda: NATIVE.lrn(X, 5, 1.0, 1.0, 1.0, 4), "6 channels do not divide into 4 groups"),
        (lambda: NATIVE.lrn(X, 5, 1.0, 1.0, 1.0, 2**32), "groups"),
        (lambda: NATIVE.lrn_backward(X[:1], X, *NORM), "lrn_backward: dy has size 1 in dimension 0, expected 2"),
        (lambda: NATIVE.lrn_backward(X.double(), X, *NORM), "lrn_backward: dy has another dtype"),
        (lambda: NATIVE.max_pool(X, [10, 3], [1, 1], [0, 0], False, False), "larger than the padded input"),
        (lambda: NATIVE.max_pool(X, [3, 3], [2, 2], [2, 2], False, False), "is not one"),
        (lambda: NATIVE.max_pool(X, [3, 3], [0, 2], [0, 0], False, False), "is not one"),
        (lambda: NATIVE.max_pool(torch.ones(1, 1, 99, 99), [16, 16], [1, 1], [0, 0], False, True), "at most 255"),
        (lambda: NATIVE.max_pool_backward(Y[:1], BYTES, 9, 9, *THREE_TWO), "dy has size 1 in dimension 0, expected 2"),
        (lambda: NATIVE.max_pool_backward(Y, Y, 9, 9, *THREE_TWO), "code has another dtype"),
        (
            lambda: NATIVE.max_pool_backward(Y, BYTES, -1, 9, *THREE_TWO),
            "dy has size 4 in dimension 2, expected -1",
        ),
        (lambda: NATIVE.max_pool_backward(Y, BYTES, 9, 7, *THREE_TWO), "dy has size 4 in dimension 3, expected 3 or 3"),
        (lambda: NATIVE.epilogue(X, torch.ones(5), *NORM, *THREE_TWO, False, False), "bias must be"),
        (lambda: NATIVE.epilogue(X, torch.ones(6).half(), *NORM, *THREE_TWO, False, False), "bias has another dtype"),
        (lambda: NATIVE.epilogue_backward(Y, BYTES[:1], Y, 9, 9, True, *NO_NORM, *THREE_TWO), "code has size 1"),
        (lambda: NATIVE.epilogue_backward(Y, BYTES, Y, 9, 9, True, *NORM, *THREE_TWO), "r has size 4 in dimension 2"),
        (lambda: NATIVE.epilogue_backward(Y, BYTES, X, 4, 4, True, *NO_NORM, [0, 0], [1, 1], [0, 0]), "r has size 9"),
        (lambda: NATIVE.epilogue_backward(Y, BYTES, X, 9, 9, True, *NO_NORM, [0, 0], [1, 1], [0, 0]), "dy has size 4"),
        (
            lambda: NATIVE.epilogue_backward(Y, BYTES, X, 9, 12, True, *NO_NORM, *THREE_TWO),
            "dy has size 4 in dimension 3",
        ),
    ],
)
def test_native_operators_check_what_would_read_foreign_memory(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


# ---- What is prepared once for each form of the arguments -----------------------------------------------------------


@pytest.fixture
def prepared():
    """prepared(*args): how often preparing for calls like those has run."""
    runs = []

    @arguments.once_per_form
    def prepare(*args):
        runs.append(args)
        return "prepared"

    def count(input, weight=None, bias=None, *rest) -> int:
        assert prepare(input, weight, bias, *rest) == "prepared"
        return len(runs)

    yield count
    backends.prepared.pop()


def test_the_same_form_is_prepared_once(prepared):
    """Tensors' values and strides are no part of it; each call asks first for what differs, then for what does not."""
    assert [prepared(X), prepared(X + 1), prepared(X.to(memory_format=torch.channels_last))] == [1, 1, 1]
    others = [
        (X[:1],),
        (X.double(),),
        (X.to("meta"),),
        (X, WEIGHT),
        (X, WEIGHT[:2]),
        (X, WEIGHT, BIAS),
        (X, None, BIAS),
        (X, WEIGHT, BIAS, 1, (2, 2)),
        (X, WEIGHT, BIAS, 1, (2, 3)),
        (X, WEIGHT, BIAS, 1.0, (2, 2)),
        (X, WEIGHT, BIAS, True, (2, 2)),
        (X, WEIGHT, BIAS, 1, LRN(2)),
        (X, WEIGHT, BIAS, 1, tuple(LRN(2))),
    ]
    assert [prepared(*args) for args in others] == list(range(2, 2 + len(others)))
    assert {prepared(*args) for args in others} == {1 + len(others)}
    with backend("reference"):
        assert prepared(X) == 2 + len(others)
    backends.forget()
    assert prepared(X) == 3 + len(others)


def test_what_is_prepared_for_each_call(prepared):
    calls = [
        lambda: prepared(X, None, None, [1, 1]),
        lambda: prepared(X, WEIGHT.double()),
        lambda: make_fx(lambda x: x + prepared(x), tracing_mode="symbolic")(X),
        lambda: torch.vmap(lambda x: x + prepared(x))(X),
        lambda: torch.compile(lambda x: x + prepared(x), backend="eager")(X + 0),
    ]
    for call in calls:
        torch._dynamo.reset()
        before = prepared(X)
        call()
        torch._dynamo.reset()
        call()
        assert prepared(X) >= before + 2


def test_errors_come_back_and_autocast_decides_anew():
    x, weight = torch.randn(1, 6, 5, 5), torch.randn(4, 6, 3, 3)
    for _ in range(2):
        assert ops.conv_relu(x, weight, stride=1).shape == (1, 4, 3, 3)
        with pytest.raises(TypeError, match=r"^stride: expected an int or a pair of ints, got 1.0$"):
            ops.conv_relu(x, weight, stride=1.0)
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.conv_relu(x.bfloat16(), weight).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^weight: is torch.float32, but input is torch.bfloat16$"):
            ops.conv_relu(x.bfloat16(), weight)


def test_forms_do_not_pile_up(prepared, monkeypatch):
    monkeypatch.setattr(arguments, "MOST_FORMS", 3)
    assert [prepared(X, None, None, n) for n in range(4)] == [1, 2, 3, 4]
    assert len(backends.prepared[-1]) == 1


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch says it on standard error alone")
@pytest.mark.parametrize("operator", [lambda x: ops.max_pool2d(x, 3), lambda x: ops.conv_relu(x, WEIGHT)])
def test_what_fails_in_torch_says_why(operator):
    """More images than addresses."""
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        operator(X[:1].expand(2**40, 6, 9, 9))


def test_signatures_are_torchs():
    """Argument for argument, so that positional calls move over as they are; what is ours comes by keyword."""
    x = torch.randn(1, 6, 9, 9)
    assert torch.equal(ops.max_pool2d(x, 3, 1, 1, 2, True), F.max_pool2d(x, 3, 1, 1, 2, True))
    torch.testing.assert_close(ops.local_response_norm(x, 3, 0.1, 0.5, 2.0), F.local_response_norm(x, 3, 0.1, 0.5, 2.0))
    expected = F.relu(F.conv2d(x, WEIGHT[:, :3], BIAS, (2, 1), (1, 0), (1, 2), 2))
    torch.testing.assert_close(ops.conv_relu(x, WEIGHT[:, :3], BIAS, (2, 1), (1, 0), (1, 2), 2), expected)
