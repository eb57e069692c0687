"""graphed_step is a training step, whatever it records."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from alexnet_fast import AlexNet, graphed_step, recording
from alexnet_fast.optim import SGD
from tests.recorders import StandIn, stand_in  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("stand_in")


def nets() -> tuple[nn.Module, nn.Module]:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3))
    return net, copy.deepcopy(net)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 2, 2, generator=generator), torch.arange(n) % 3) for n in sizes]


def trained(net: nn.Module, optimizer, sizes, edit=lambda step, net, optimizer: None, **options) -> list[float]:
    torch.manual_seed(0)
    step, losses = graphed_step(net, cross_entropy, optimizer, **options), []
    for i, (x, target) in enumerate(batches(*sizes)):
        edit(i, net, optimizer)
        losses.append(step(x, target).item())
    return losses


def expected(net: nn.Module, optimizer, sizes, edit=lambda step, net, optimizer: None) -> list[float]:
    torch.manual_seed(0)
    losses = []
    for i, (x, target) in enumerate(batches(*sizes)):
        edit(i, net, optimizer)
        optimizer.zero_grad()
        loss = cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for got, wanted in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, wanted)
        assert torch.equal(got.grad, wanted.grad)


def set_rate(step: int, net: nn.Module, optimizer) -> None:
    optimizer.param_groups[0]["lr"] = 0.1 if step < 6 else 0.02


def freeze(step: int, net: nn.Module, optimizer) -> None:
    net[4].weight.requires_grad_(step < 5)
    if step == 5:
        net[4].weight.grad = None


EDITS = {
    "nothing": lambda step, net, optimizer: None,
    "rate": set_rate,
    "rate of every step": lambda step, net, optimizer: optimizer.param_groups[0].update(lr=0.1 / (1 + step)),
    "mode": lambda step, net, optimizer: net.train(step % 8 < 6),
    "gradients away": lambda step, net, optimizer: [setattr(p, "grad", None) for p in net.parameters()],
    "moved": lambda step, net, optimizer: [setattr(p, "data", p.data.clone()) for p in net.parameters()],
    "new state": lambda step, net, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("make", [SGD, torch.optim.SGD, torch.optim.Adam], ids=["ours", "SGD", "Adam"])
def test_it_is_the_plain_loop(make, edit):
    """Over even and uneven batches, dropout included: the same bits."""
    sizes = [4, 4, 4, 4, 4, 4, 2, 4, 4, 2, 2, 4, 2, 4]
    one, other = nets()
    options = {} if make is torch.optim.Adam else {"momentum": 0.9}
    losses = trained(one, make(one.parameters(), lr=0.1, **options), sizes, EDITS[edit], warmup=2)
    assert losses == expected(other, make(other.parameters(), lr=0.1, **options), sizes, EDITS[edit])
    assert_same(one, other)
    assert StandIn.made >= (0 if edit == "moved" else 2)


def test_a_frozen_parameter_is_noticed():
    one, other = nets()
    sizes = [4] * 9
    losses = trained(one, SGD(one.parameters(), 0.1), sizes, freeze, warmup=1)
    assert losses == expected(other, SGD(other.parameters(), 0.1), sizes, freeze)
    assert torch.equal(one[4].weight, other[4].weight)


def test_what_is_recorded_and_when():
    """One recording of the net for each form of the batch, then one of the optimizer's step once nothing of it has
    changed."""
    net, _ = nets()
    optimizer = SGD(net.parameters(), 0.1, momentum=0.9)
    step = graphed_step(net, cross_entropy, optimizer, warmup=2, most=2)
    made = []
    for x, target in batches(4, 4, 4, 4, 4, 3, 3, 3, 2, 2, 2, 4):
        step(x, target)
        made.append(StandIn.made)
    assert made == [0, 0, 1, 2, 2, 2, 2, 3, 3, 3, 4, 5], "the first form had gone, and has warmed up"
    assert len(step.recorded) == 2
    step.forget()
    assert not step.recorded


def test_the_batch_is_copied_and_the_loss_is_the_callers():
    net, _ = nets()
    step = graphed_step(net.eval(), cross_entropy, SGD(net.parameters(), 0.0), warmup=1)
    (x, target), (other, _) = batches(4, 4)
    losses = [step(batch, target) for batch in (x, x, other, x)]
    assert losses[0] == losses[1] == losses[3] != losses[2]
    assert not any(loss.requires_grad for loss in losses)


@pytest.mark.parametrize(("refused", "part"), [(1, "net"), (2, "optimizer")])
def test_what_cannot_be_recorded_runs_without(monkeypatch, refused, part):
    monkeypatch.setattr(StandIn, "refuses", (refused,))
    one, other = nets()
    sizes = [4] * 8
    optimizer = SGD(one.parameters(), 0.1)
    with pytest.warns(
        RuntimeWarning, match=rf"^graphed_step: the {part}'s part runs without a graph: operation not .*ing$"
    ) as told:
        losses = trained(one, optimizer, sizes, warmup=1)
    assert len(told) == 1
    assert losses == expected(other, SGD(other.parameters(), 0.1), sizes)
    assert_same(one, other)


def test_without_a_gpu_it_is_the_plain_step(monkeypatch):
    monkeypatch.delitem(recording.RECORDERS, "cpu")
    one, other = nets()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = trained(one, SGD(one.parameters(), 0.1), [4] * 4)
    assert losses == expected(other, SGD(other.parameters(), 0.1), [4] * 4)


def test_alexnet():
    net = AlexNet(num_classes=3)
    step = graphed_step(net, nn.CrossEntropyLoss(), SGD(net.parameters(), 0.01), warmup=1)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    losses = [step(x, target).item() for _ in range(4)]
    assert StandIn.made == 2
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"net": 3}, TypeError, r"^net: expected an nn.Module, got int$"),
        ({"loss": 3}, TypeError, r"^loss: expected a function of result and target, got int$"),
        ({"optimizer": 3}, TypeError, r"^optimizer: expected a torch.optim.Optimizer, got int$"),
        ({"warmup": 0}, ValueError, r"^warmup: expected a positive int, got 0$"),
        ({"most": 1.5}, ValueError, r"^most: expected a positive int, got 1.5$"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    net, _ = nets()
    usual = {"net": net, "loss": cross_entropy, "optimizer": SGD(net.parameters(), 0.1)}
    with pytest.raises(error, match=message):
        graphed_step(**{**usual, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("make", [SGD, torch.optim.SGD], ids=["ours", "SGD"])
def test_graphs_on_a_gpu(monkeypatch, make):
    """The recorder of CUDA itself, without dropout: its random numbers are others in a graph."""
    one, other = (net.cuda() for net in nets())
    for net in (one, other):
        net[3].p = 0.0
    sizes = [4, 4, 4, 4, 4, 2, 4, 2, 2, 2, 4]
    data = [(x.cuda(), target.cuda()) for x, target in batches(*sizes)]
    monkeypatch.setattr("tests.test_graphs.batches", lambda *_: data)
    losses = trained(one, make(one.parameters(), lr=0.1, momentum=0.9), sizes, set_rate, warmup=2)
    wanted = expected(other, make(other.parameters(), lr=0.1, momentum=0.9), sizes, set_rate)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted))
    for got, parameter in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, parameter)
