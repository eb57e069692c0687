"""Learning rates."""

from __future__ import annotations

import pytest

from alexnet_fast.train.config import resolve
from alexnet_fast.train.schedule import learning_rate


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


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_warm_up_rises_linearly_to_lr(schedule: str):
    values = rates(schedule=schedule, warmup=0.5, lr_step=30)
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[5] == 1.0


def test_max_steps_does_not_move_the_schedule():
    assert rates(schedule="cosine", max_steps=7) == rates(schedule="cosine")
