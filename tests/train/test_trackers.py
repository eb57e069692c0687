"""wandb and MLflow get what metrics.jsonl has: by stand-ins that write down how they are called."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from alexnet_fast.errors import InputError
from tests.train import runs


class Record:
    """A tracking package's calls: which runs were begun, each with its scalars by step."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.scalars: dict[tuple[int, str], float] = {}
        self.closed, self.fails_at = 0, 10**9

    def log(self, values: dict[str, float], step: int) -> None:
        if step >= self.fails_at:
            raise ConnectionError("no answer\nfrom the server")
        self.scalars |= {(step, name): value for name, value in values.items()}

    def close(self) -> None:
        self.closed += 1

    def wandb(self) -> dict[str, Any]:
        def init(**given: Any) -> SimpleNamespace:
            self.begun.append(given)
            return SimpleNamespace(log=self.log, finish=self.close)

        return {"init": init, "Settings": lambda **given: SimpleNamespace(project=None)}

    def mlflow(self) -> dict[str, Any]:
        def start_run(run_id: str | None, run_name: str) -> SimpleNamespace:
            self.begun.append({"id": run_id or "abc", "name": run_name})
            return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

        variables = SimpleNamespace(MLFLOW_EXPERIMENT_NAME=SimpleNamespace(get=lambda: None))
        calls = {"log_metrics": self.log, "end_run": self.close, "start_run": start_run}
        return {**calls, "environment_variables": variables, "set_experiment": str, "log_params": dict}


@pytest.fixture(params=["wandb", "mlflow"])
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Record]:
    monkeypatch.setattr("alexnet_fast.train.pictures.draw_curves", lambda rows, path: None)
    record, module = Record(), ModuleType(request.param)
    vars(module).update(getattr(record, request.param)(), __spec__=ModuleSpec(request.param, None))
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, record


def test_a_tracker_has_what_the_metrics_have_and_goes_on_when_resumed(tmp_path: Path, package: tuple[str, Record]):
    name, record = package
    run = tmp_path / "run"
    assert runs.train(run, max_steps=5, **{name: True}) == 0
    assert runs.train(run, resume=run, max_steps=13) == 0
    steps = [row for row in runs.rows(run) if row["kind"] == "step"]
    assert len(steps) == 13
    for row in steps:
        assert record.scalars[row["step"], "train/loss"] == row["loss"]
        assert record.scalars[row["step"], "lr"] == row["lr"]
    epochs = [row for row in runs.rows(run) if row["kind"] == "epoch"]
    assert [record.scalars[row["step"], "val/top1"] for row in epochs] == [row["val_top1"] for row in epochs]
    assert record.closed == 2
    assert record.begun[0]["name"] == "run"
    assert record.begun[0]["id"] == record.begun[1]["id"]


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, package: tuple[str, Record], capsys: pytest.CaptureFixture):
    name, record = package
    record.fails_at = 3
    assert runs.train(tmp_path / "run", max_steps=6, **{name: True}) == 0
    said = capsys.readouterr().out
    assert said.count(f"warning: --{name}: no answer from the server; the run goes on without it") == 1
    assert max(step for step, _ in record.scalars) == 2


def test_a_tracker_that_cannot_begin_is_one_line(
    tmp_path: Path, package: tuple[str, Record], monkeypatch: pytest.MonkeyPatch
):
    name, _ = package

    def refuse(*args: object, **given: object) -> None:
        raise RuntimeError("no account")

    monkeypatch.setattr(sys.modules[name], {"wandb": "init", "mlflow": "start_run"}[name], refuse)
    with pytest.raises(InputError, match=f"--{name}: no account"):
        runs.train(tmp_path / "run", max_steps=6, **{name: True})
