"""Checkpoints are whole or are refused, and the last good one survives whatever happens to the next."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import checkpoint
from alexnet_fast.train.config import resolve

CONFIG = resolve({"data": "digits", "out": "x"}, 10)
MODEL = {"a.weight": torch.randn(3, 4, 5, 5).contiguous(memory_format=torch.channels_last), "a.bias": torch.randn(3)}
MOMENTUM = {"a.weight": torch.randn(3, 4, 5, 5), "a.bias": torch.randn(3)}


def save(run: Path, step: int) -> Path:
    run.mkdir(exist_ok=True)
    state = {**checkpoint.START, "step": step, "sums": [0.1 + step, 2.0, 3.0]}
    checkpoint.save(run, step, MODEL, MOMENTUM, config=CONFIG, classes=["é", "b"], state=state)
    return run / "checkpoints" / f"step-{step:08d}"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path):
    save(tmp_path / "run", 7)
    found = checkpoint.load(checkpoint.find(tmp_path / "run", "last"))
    assert (found.config, found.classes, found.state["sums"]) == (CONFIG, ["é", "b"], [7.1, 2.0, 3.0])
    assert found.run == tmp_path / "run"
    for stored, given in ((found.model, MODEL), (found.momentum, MOMENTUM)):
        assert set(stored) == set(given)
        assert all(torch.equal(stored[key], given[key]) for key in given)


def test_kept_are_the_last_the_one_before_and_the_best(tmp_path: Path):
    for step in range(1, 6):
        save(tmp_path, step)
        if step == 2:
            checkpoint.point(tmp_path, "best", "step-00000002")
    assert names(tmp_path) == ["best", "last", "step-00000002", "step-00000004", "step-00000005"]
    assert checkpoint.find(tmp_path, "best", "last").name == "step-00000002"
    assert checkpoint.find(tmp_path, "last").name == "step-00000005"
    assert checkpoint.find(tmp_path / "checkpoints" / "step-00000004", "last").name == "step-00000004"
    assert checkpoint.find(tmp_path / "checkpoints" / "last", "last").name == "step-00000005"


def test_the_newest_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.train.test_checkpoint.CONFIG", dataclasses.replace(CONFIG, keep_checkpoints=3))
    for step in range(1, 6):
        save(tmp_path, step)
    assert names(tmp_path) == ["last", "step-00000003", "step-00000004", "step-00000005"]
    checkpoint.point(tmp_path, "last", "step-00000003")  # where a resumed run goes on from
    save(tmp_path, 6)
    assert names(tmp_path) == ["last", "step-00000003", "step-00000005", "step-00000006"]


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(tmp_path: Path):
    assert checkpoint.newest_whole(tmp_path) is None
    folders = [save(tmp_path, step) for step in (1, 2)]
    assert checkpoint.newest_whole(tmp_path) == folders[1]
    _flip(folders[1] / "model.safetensors", 200)
    assert checkpoint.newest_whole(tmp_path) == folders[0]


def _start(saver: checkpoint.Saver, step: int, model: dict[str, torch.Tensor]) -> None:
    state = {**checkpoint.START, "step": step}
    saver.start(model, {}, config=CONFIG, classes=["a"], state=state)
    state["step"] = 100  # the run goes on; what is saved does not


def test_a_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    go_on = threading.Event()
    save_file = checkpoint.save_file

    def slow(*args: object, **options: object) -> None:
        assert go_on.wait(60)
        save_file(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver, weight = checkpoint.Saver(tmp_path), torch.ones(3)
    _start(saver, 1, {"a": weight})
    assert not (tmp_path / "checkpoints" / "last").exists()
    weight.zero_()
    go_on.set()
    saver.finish()
    found = checkpoint.load(checkpoint.find(tmp_path, "last"))
    assert (found.model["a"].tolist(), found.state["step"]) == ([1.0, 1.0, 1.0], 1)


def test_an_error_of_a_save_is_raised_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = checkpoint.Saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        _start(saver, 1, MODEL)
        with pytest.raises(RunError, match="No space left on device"):
            saver.finish()
    _start(saver, 2, MODEL)
    _start(saver, 3, MODEL)
    saver.finish()
    assert names(tmp_path) == ["last", "step-00000002", "step-00000003"]


def _flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def _edit(path: Path, change) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


FAULTS = {
    "weights truncated": lambda path: os.truncate(path / "model.safetensors", 100),
    "a bit of a weight": lambda path: _flip(path / "model.safetensors", -5),
    "a bit of the momentum": lambda path: _flip(path / "optimizer.safetensors", -5),
    "a bit of the header": lambda path: _flip(path / "model.safetensors", 10),
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "weights empty": lambda path: (path / "model.safetensors").write_bytes(b""),
    "state missing": lambda path: (path / "state.json").unlink(),
    "state truncated": lambda path: os.truncate(path / "state.json", 300),
    "state not JSON": lambda path: (path / "state.json").write_bytes(b"\x80\x04]\xff"),
    "state a list": lambda path: (path / "state.json").write_text("[]"),
    "state edited": lambda path: _edit(path / "state.json", lambda record: record["state"].update(step=9)),
    "a key missing": lambda path: _edit(path / "state.json", lambda record: record.pop("config")),
    "no files listed": lambda path: _edit(path / "state.json", lambda record: record.pop("files")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_one_is_named_on_one_line_with_the_one_that_is_whole(tmp_path: Path, fault: str):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    FAULTS[fault](bad)
    with pytest.raises(InputError) as caught:
        checkpoint.load(checkpoint.find(tmp_path, "last"))
    said = str(caught.value)
    assert said.startswith(f"{bad}: damaged checkpoint: ")
    assert said.endswith(f"; {good} is whole")
    assert "\n" not in said
    assert checkpoint.load(good).state["step"] == 1


@pytest.mark.parametrize("key", ["classes", "metrics_bytes"])
def test_keys_that_are_missing_though_hashes_agree(tmp_path: Path, key: str):
    """A file from another program, or another version."""
    path = save(tmp_path, 1)
    record = json.loads((path / "state.json").read_text())
    record.pop(key, None)
    record["state"].pop(key, None)
    del record["sha256"]
    record["sha256"] = record_sha256(record)
    (path / "state.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"damaged checkpoint: .*{key}"):
        checkpoint.load(path)


def _resealed(path: Path, **changes: object) -> Path:
    """The checkpoint with other values in state.json, and the right hash over them."""
    record = json.loads((path / "state.json").read_text())
    del record["sha256"]
    for name, value in changes.items():
        *parents, key = name.split("__")
        part = record
        for parent in parents:
            part = part[parent]
        part[key] = value
    record["files"] |= {file: file_sha256(path / file) for file in checkpoint.TENSORS}
    (path / "state.json").write_text(json.dumps({**record, "sha256": record_sha256(record)}))
    return path


WRONG = {
    "config: --num-classes: DATA has 3 classes, got 2": {"config__num_classes": 2, "classes": ["a", "b", "c"]},
    "config: seed: expected from 0": {"config__seed": -1},
    "config: std[2]: expected from": {"config__std": [1, 1, 0]},
    "config: mean[0]: expected a number, got 'a'": {"config__mean": ["a", 0, 0]},
    "config: --variant: unknown variant 'x'": {"config__variant": "x"},
    "config: expected an object": {"config": []},
    "classes: expected at least 1 entries, got 0": {"classes": []},
    "classes[0]: expected text, got 1": {"classes": [1, 2]},
    "state: step: expected from 0": {"state__step": -1},
    "state: sums: expected 3 entries, got 1": {"state__sums": [1]},
    "state: sums[1]: expected a finite number": {"state__sums": [0, float("nan"), 0]},
    "state: best: expected an object": {"state__best": 3},
    "state: unknown 'other'": {"state__other": 1},
    "state: plateau: without cuts": {"state__plateau": {"best": None, "stale": 0}},
    "format 2; this version reads 1": {"format": 2},
}


@pytest.mark.parametrize("said", WRONG)
def test_wrong_content_under_a_right_hash_is_named(tmp_path: Path, said: str):
    path = _resealed(save(tmp_path, 1), **WRONG[said])
    with pytest.raises(InputError) as caught:
        checkpoint.load(path)
    said = said.replace("config: --", "--")
    assert str(caught.value).startswith(f"{path}: damaged checkpoint: ")
    assert said in str(caught.value)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Conv2d(4, 3, 5)


@pytest.mark.parametrize(
    ("file", "tensors", "said"),
    [
        ("model", {"a.weight": MODEL["a.weight"]}, "without a.bias"),
        ("model", {**MODEL, "b": torch.ones(2)}, "b is not in the net"),
        ("model", {**MODEL, "a.bias": torch.ones(())}, r"a\.bias is F32 \[\], the net's is F32 \[3\]"),
        ("model", {**MODEL, "a.bias": torch.ones(3, dtype=torch.int64)}, r"a\.bias is I64 \[3\]"),
        ("model", {**MODEL, "a.bias": torch.full((3,), torch.nan)}, "a.bias has numbers that are not finite"),
        ("optimizer", {"a.weight": torch.ones(1)}, r"optimizer.*a\.weight is F32 \[1\]"),
        ("optimizer", {"a.weight": MOMENTUM["a.weight"]}, r"optimizer.*without a\.bias"),
        ("optimizer", {**MOMENTUM, "exp_avg:a.bias": torch.ones(3)}, "exp_avg:a.bias is not in the net"),
        ("optimizer", {**MOMENTUM, "a.bias": torch.full((3,), torch.inf)}, "a.bias has numbers that are not finite"),
    ],
)
def test_tensors_that_are_not_the_nets_are_named(tmp_path: Path, file: str, tensors: dict, said: str):
    path = save(tmp_path, 1)
    checkpoint.load(path).read(Net())
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / f"{file}.safetensors")
    found = checkpoint.load(_resealed(path))
    with pytest.raises(InputError, match=said):
        found.read(Net())


@pytest.mark.parametrize(
    ("numbers", "said"), [(2**26, r"a\.weight is F32 \[67108864\]"), (2**38, "unable to mmap 1099511627")]
)
def test_a_file_that_claims_gigabytes_is_refused_before_they_are_allocated(tmp_path: Path, numbers: int, said: str):
    path = save(tmp_path, 1)
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, 4 * numbers]}}).encode()
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * numbers)  # sparse: it takes no room
    with pytest.raises(InputError, match=said):
        checkpoint.load(path, verify=False).read(Net())


@pytest.mark.parametrize("step", ["save_file", "_flush", "os.rename", "os.replace"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str):
    save(tmp_path, 1)
    before = names(tmp_path)

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"alexnet_fast.train.checkpoint.{step}", full)
        with pytest.raises(RunError, match=r"cannot save .*No space left on device; earlier checkpoints are untouched"):
            save(tmp_path, 2)
    assert checkpoint.load(checkpoint.find(tmp_path, "last")).state["step"] == 1
    assert [name for name in names(tmp_path) if name != "step-00000002"] == before
    save(tmp_path, 3)
    assert checkpoint.load(checkpoint.find(tmp_path, "last")).state["step"] == 3


@pytest.mark.parametrize("call", range(13))
def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, call: int):
    """The process ends, without any clean-up, at its call-th call that touches the disk."""
    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        count = 0

        def dying(function):
            def run(*args, **kwargs):
                nonlocal count
                count += 1
                if count > call:
                    os._exit(9)
                return function(*args, **kwargs)

            return run

        for name in ("fsync", "rename", "replace", "open"):
            setattr(os, name, dying(getattr(os, name)))
        save(tmp_path, 2)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended == (9 if call < 12 else 0)  # 12 such calls make a save: the cases above reach every one of them
    assert checkpoint.load(checkpoint.find(tmp_path, "last")).state["step"] in (1, 2)
    save(tmp_path, 3)
    assert not any(name.startswith(".") for name in names(tmp_path))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for target in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load"):
        monkeypatch.setattr(target, lambda *_, target=target, **__: pytest.fail(f"{target} was called"))
    assert isinstance(pickle.dumps(1), bytes)  # the module itself still works
    checkpoint.load(save(tmp_path, 1))
    sources = Path(checkpoint.__file__).parents[1]
    for path in [path for part in ("train", "data", "parallel") for path in (sources / part).glob("*.py")]:
        assert not re.search(r"\bpickle\b|torch\.load|all_gather_object|np\.load|allow_pickle", path.read_text()), path


def test_no_checkpoint_is_said_plainly(tmp_path: Path):
    for path in (tmp_path, tmp_path / "missing", tmp_path / "checkpoints" / "step-00000003"):
        with pytest.raises(InputError, match="no checkpoint there"):
            checkpoint.find(path, "best", "last")
