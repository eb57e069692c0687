"""Several processes give what one gives, and end together."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_fast.data.sources import ArrayImages
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.parallel import Ranks, launch, plan_devices
from alexnet_fast.parallel.launch import _verdict
from alexnet_fast.train.config import resolve
from alexnet_fast.train.evaluate import evaluate
from tests.train import runs

CONFIG = resolve({"data": "digits", "out": "x", "batch_size": 8, "workers": 0}, 10)


def test_two_ranks_equal_one_process_on_the_same_batches(tmp_path: Path):
    for nproc in (1, 2):
        assert runs.train(tmp_path / str(nproc), nproc=nproc, dropout=0.0) == 0
    one, two = runs.rows(tmp_path / "1"), runs.rows(tmp_path / "2")
    assert len(one) == len(two) == 26
    for a, b in zip(one, two, strict=True):
        assert (a.pop("kind"), a.get("count")) == (b.pop("kind"), b.get("count"))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)  # 24 steps of float32 sums in another order
    weights = [runs.tensors(tmp_path / name) for name in "12"]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-5)


def _sets() -> list[ArrayImages]:
    generator = np.random.default_rng(0)
    return [
        ArrayImages(generator.integers(0, 256, (count, 8, 8), np.uint8), generator.integers(0, 10, count))
        for count in (1, 2, 7, 31)
    ]


def _count(ranks: Ranks, out: str) -> int:
    model = runs.small_net(CONFIG)
    results = [evaluate(model, split, CONFIG, ranks)[0] for split in _sets()]
    Path(out, f"{ranks.world}-{ranks.rank}.json").write_text(json.dumps(results))
    return 0


def test_evaluations_over_one_two_and_three_ranks_count_the_same(tmp_path: Path):
    for nproc in (1, 2, 3):
        assert launch(_count, (str(tmp_path),), nproc) == 0
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(results) == 6
    for result in results.values():
        assert [row[3] for row in result] == [1, 2, 7, 31]
        for row, alone in zip(result, results["1-0"], strict=True):
            assert row[1:] == alone[1:]
            assert row[0] == pytest.approx(alone[0], rel=1e-6)
    assert results["1-0"][3][1:] != [0, 0, 31]  # the set is large enough for hits


def _part(ranks: Ranks, how: str, folder: str) -> int:
    """Gathers, then ends in the way that the test names while the other rank waits for it."""
    names = ranks.gather({"rank": ranks.rank, "text": "é" * ranks.rank})
    assert names == [{"rank": rank, "text": "é" * rank} for rank in range(ranks.world)]
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "input":
            raise InputError("what came is not what is wanted")
        if how == "failed":
            raise ZeroDivisionError("a fault of the program")
    if how == "code":
        return 7
    ranks.wait()
    time.sleep(60)
    return 0


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ("killed", RunError, "rank 1 was killed by SIGKILL; all 2 ranks were stopped"),
        ("input", InputError, "what came is not what is wanted"),
        ("failed", RunError, "a rank failed with the exception above; all 2 ranks were stopped"),
    ],
)
def test_a_rank_that_ends_takes_the_others_with_it(
    tmp_path: Path, capfd: pytest.CaptureFixture, how: str, error: type[Exception], said: str
):
    before = runs.children(os.getpid())  # workers of torch's compiler, perhaps
    with pytest.raises(error) as caught:
        launch(_part, (how, str(tmp_path)), 2)
    assert str(caught.value) == said
    trace = capfd.readouterr().err
    assert ("ZeroDivisionError: a fault of the program" in trace) == (how == "failed")
    assert trace.count("Traceback") == (how == "failed")
    assert set(runs.children(os.getpid())) <= set(before)


MESSAGE, TRACE = (-2, 9.0, "the user's fault", ""), (-1, 3.0, "", "trace")


@pytest.mark.parametrize(
    ("codes", "said", "verdict"),
    [
        ([2, -6], [MESSAGE], "the user's fault"),
        ([1, 2], [TRACE, MESSAGE], "the user's fault"),
        ([1, -9], [TRACE], "rank 1 was killed by SIGKILL"),
        ([-6, -11], [], "rank 1 was killed by SIGSEGV"),
        ([-6, 1], [TRACE], "a rank failed with the exception above"),
        ([-6, None], [], "rank 0 was killed by SIGABRT"),
    ],
)
def test_of_several_failures_the_one_that_explains_the_others_is_named(codes: list, said: list, verdict: str):
    reports = []
    for record in said:
        report, told = multiprocessing.Pipe(duplex=False)
        told.send(record)
        reports.append(report)
    with pytest.raises((InputError, RunError), match=verdict):
        _verdict(codes, reports, [])
    assert _verdict(codes, [], [signal.SIGINT]) == 130


def test_the_exit_code_of_the_ranks_is_the_runs(tmp_path: Path):
    assert launch(_part, ("code", str(tmp_path)), 2) == 7


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert plan_devices(2) == "cuda"
    with pytest.raises(InputError, match=r"3 ranks, but torch sees 2 GPU\(s\) here"):
        plan_devices(3)


def test_without_gpus_ranks_share_the_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan_devices(3) == "cpu"
