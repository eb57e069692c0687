"""A run that was killed anywhere and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.pictures import write_folder
from tests.train import runs

# Two epochs have 24 steps; rows of metrics.jsonl fall between checkpoints, so their sums must survive a kill too.
STEPS = {"max_steps": 20, "checkpoint_steps": 3, "log_steps": 2}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory):
    """undisturbed(nproc): a run of 20 steps that nothing happened to."""
    made: dict[int, Path] = {}

    def run(nproc: int) -> Path:
        if nproc not in made:
            made[nproc] = tmp_path_factory.mktemp("whole") / "run"
            assert runs.train(made[nproc], nproc=nproc, **STEPS) == 0
        return made[nproc]

    return run


def _ended(process: subprocess.Popen, children: list[int]) -> None:
    process.wait(timeout=60)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "ranks outlived the run"
        time.sleep(0.02)


def _wait_for_checkpoint(run: Path, seconds: float) -> None:
    """A checkpoint of a step that was trained."""
    deadline = time.monotonic() + seconds
    while not (run / "checkpoints" / "last").exists() or (run / "checkpoints" / "last").resolve().name[-1] == "0":
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("nproc", "victim", "step"),
    [
        (1, "run", 5),
        # Nine and thirteen processes, each of which imports torch.
        pytest.param(2, "launcher", 14, marks=pytest.mark.soak),
        pytest.param(3, "rank", 4, marks=pytest.mark.soak),
    ],
)
def test_killed_then_resumed(tmp_path: Path, undisturbed, nproc: int, victim: str, step: int):
    run = tmp_path / "run"
    process = runs.start(run, nproc=nproc, **STEPS)
    runs.wait_for_step(run, step, process)
    _wait_for_checkpoint(run, seconds=60)  # written behind the steps: that of step 3 at the latest before step 6's
    children = runs.children(process.pid)
    assert len(children) == (nproc if nproc > 1 else 0)
    os.kill(children[-1] if victim == "rank" else process.pid, signal.SIGKILL)
    _ended(process, children)
    if victim == "rank":
        assert process.returncode == 1
        said = run.with_suffix(".log").read_text().splitlines()[-1]
        assert said.startswith("error: rank ")
        assert "was killed by SIGKILL" in said
    assert runs.rows(run)[-1]["step"] < 20
    assert runs.train(run, resume=run) == 0
    runs.assert_same_bits(run, undisturbed(nproc))
    assert runs.rows(run) == runs.rows(undisturbed(nproc))


@pytest.mark.parametrize(("nproc", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_leaves_a_checkpoint_of_the_very_step(tmp_path: Path, undisturbed, nproc: int, number: int):
    run = tmp_path / "run"
    process = runs.start(run, nproc=nproc, max_steps=20)  # no checkpoint of its own before step 12
    runs.wait_for_step(run, 2, process)
    process.send_signal(number)
    _wait_for_checkpoint(run, seconds=10)
    assert process.wait(timeout=60) == 128 + number
    last = max(row["step"] for row in runs.rows(run))
    assert last < 12
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    said = f"stopped by {signal.Signals(number).name} at step {last}; go on with --resume"
    assert said in run.with_suffix(".log").read_text()
    if nproc == 1:
        assert runs.train(run, resume=run) == 0
        runs.assert_same_bits(run, undisturbed(nproc))


def test_a_loader_worker_that_dies_ends_the_run_with_one_line(tmp_path: Path):
    run = tmp_path / "run"
    data = write_folder(tmp_path / "set", train=60, val=2)
    given = {"data": str(data), "image_size": 64, "batch_size": 4, "epochs": 50, "workers": 1, "nproc": 1}
    process = runs.start(run, **given)
    runs.wait_for_step(run, 2, process)
    (worker,) = runs.children(process.pid)
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    said = run.with_suffix(".log").read_text()
    assert said.endswith("error: a loader worker process died (killed, or out of memory)\n")
    assert "Traceback" not in said


def _folder_run(tmp_path: Path, **given: object) -> subprocess.Popen:
    data = write_folder(tmp_path / "set", train=60, val=2)
    options = {"image_size": 64, "batch_size": 4, "epochs": 50, "workers": 1, "nproc": 1, "data": str(data)}
    return runs.start(tmp_path / "run", **{**options, **given})


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_second_signal_kills_also_while_a_loader_worker_is_stopped(tmp_path: Path, nproc: int):
    process = _folder_run(tmp_path, nproc=nproc)
    runs.wait_for_step(tmp_path / "run", 2, process)
    ranks = [process.pid] if nproc == 1 else runs.children(process.pid)
    workers = [worker for rank in ranks for worker in runs.children(rank)]
    assert len(workers) == nproc
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    _ended(process, [*ranks, *workers])


def test_a_full_dev_shm_ends_the_run_with_one_line(tmp_path: Path):
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    mounted = "mount -t tmpfs -o size=1M tmpfs /dev/shm"
    if subprocess.run([*inside, mounted], capture_output=True).returncode:
        pytest.skip("this machine lets no test mount a small /dev/shm")
    options = {"data": str(write_folder(tmp_path / "set", train=8, val=2)), "out": str(tmp_path / "run")}
    words = json.dumps({**runs.GIVEN, **options, "image_size": 200, "workers": 2})
    run = f"{mounted} && exec {sys.executable} -m tests.train.runs '{words}'"
    ended = subprocess.run([*inside, run], cwd=runs.ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1].startswith("error: /dev/shm is full")
    assert "Traceback" not in ended.stdout + ended.stderr


def test_resuming_an_earlier_checkpoint_of_the_run(tmp_path: Path, undisturbed):
    """The checkpoint after it is left out, as if it had been damaged, and made anew."""
    run = tmp_path / "run"
    assert runs.train(run, **{**STEPS, "max_steps": 8}) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last", "step-00000006", "step-00000008"]
    assert runs.train(run, resume=run / "checkpoints" / "step-00000006", max_steps=20) == 0
    runs.assert_same_bits(run, undisturbed(1))
    assert runs.rows(run) == runs.rows(undisturbed(1))


def test_a_finished_run_resumes_to_the_same_end(tmp_path: Path):
    run = tmp_path / "run"
    assert runs.train(run, epochs=1) == 0
    before = runs.rows(run), runs.tensors(run)
    assert runs.train(run, resume=run) == 0
    assert runs.rows(run) == before[0]
    assert all((value == before[1][key]).all() for key, value in runs.tensors(run).items())


def test_two_runs_never_write_in_one_folder(tmp_path: Path):
    run = tmp_path / "run"
    process = runs.start(run, checkpoint_steps=1, epochs=500)
    try:
        runs.wait_for_step(run, 3, process)
        other = runs.start(run, resume=run)
        assert other.wait(timeout=60) == 2
        assert "another run is writing there" in run.with_suffix(".log").read_text()
    finally:
        process.kill()
        process.wait()
