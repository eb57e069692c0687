"""Bias, ReLU and dropout after a matrix product: which elements stay, how many, and who decides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import ops
from alexnet_fast.reference.linear_relu_dropout import philox

from .compare import saved_bytes

X, WEIGHT, BIAS = torch.ones(64, 1), torch.ones(128, 1), torch.ones(128)  # every element is 2 before dropout
NAN, INF = float("nan"), float("inf")


def call(backend: str, device: str, **arguments) -> torch.Tensor:
    return ops.linear_relu_dropout(X.to(device), WEIGHT.to(device), BIAS.to(device), backend=backend, **arguments)


@pytest.mark.parametrize(
    ("key", "counter", "stream", "words"),
    [
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, None),
    ],
)
def test_philox(key, counter, stream, words):
    """The first is a known answer of Random123, the library of the paper. The second repeats the rounds in Python's
    integers, which have no width to overflow."""
    got = philox(torch.tensor([key]), torch.tensor([counter - 2**64 if counter >= 2**63 else counter]), stream)
    if words is None:
        low, c, k = 2**32 - 1, [counter % 2**32, counter >> 32, stream, 0], [key % 2**32, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        words = " ".join(f"{word:08x}" for word in c)
    assert " ".join(f"{int(word):08x}" for word in got) == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_scale(p, backend, device):
    """Elements are kept, scaled up, with probability 1 - p: five standard deviations of the binomial are allowed."""
    y = call(backend, device, p=p, seed=3)
    kept = y[y != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 / (1 - p)))
    n = y.numel()
    assert abs(kept.numel() - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5


def test_every_seed_and_every_row_its_own(backend, device):
    """No two seeds, no two rows, no two columns are zeroed alike."""
    a, b = (call(backend, device, seed=seed) != 0 for seed in (3, 4))
    assert not torch.equal(a, b)
    assert a.unique(dim=0).shape == a.shape
    assert a.unique(dim=1).shape == a.shape


def test_one_seed_one_mask(backend, device):
    """On every backend, as an int or a tensor, and at any batch size: element i depends on i alone."""
    expected = call("reference", "cpu", seed=2**40 + 5)
    assert torch.equal(call(backend, device, seed=2**40 + 5).cpu(), expected)
    assert torch.equal(call(backend, device, seed=torch.tensor([2**40 + 5], device=device)).cpu(), expected)
    part = ops.linear_relu_dropout(
        X[:5].to(device), WEIGHT.to(device), BIAS.to(device), seed=2**40 + 5, backend=backend
    )
    assert torch.equal(part.cpu(), expected[:5])


def test_manual_seed(backend, device):
    """Without a seed torch's generator decides, and moves on."""
    torch.manual_seed(0)
    first, second = call(backend, device), call(backend, device)
    torch.manual_seed(0)
    assert torch.equal(call(backend, device), first)
    assert not torch.equal(first, second)


def test_evaluation_and_p_0_leave_the_generator_alone(backend, device):
    torch.manual_seed(0)
    call(backend, device, training=False)
    call(backend, device, p=0.0)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)


def test_p_1_zeroes_everything(backend, device):
    x = X.to(device).requires_grad_()
    y = ops.linear_relu_dropout(x, WEIGHT.to(device), BIAS.to(device), p=1.0, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert not y.any()
    assert not dx.any()


def test_special_values(backend, device):
    """NaN stays NaN, as in ReLU, and passes the gradient on."""
    x = torch.tensor([[NAN], [INF], [-INF], [-1.0]], device=device).requires_grad_()
    weight = torch.ones(1, 1, device=device)
    y = ops.linear_relu_dropout(x, weight, training=False, backend=backend)
    peer = F.relu(F.linear(x, weight))
    torch.testing.assert_close(y, peer, rtol=0, atol=0, equal_nan=True)
    dy = torch.ones_like(y)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, peer)))


@pytest.mark.parametrize("named", ["cpu"])
def test_only_the_output_is_saved(named):
    """Beside what the product keeps: torch's own layers keep the ReLU's output and a mask too."""
    x, weight = torch.randn(64, 128, requires_grad=True), torch.randn(256, 128, requires_grad=True)
    output = 64 * 256 * 4
    product = x.numel() * 4 + weight.numel() * 4
    assert saved_bytes(lambda: ops.linear_relu_dropout(x, weight, backend=named)) <= product + output


@pytest.mark.parametrize(
    ("arguments", "exception", "pieces"),
    [
        ({"input": torch.ones(2, 3, 4)}, ValueError, ["input", "expected 1 or 2", "got 3"]),
        ({"weight": torch.ones(4)}, ValueError, ["weight", "expected 2", "got 1"]),
        ({"weight": torch.ones(4, 5)}, ValueError, ["weight", "(4, 5)", "5 features", "got 3"]),
        ({"weight": torch.ones(4, 3).half()}, TypeError, ["weight", "torch.float16", "input is torch.float32"]),
        ({"bias": torch.ones(5)}, ValueError, ["bias", "4 channels", "got 5"]),
        ({"p": 1.5}, ValueError, ["p", "probability", "1.5"]),
        ({"p": NAN}, ValueError, ["p", "probability", "nan"]),
        ({"seed": torch.ones(1)}, ValueError, ["seed", "int64", "torch.float32"]),
        ({"seed": torch.ones(2, dtype=torch.int64)}, ValueError, ["seed", "one element", "(2,)"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, exception, pieces):
    with pytest.raises(exception) as caught:
        ops.linear_relu_dropout(**{"input": torch.ones(2, 3), "weight": torch.ones(4, 3), **arguments})
    assert all(piece in str(caught.value) for piece in pieces), str(caught.value)
