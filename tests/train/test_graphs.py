"""Steps that are replayed are the steps themselves, bit for bit: in a run, and across a resume."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from alexnet_fast.errors import RunError
from tests.recorders import StandIn, stand_in  # noqa: F401  a fixture
from tests.train import runs

pytestmark = pytest.mark.usefixtures("stand_in")
# In each of five epochs eleven batches of ten images and one of nine, which is recorded in the fourth.
COURSE = {"epochs": 5, "schedule": "step", "lr_step": 3.5}


def test_a_run_has_the_same_bits(tmp_path: Path):
    assert runs.train(tmp_path / "plain", graph=False, **COURSE) == 0
    assert StandIn.made == 0
    assert runs.train(tmp_path / "graphs", **COURSE) == 0
    assert StandIn.made >= 4, "the net's part and the optimizer's, for either size of batch"
    runs.assert_same_bits(tmp_path / "plain", tmp_path / "graphs")
    assert runs.rows(tmp_path / "plain") == runs.rows(tmp_path / "graphs")


def test_a_resumed_run_has_the_same_bits(tmp_path: Path):
    options = {**COURSE, "clip_grad": 1.0, "warmup": 1.0}
    assert runs.train(tmp_path / "plain", graph=False, **options) == 0
    assert runs.train(tmp_path / "graphs", max_steps=31, **options) == 0
    assert runs.train(tmp_path / "graphs", resume=tmp_path / "graphs", max_steps=60) == 0
    runs.assert_same_bits(tmp_path / "plain", tmp_path / "graphs")


def test_a_replay_that_gives_something_else_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert runs.train(tmp_path / "plain", graph=False, max_steps=8) == 0
    right = StandIn.record

    def record(self, run, generators=()):
        def wrong():
            made = run()
            made[0].add_(1e-6)
            return made

        return right(self, wrong, generators)

    monkeypatch.setattr(StandIn, "record", record)
    with pytest.warns(RuntimeWarning, match="^train: the net's part runs without a graph: what a graph .* not what"):
        assert runs.train(tmp_path / "graphs", max_steps=8) == 0
    runs.assert_same_bits(tmp_path / "plain", tmp_path / "graphs")


@pytest.mark.parametrize(
    "given", [{"optimizer": "adamw", "lr": 3e-4}, {"mixup": 0.2}, {"accumulate": 2}, {"graph": False}], ids=str
)
def test_what_is_not_recorded(tmp_path: Path, given):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs.train(tmp_path / "run", max_steps=7, **given) == 0
    assert StandIn.made == 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    with pytest.raises(RunError, match=r"^the loss is (nan|inf) at step"):
        runs.train(tmp_path / "run", lr=1e18, epochs=4)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert runs.train(tmp_path / "graphs", **COURSE) == 0
    assert runs.train(tmp_path / "plain", graph=False, **COURSE) == 0
    runs.assert_same_bits(tmp_path / "plain", tmp_path / "graphs")
