"""pack() on a device that records: the same results by replays, new recordings whenever what they read has moved."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet, FusedSequential, pack
from alexnet_fast.nn import replays
from alexnet_fast.nn.replays import Prepared
from alexnet_fast.ops import convolution
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


# ---- A whole AlexNet -------------------------------------------------------------------------------------------------


def alexnet() -> AlexNet:
    torch.manual_seed(0)
    return AlexNet(3, widths=(8, 8, 8, 8, 8, 16, 16)).eval()


# The changes, and how many recordings three more calls make: of the whole, or of features and classifier.
ALEXNET_CHANGES = {
    "nothing": (lambda model: None, 0),
    "in place": (lambda model: [p.mul_(-1) for p in model.parameters()], 0),
    "a new parameter": (lambda model: setattr(model.classifier[6], "bias", nn.Parameter(torch.ones(3))), 1),
    "an option": (lambda model: setattr(model.features[0], "padding", (3, 3)), 1),
    "a new module": (lambda model: model.features.__setitem__(1, nn.ReLU()), 1),
    "output_size": (lambda model: setattr(model.avgpool, "output_size", (4, 9)), 1),
    "other pooling": (lambda model: setattr(model, "avgpool", nn.AdaptiveMaxPool2d(6)), 2),
    "another classifier": (lambda model: setattr(model, "classifier", nn.Linear(8 * 36, 3)), 1),
    "a hook on features": (lambda model: model.features.register_forward_hook(lambda m, x, y: -y), 2),
    "a hook on pooling": (lambda model: model.avgpool.register_forward_hook(lambda m, x, y: -y), 2),
    "a forward": (lambda model: setattr(model.classifier, "forward", lambda x: x.sum(1)), 1),
    "a hook inside": (lambda model: model.classifier[2].register_forward_hook(lambda m, x, y: -y), 1),
    "dropout": (lambda model: setattr(model.classifier[0], "training", True), 1),
}


@pytest.mark.parametrize("change", ALEXNET_CHANGES)
def test_an_alexnet_is_one_recording(change):
    model, (x,) = pack(alexnet()), torch.randn(1, 2, 3, 63, 63)
    edit, recordings = ALEXNET_CHANGES[change]
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
        assert StandIn.made == 1
        edit(model)
        for _ in range(3):
            torch.manual_seed(2)
            y = model(x)
            torch.manual_seed(2)
            torch.testing.assert_close(y, copy.deepcopy(model)(x))
    assert StandIn.made == 1 + recordings


def test_an_alexnets_parts_and_copies():
    """Called by themselves they are recordings of their own; copies are not packed, and images too small are told."""
    model, (x,) = pack(alexnet()), torch.randn(1, 2, 3, 63, 63)
    with torch.no_grad():
        for _ in range(3):
            model(x), model.features(x), copy.deepcopy(model)(x), pickle.loads(pickle.dumps(model))(x)
        with pytest.raises(ValueError, match="takes images of at least 63x63 pixels"):
            model(x[..., :40])
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert model(x).requires_grad
    assert StandIn.made == 2


# ---- Weights that are prepared once ----------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch) -> list[Prepared]:
    """What was prepared, in their order; here a copy stands for it. tests/cuda/check_packed.py has the kernels."""
    made = []

    def prepare(self: Prepared) -> torch.Tensor:
        made.append(self)
        return self.weight.detach().clone()

    monkeypatch.setattr(Prepared, "_prepare", prepare)
    return made


def asks(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """As a convolution of one pixel, with a weight of one: from what is prepared, if it is."""
    found = convolution._prepared(x, weight, None, (1, 1), (0, 0), (1, 1), 1)
    return x * (weight if found is None else found).sum()


def test_prepared_weights_are_followed_in_their_memory(prepared):
    weight, x = nn.Parameter(torch.full((1, 1, 1, 1), 2.0)), torch.ones(3)
    model = replays.Replays(lambda x: asks(weight, x), [weight])
    with torch.no_grad():
        counts = [(model(x)[0].item(), len(prepared)) for _ in range(4)]
        assert counts == [(2, 0), (2, 1), (2, 1), (2, 1)]
        place = prepared[0].tensor.data_ptr()
        weight.mul_(3)
        assert [(model(x)[0].item(), len(prepared)) for _ in range(2)] == [(6, 2), (6, 2)]
        assert {id(one) for one in prepared} == {id(prepared[0])}
        assert prepared[0].tensor.data_ptr() == place
        weight.data = torch.full((1, 1, 1, 1), 5.0)
        assert [(model(x)[0].item(), len(prepared)) for _ in range(3)] == [(5, 2), (5, 3), (5, 3)]
    assert StandIn.made == 2


def test_recordings_on_a_stream_share_what_is_prepared(prepared, monkeypatch):
    """Another stream would have to wait for the first one's work, and a recording that goes takes it along."""
    weight = nn.Parameter(torch.ones(1, 1, 1, 1))
    model = replays.Replays(lambda x: asks(weight, x), [weight])
    with torch.no_grad():
        for size in (3, 3, 4, 4):
            model(torch.ones(size))
        assert len(prepared) == 1
        monkeypatch.setattr(StandIn, "stream", staticmethod(lambda device: 1))
        model(torch.ones(3)), model(torch.ones(3))
        assert len(prepared) == 2
    assert len(model.prepared) == 2
    model.recorded.popitem()
    prepared.clear()
    gc.collect()  # the stand-in's recording holds itself
    assert len(model.prepared) == 1


def test_what_a_recording_does_not_read_is_let_go(prepared, monkeypatch):
    """Asked for while candidates were measured; the one that was taken reads the weight itself."""
    weight, calls = nn.Parameter(torch.ones(1, 1, 1, 1)), []
    record = StandIn.record  # in which Python runs once, as in a capture
    monkeypatch.setattr(StandIn, "record", lambda self, run: run() or record(self, run))

    def run(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return asks(weight, x) if len(calls) == 1 else x * weight.sum()

    model = replays.Replays(run, [weight])
    with torch.no_grad():
        for x in torch.ones(3, 2):
            model(x)
            weight.add_(1)
    assert len(prepared) == 1
    prepared.clear()
    gc.collect()
    assert not model.prepared


def test_weights_that_count_no_versions_are_not_prepared(prepared):
    with torch.inference_mode():
        weight = nn.Parameter(torch.ones(1, 1, 1, 1))
        model = replays.Replays(lambda x: asks(weight, x), [weight])
        (x,) = torch.ones(1, 3)
        for _ in range(3):
            assert model(x)[0] == weight.sum()
            weight.add_(1)
    other = nn.Parameter(torch.ones(1, 1, 1, 1))
    model = replays.Replays(lambda x: asks(other, x), [])  # nor those that are not the net's
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert not prepared
    assert StandIn.made == 2


@pytest.mark.gpu
def test_on_a_gpu():
    model = pack(net().cuda())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for x in images(2, 2, 2, 3, 3, 3):
            torch.testing.assert_close(model(x.cuda()), copy.deepcopy(model)(x.cuda()))
