"""A thousand inputs that nobody wrote with care: options, configuration files, checkpoints, prepared data, metrics and
damaged bytes. Each ends with exit code 0, 1 or 2 and at most one line on standard error; an exception is a failure.

The draws are seeded; ``--soak`` makes ten times as many. Nothing is trained: runs are asked for with ``--dry-run``.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.main import get_command

from alexnet_fast import cli
from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.data.prepare import prepare
from alexnet_fast.models import AlexNet_Weights
from alexnet_fast.train import checkpoint
from alexnet_fast.train.config import CHOICES, HINTS, resolve
from tests.data.pictures import write_fashion, write_folder

OTHER_COMMANDS = (
    *("eval", "predict", "features", "explain", "export", "shrink", "quantize"),
    *("prepare", "curves", "report", "bench"),
)
COUNTS = {
    "train": 350,
    "other commands": 200,
    "--config": 130,
    "--resume": 140,
    "prepared": 80,
    "curves": 70,
    "bytes": 80,
}
NUMBERS = [None, True, False, -1, 0, 1, 2, 63, 10**6, 2**31, 2**63, 10**40, -(10**40), 0.5, -0.5, 1e-300, 1e308]
NUMBERS += [math.nan, math.inf, -math.inf]
TEXTS = [
    "",
    " ",
    "a",
    "0",
    "-1",
    "nan",
    "\0",
    "\x1b]0;title\x07",
    "é\udce9",
    "../..",
    "a" * 5000,
    "%s{0}[bold]",
    "1e999",
]
VALUES = [*NUMBERS, *TEXTS, [], {}, [[]], [1.0] * 3, [1.0] * 8, ["a", 0, 0], {"a": 1}, [None]]
WORDS = [text.replace("\0", "?") for text in TEXTS]  # an argument of a process cannot hold a zero
WORDS += ["1,2,3", "0.5,0.5,0.5", ",", "1,,2", "1" * 5000, *(f"{n}" for n in NUMBERS if n is not None)]


COMMAND = get_command(cli.app)


class Place:
    """Folders that inputs are made from, and a copy of them that one input may spoil."""

    def __init__(self, root: Path) -> None:
        self.root, self.kept, self.work = root, root / "kept", root / "work"
        self.kept.mkdir()
        write_folder(self.kept / "folder", 2, 1)
        write_fashion(self.kept / "idx", 20, 10)
        prepare(self.kept / "folder", self.kept / "shards", size=64, workers=1)
        config = resolve({"data": f"fashion-mnist:{self.work / 'idx'}", "out": str(self.work / "run")}, 10)
        (self.kept / "run").mkdir()
        tensors = {"features.0.weight": torch.zeros(2)}
        state = {**checkpoint.START, "sizes": {"train": 20, "val": 10}}
        classes = list(map(str, range(10)))
        checkpoint.save(self.kept / "run", 0, tensors, tensors, config=config, classes=classes, state=state)
        rows = [{"kind": "step", "step": 1, "loss": 1.0, "top1": 0.5, "lr": 0.1}]
        rows += [{"kind": "epoch", "step": 1, "val_loss": 1.0, "val_top1": 0.5}]
        (self.kept / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        torch.save(tensors, self.kept / "net.pth")
        save_file(tensors, self.kept / "net.safetensors")
        (self.kept / "net.onnx").write_bytes(b"\x08\x0a" + bytes(range(256)))

    def fresh(self) -> Path:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept, self.work, symlinks=True)
        return self.work


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def ends_well(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """ends_well("train", …): the command's exit code, having looked at what it said."""
    monkeypatch.setattr("alexnet_fast.train.report.draw_runs", lambda runs, path: None)  # takes a second
    monkeypatch.setattr(
        cli, "app", COMMAND
    )  # made once: typer would make it anew for each input, at a tenth of a second

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["alexnet-fast", *map(str, words)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code or 0
        assert code in (0, 1, 2), words
        assert err.getvalue().count("\n") == (code != 0), err.getvalue()
        assert "\x1b]" not in out.getvalue() + err.getvalue(), words
        return code

    return run


def draws(kind: str, config: pytest.Config) -> Iterator[random.Random]:
    for number in range(COUNTS[kind] * (10 if config.getoption("--soak") else 1)):
        yield random.Random(f"{kind} {number}")


def options_of(command: str) -> list[tuple[str, bool]]:
    """Each option of a command, and whether it takes a value."""
    parameters = COMMAND.commands[command].params
    return [
        (name, not parameter.is_flag)
        for parameter in parameters
        if parameter.param_type_name == "option"
        for name in (*parameter.opts, *parameter.secondary_opts)
    ]


def drawn_options(draw: random.Random, command: str, work: Path) -> list[str]:
    """One to three options, some with values of their kind, most without."""
    known = [*sorted({word for choices in CHOICES.values() for word in choices}), *AlexNet_Weights.__members__]
    files = [str(path) for path in (work, *sorted(work.iterdir()))]
    words: list[str] = []
    for name, valued in draw.sample(options_of(command), draw.randint(1, 3)):
        if name not in ("--help", "-h", "--seeds"):
            words += [name, draw.choice(draw.choice([WORDS, known, files]))] if valued else [name]
    return [word for word in words if "DEFAULT" not in word and "IMAGENET" not in word]  # nothing is downloaded


def mutated(draw: random.Random, value: Any) -> Any:
    """``value`` with one place of it changed, removed or added to."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {name: inner for name, inner in value.items() if name != key}
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(draw, value[at]), *value[at + 1 :]]
    return copy.deepcopy(draw.choice(VALUES))


def sealed(record: Any) -> str:
    """JSON with the sha256 of itself, as what the package wrote."""
    if isinstance(record, dict):
        record = {name: value for name, value in record.items() if name != "sha256"}
        record = {**record, "sha256": record_sha256(record)}
    return json.dumps(record)


def damaged(draw: random.Random, content: bytes) -> bytes:
    how = draw.randrange(4)
    if how == 0:
        return content[: draw.randrange(len(content) + 1)]
    if how == 1:
        return draw.choice([b"", b"[" * 100_000, b"\0" * len(content), b"1" * 5000, b'{"a":' * 50_000, b"\xff\xfe"])
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def test_options_of_train(place: Place, ends_well, pytestconfig: pytest.Config):
    work = place.fresh()
    for draw in draws("train", pytestconfig):
        data = draw.choice([work / "folder", f"fashion-mnist:{work / 'idx'}", work / "shards", draw.choice(WORDS)])
        ends_well("train", *drawn_options(draw, "train", work), "--dry-run", "--", data)


def test_options_of_other_commands(place: Place, ends_well, pytestconfig: pytest.Config):
    for draw in draws("other commands", pytestconfig):
        work = place.fresh()
        name = draw.choice([*OTHER_COMMANDS, draw.choice(WORDS)])
        if name not in OTHER_COMMANDS:
            ends_well(name, draw.choice(WORDS))
            continue
        words = drawn_options(draw, name, work)
        # The net of a run is made at the price of a second, and measuring takes a minute: these stay out.
        places = {"eval": [work / "folder"], "predict": [work / "net.pth"], "curves": [work / "run"], "bench": []}
        places |= {"report": [work / draw.choice(["run", "folder", "new"])]}
        places |= {used: [work / draw.choice(["run", "net.pth", "folder"])] for used in ("shrink", "quantize")}
        places |= {used: [work / draw.choice(["net.pth", "shards", "none"])] for used in ("features", "explain")}
        places |= {"prepare": [work / "folder", work / draw.choice(["new", "shards", "run", "folder/train"])]}
        fixed = {"bench": ["--plan"], "curves": ["--out", work / "x.png"]}
        weights = draw.choice([*WORDS, work / "net.pth", work / "net.onnx"])
        fixed |= {used: ["--weights", weights] for used in ("predict", "features", "explain")}
        fixed["features"] += ["--layer", draw.choice(["fc7", *WORDS]), "--out", work / draw.choice(["x.npz", "run"])]
        fixed["export"] = ["--format", draw.choice(["onnx", "pt2", "aoti", *WORDS])]
        fixed["shrink"] = ["--out", work / draw.choice(["new", "run", "folder/train/cat/000.jpg/x"])]
        places["export"] = [weights]
        ends_well(name, *words, *fixed.get(name, ()), "--", *places[name])


def test_configuration_files(place: Place, ends_well, pytestconfig: pytest.Config):
    work = place.fresh()
    whole = resolve({"data": str(work / "folder"), "out": str(work / "new")}, 2).to_json()
    for draw in draws("--config", pytestconfig):
        record: Any = {name: value for name, value in whole.items() if draw.random() < 0.5 or name in ("data", "out")}
        for _ in range(draw.randint(1, 3)):
            record = mutated(draw, record)
        if isinstance(record, dict) and draw.random() < 0.3:
            record[draw.choice([*HINTS, *TEXTS])] = copy.deepcopy(draw.choice(VALUES))
        (work / "config.json").write_text(json.dumps(record))
        ends_well("train", "--config", work / "config.json", "--dry-run")


def test_checkpoints_under_right_hashes(place: Place, ends_well, pytestconfig: pytest.Config):
    state = place.work / "run" / "checkpoints" / "step-00000000" / "state.json"
    for draw in draws("--resume", pytestconfig):
        place.fresh()
        record = mutated(draw, json.loads(state.read_text()))
        state.write_text(sealed(record))
        assert ends_well("train", "--resume", place.work / "run", "--dry-run") == 2  # the tensors are no net's


def test_prepared_data_under_right_hashes(place: Place, ends_well, pytestconfig: pytest.Config):
    for draw in draws("prepared", pytestconfig):
        work = place.fresh()
        index, listed = work / "shards" / "index.json", work / "shards" / "train" / "00000.json"
        record = json.loads(index.read_text())
        if draw.random() < 0.4:
            listed.write_text(json.dumps(mutated(draw, json.loads(listed.read_text()))))
            record["shards"]["train"][0]["sha256"]["json"] = file_sha256(listed)
        else:
            record = mutated(draw, record)
        index.write_text(sealed(record))
        ends_well("train", work / "shards", "--image-size", "63", "--dry-run", "--out", work / "new")
        ends_well("prepare", "--check", work / "shards")


def test_metrics(place: Place, ends_well, pytestconfig: pytest.Config):
    work = place.fresh()
    path = work / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for draw in draws("curves", pytestconfig):
        changed = [json.dumps(mutated(draw, json.loads(line))) if draw.random() < 0.7 else line for line in lines]
        content = "\n".join(changed).encode() + b"\n"
        path.write_bytes(damaged(draw, content) if draw.random() < 0.3 else content)
        ends_well("curves", work / "run", "--out", work / "x.png")
        assert ends_well("report", work / "run", "--out", work / "x.html") == 2  # its tensors are no net's


def test_damaged_bytes(place: Place, ends_well, pytestconfig: pytest.Config):
    for draw in draws("bytes", pytestconfig):
        work = place.fresh()
        files = [path for path in sorted(work.rglob("*")) if path.is_file() and not path.is_symlink()]
        path = draw.choice(files)
        path.write_bytes(damaged(draw, path.read_bytes()))
        name = str(path.relative_to(work))
        if name.startswith("run"):
            ends_well("train", "--resume", work / "run", "--dry-run")
        elif name.startswith("net"):
            assert ends_well("train", work / "folder", "--weights", path, "--dry-run") == 2
        else:
            data = f"fashion-mnist:{work / 'idx'}" if name.startswith("idx") else work / name.partition("/")[0]
            ends_well("train", data, "--dry-run", "--out", work / "new")
