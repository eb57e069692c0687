"""pack() on a device that records: the same results by replays, new recordings whenever what they read has moved."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet, FusedSequential, pack
from alexnet_fast.nn import replays
from tests.recorders import StandIn, stand_in  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("stand_in")


def net() -> FusedSequential:
    torch.manual_seed(0)
    return FusedSequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * 8 * 8, 5)),
    ).eval()


def images(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 16, 16, generator=generator) for n in sizes]


CHANGES = {
    "nothing": lambda model: None,
    "in place": lambda model: [p.mul_(-2) for p in model.parameters()],
    "data": lambda model: [setattr(p, "data", p.data * -1) for p in model.parameters()],
    "new parameters": lambda model: setattr(model[5], "weight", nn.Parameter(-model[5].weight)),
    "another option": lambda model: setattr(model[3], "stride", 1) or setattr(model, "5", nn.Linear(8 * 15 * 15, 5)),
    "a hook": lambda model: model[1].register_forward_hook(lambda module, args, result: -result),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_results_follow_every_change(change, mode):
    with mode():
        model = pack(net())
        plain = nn.Sequential(*copy.deepcopy(model))
        for x in images(2, 2, 3, 2):
            torch.testing.assert_close(model(x), plain(x))
        assert StandIn.made == 1, "two images, the second time"
        CHANGES[change](model)
        plain = nn.Sequential(*model)
        for x in images(2, 2, 2):
            torch.testing.assert_close(model(x), plain(x))
        assert StandIn.made == {"nothing": 1, "in place": 1, "a hook": 1}.get(change, 2)


def test_results_are_the_callers():
    with torch.no_grad():
        model, (one, other) = pack(net()), images(2, 2)
        model(one), model(one)
        kept = model(one)
        before = kept.clone()
        model(other)
    assert torch.equal(kept, before)


def test_the_least_recently_used_goes(monkeypatch):
    monkeypatch.setattr(replays, "MOST", 2)
    made = []
    with torch.no_grad():
        model = pack(net())
        for x in images(1, 1, 2, 2, 1, 3, 3, 2, 1):
            model(x)
            made.append(StandIn.made)
    assert made == [0, 1, 1, 2, 2, 2, 3, 3, 3], "two images had gone when three came, then one"


def test_training_and_what_was_not_asked_record_nothing():
    x = images(2)[0]
    model = pack(net())
    for _ in range(3):
        model(x).sum().backward()
    with torch.no_grad():
        for other in (net(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            for _ in range(3):
                other(x)
        pack(with_dropout := FusedSequential(*net(), nn.ReLU(), nn.Dropout()))
        assert not torch.equal(with_dropout(x), with_dropout(x))
        assert not torch.equal(with_dropout(x), with_dropout(x))
    assert StandIn.made == 0


def test_what_cannot_be_recorded_runs_without(monkeypatch):
    monkeypatch.setattr(StandIn, "refuses", (1,))
    x = images(2)[0]
    with torch.no_grad():
        model = pack(net())
        wanted = model(x)
        with pytest.warns(RuntimeWarning, match=r"^pack: inference runs without a graph: operation not .*ing$"):
            assert torch.equal(model(x), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x), wanted)
    assert StandIn.made == 1


def test_threads():
    """Each gets its own input's result, though all go through the memory of one recording."""
    model = pack(net())
    batches = images(*[2] * 4)
    with torch.no_grad():
        wanted = [model(x) for x in batches]
    wrong = []

    def work(x: torch.Tensor, y: torch.Tensor) -> None:
        with torch.no_grad():
            wrong.extend(i for i in range(50) if not torch.equal(model(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(batches, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_alexnet():
    model = pack(AlexNet(num_classes=3).eval())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        results = [model(x) for _ in range(3)]
    assert StandIn.made == 2, "features and classifier"
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.gpu
def test_on_a_gpu():
    model = pack(net().cuda())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for x in images(2, 2, 2, 3, 3, 3):
            torch.testing.assert_close(model(x.cuda()), copy.deepcopy(model)(x.cuda()))
