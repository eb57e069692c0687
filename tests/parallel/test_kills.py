"""Kills, signals and restarts in every mode: the run ends with the bits of one that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from alexnet_fast.errors import InputError
from alexnet_fast.parallel import RESTARTED
from alexnet_fast.train import checkpoint, commands
from tests.parallel import courses
from tests.train import runs

MODULE = "tests.parallel.courses"
MODES = {
    "towers": {"parallel": "towers", "variant": "paper", "nproc": 2},
    "hybrid": {"parallel": "hybrid", "hybrid_scheme": "b", "nproc": 2},
}
STEPS = {**courses.STEPS, "max_steps": 20, "checkpoint_steps": 3}


def test_a_restarted_run_needs_its_folder_and_goes_on_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a rank does that torchrun starts anew."""
    run = tmp_path / "run"
    assert runs.train(run, **{**runs.GIVEN, "max_steps": 8, "checkpoint_steps": 3}) == 0
    given = {**runs.options(run, {}), "max_steps": 12}
    with pytest.raises(InputError, match=r"--out: .* is not an empty folder"):
        commands.train(given, None, runs.small_net)
    monkeypatch.setenv(RESTARTED, "1")
    model = run / "checkpoints" / "last" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])  # the kill spoiled the newest one
    assert commands.train(given, None, runs.small_net) == 0
    assert [row["step"] for row in runs.rows(run) if row["kind"] == "step"] == list(range(1, 13))
    with pytest.raises(InputError, match="--out: a run that torchrun restarts has to name its folder"):
        commands.train({"data": given["data"]}, None, runs.small_net)


def test_a_run_that_had_saved_nothing_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RESTARTED, "2")
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"kind": "step", "step": 1}\n')
    assert runs.train(run, max_steps=2) == 0
    assert [row["step"] for row in runs.rows(run) if row["kind"] == "step"] == [1, 2]


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_killed_again_and_again(tmp_path: Path, mode: str):
    draw = random.Random(mode)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert runs.start(whole, module=MODULE, **STEPS, **MODES[mode]).wait(timeout=300) == 0
    for upto in (5, 11, 16):
        resume = run if (run / "checkpoints" / "last").exists() else None
        process = runs.start(run, resume, module=MODULE, **({} if resume else {**STEPS, **MODES[mode]}))
        runs.wait_for_step(run, upto, process)
        os.kill(draw.choice([process.pid, *runs.children(process.pid)]), signal.SIGKILL)
        process.wait(timeout=60)
        time.sleep(2)  # ranks end with the launcher
    assert runs.start(run, run, module=MODULE).wait(timeout=300) == 0
    runs.assert_same_bits(run, whole)
    assert courses.losses(run) == courses.losses(whole)
    assert courses.summary(run)["restarts"] == 3


@pytest.mark.soak
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_leaves_a_checkpoint_within_ten_seconds(tmp_path: Path, mode: str):
    run = tmp_path / "run"
    process = runs.start(run, module=MODULE, **{**STEPS, "checkpoint_steps": 0, **MODES[mode]})
    runs.wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    step = max(row["step"] for row in runs.rows(run))
    assert checkpoint.load(run / "checkpoints" / f"step-{step:08d}").state["step"] == step


@pytest.mark.soak
def test_torchrun_restarts_the_ranks_from_the_last_checkpoint(tmp_path: Path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    given = {"max_steps": 20, "checkpoint_steps": 3}
    assert runs.train(whole, nproc=2, **given) == 0
    words = ("--standalone", "--nproc-per-node=2", "--max-restarts=2")
    process = runs.start(run, torchrun=words, **given)
    runs.wait_for_step(run, 7, process)
    os.kill(runs.children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, run.with_suffix(".log").read_text()
    assert courses.summary(run)["restarts"] == 1
    runs.assert_same_bits(run, whole)
    assert runs.rows(run) == runs.rows(whole)
