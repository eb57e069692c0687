"""Learning rates."""

from __future__ import annotations

import pytest

from alexnet_fast.train.config import resolve
from alexnet_fast.train.schedule import START, learning_rate, plateau


def rates(**given) -> list[float]:
    config = resolve({"data": "digits", "out": "x", "epochs": 4, "lr": 1.0, "warmup": 0.0, **given}, 10)
    return [learning_rate(config, step, 10) for step in range(40)]


def test_step_cuts_at_the_end_of_each_period():
    assert rates(schedule="step", lr_step=2, lr_gamma=0.5) == [1.0] * 20 + [0.5] * 20


def test_cosine_falls_from_lr_to_almost_nothing():
    values = rates(schedule="cosine")
    assert values[0] == 1.0
    assert values[20] == pytest.approx(0.5)
    assert values[39] == pytest.approx(0.00154, abs=1e-5)  # (1 + cos(39 pi / 40)) / 2
    assert values == sorted(values, reverse=True)


def test_multistep_cuts_after_each_milestone():
    values = rates(schedule="multistep", lr_milestones=(1.0, 2.5))
    assert values == pytest.approx([1.0] * 10 + [0.1] * 15 + [0.01] * 15)


def test_plateau_cuts_when_accuracy_stalls_and_no_oftener_than_allowed():
    config = resolve({"data": "digits", "out": "x", "schedule": "plateau", "lr_patience": 2, "lr_cuts": 2}, 10)
    state, cuts = START, []
    for top1 in (0.1, 0.3, 0.2, 0.3, 0.4, 0.4, 0.35, 0.4, 0.4, 0.1, 0.1):  # equal is not better
        state = plateau(config, state, top1)
        cuts.append(state["cuts"])
    assert cuts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert learning_rate(config, 10_000, 10, cuts=2) == pytest.approx(config.lr / 100)


def test_parameters_with_a_rate_of_their_own_follow_the_same_schedule():
    config = resolve({"data": "digits", "out": "x", "epochs": 4, "lr": 1.0, "warmup": 1.0}, 10)
    for step in (0, 9, 10, 25, 39):
        other = learning_rate(config, step, 10, base=0.25)
        assert other == pytest.approx(learning_rate(config, step, 10) / 4)


@pytest.mark.parametrize("schedule", ["step", "multistep", "plateau", "cosine", "constant"])
def test_warm_up_rises_linearly_to_lr(schedule: str):
    values = rates(schedule=schedule, warmup=0.5, lr_step=30, lr_milestones=(30.0,))
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[5] == 1.0


def test_max_steps_does_not_move_the_schedule():
    assert rates(schedule="cosine", max_steps=7) == rates(schedule="cosine")
