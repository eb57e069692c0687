"""The command: what it prints, the code it ends with, and one line for each thing that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_fast import __version__, backends, cli
from alexnet_fast.models import VARIANTS
from alexnet_fast.train import checkpoint
from alexnet_fast.train.config import resolve
from tests.data.pictures import write_fashion, write_folder
from tests.train.test_export import foreign_onnx


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """command("train", "digits", ...) runs alexnet-fast in this process."""

    def run(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["alexnet-fast", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"fashion-mnist:{write_fashion(tmp_path_factory.mktemp('data'), train=20, val=11)}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, small_set: str):
    """Two steps of the real net in a process of its own, as a user starts it. Each checkpoint takes half a gigabyte."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = [*("train", small_set), *("-b", 4), *("--epochs", 3), *("--max-steps", 2), *("--out", run)]
    ended = subprocess.run(
        [sys.executable, "-m", "alexnet_fast", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    assert ended.returncode == 0, ended.stderr
    yield run, ended
    shutil.rmtree(run)


# ------------------------------------------------------------------------------------------------------ what it can do


def test_train_writes_what_it_says(trained: tuple[Path, subprocess.CompletedProcess]):
    run, ended = trained
    assert ended.stderr == ""
    assert "20 training and 11 held-out images of 10 classes" in ended.stdout
    assert "held-out accuracy" in ended.stdout
    assert "\x1b" not in ended.stdout  # no bars where there is no terminal
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds[-1] == "stop"
    config = json.loads((run / "config.json").read_text())
    assert (config["variant"], config["batch_size"], config["max_steps"]) == ("torchvision", 4, 2)
    assert sum(p.numel() for p in checkpoint.load(run / "checkpoints" / "last").model.values()) == 57_044_810
    assert (run / "conv1.png").exists()


def test_eval_prints_exact_counts(trained: tuple[Path, subprocess.CompletedProcess], command):
    run, _ = trained
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    ended = command("eval", run, "--json", "--batch-size", 5)
    assert ended.code == 0
    record = json.loads(ended.out)
    assert (record["count"], record["step"], record["bad_files"]) == (11, 2, {})
    assert record["top1"] == last["val_top1"]
    assert record["loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    printed = command("eval", run / "checkpoints" / "last").out
    assert f"{record['top1']:.2%}" in printed
    assert f"checkpoint {record['checkpoint']}\n" in printed  # whole, on a line of its own, whatever the width


def test_predict_names_classes_with_probabilities(trained: tuple[Path, subprocess.CompletedProcess], command, tmp_path):
    run, _ = trained
    paths = [tmp_path / "grey.png", tmp_path / "colour.jpg"]
    Image.fromarray(np.full((9, 30), 90, np.uint8)).save(paths[0])
    Image.new("RGB", (40, 20), (10, 200, 30)).save(paths[1])
    ended = command("predict", *paths, "--weights", run, "--top", 3, "--json")
    assert ended.code == 0
    predictions = json.loads(ended.out)
    assert [prediction["path"] for prediction in predictions] == list(map(str, paths))
    names = checkpoint.load(run / "checkpoints" / "last").classes
    for prediction in predictions:
        odds = [row["probability"] for row in prediction["classes"]]
        assert odds == sorted(odds, reverse=True)
        assert len(odds) == 3
        assert all(row["name"] in names for row in prediction["classes"])
    whole = json.loads(command("predict", paths[0], "--weights", run, "--top", 99, "--json").out)
    assert sum(row["probability"] for row in whole[0]["classes"]) == pytest.approx(1)
    assert f"{odds[0]:.2%}" in command("predict", paths[1], "--weights", run).out


def test_predict_names_files_that_are_no_pictures(trained: tuple[Path, subprocess.CompletedProcess], command, tmp_path):
    run, _ = trained
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (40, 20)).save(good)
    bad.write_text("no picture")
    ended = command("predict", bad, good, "--weights", run, "--json")
    assert ended.code == 2
    assert [row["path"] for row in json.loads(ended.out)] == [str(good)]
    assert ended.err.startswith(f"error: 1 of 2 images could not be read: {bad}: not an image")
    assert ended.err.count("\n") == 1
    assert command("predict", bad, "--weights", run).out == ""  # and no table without a row


def test_transfer_learning_replaces_the_head_and_freezes_features(
    trained: tuple[Path, subprocess.CompletedProcess], command, tmp_path: Path
):
    run, _ = trained
    pictures = write_folder(tmp_path / "set", train=2, val=1)
    weights = run / "checkpoints" / "last"
    words = ("--weights", weights, "--freeze-features", "--image-size", 64, "-b", 4, "--max-steps", 1, "-j", 0)
    assert command("train", pictures, "--out", tmp_path / "run", *words).code == 0
    before, after = checkpoint.load(weights.resolve()), checkpoint.load(checkpoint.find(tmp_path / "run", "last"))
    assert after.model["classifier.6.weight"].shape == (2, 4096)
    for key, value in before.model.items():
        assert torch.equal(after.model[key], value) == key.startswith("features."), key
    shutil.rmtree(tmp_path / "run")


def test_version(command):
    assert command("--version") == (0, f"alexnet-fast {__version__}\n", "")


def test_doctor_says_which_backends_work_and_why_others_do_not(command):
    ended = command("doctor", "--json")
    assert ended.code == 0
    record = json.loads(ended.out)
    assert record["facts"]["torch"] == torch.__version__
    assert list(record["backends"]) == ["reference", "cpu", "cuda", "triton"]
    assert record["backends"]["cpu"] == {"available": True, "reason": ""}
    for state in record["backends"].values():
        assert state["available"] == (state["reason"] == "")
    assert record["auto"] == backends.AUTO
    printed = command("doctor").out
    assert all(operator in printed for rows in backends.AUTO.values() for operator in rows)


# --------------------------------------------------------------------------------------------- what it cannot work with


def spoiled_run(folder: Path, spoil=lambda path: None, classes=tuple("0123456789"), **config: object) -> Path:
    """A run's folder with one checkpoint of a few numbers, then spoiled."""
    resolved = resolve({"data": "digits", "out": str(folder), **config}, len(classes))
    folder.mkdir(parents=True)
    tensors = {"features.0.weight": torch.zeros(2)}
    checkpoint.save(
        folder, 5, tensors, tensors, config=resolved, classes=list(classes), state={**checkpoint.START, "step": 5}
    )
    spoil(folder / "checkpoints" / "step-00000005")
    return folder


def _truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 9)


def _occupied(folder: Path) -> Path:
    folder.mkdir()
    (folder / "precious").write_text("do not touch")
    return folder


def _without_val_dog(root: Path) -> Path:
    shutil.rmtree(root / "val" / "dog")
    return root


def _too_many_bad(root: Path) -> Path:
    for path in (root / "train" / "dog").iterdir():
        path.write_text("no picture")
    return root


def _file(folder: Path) -> Path:
    (folder / "picture").touch()
    return folder / "picture"


def _damaged_metrics(folder: Path) -> Path:
    (folder / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 1, "loss": 1, "top1": 0, "lr": 1}\n\0\0\0')
    return folder


# What is typed, given a folder to make things in, and what the one line must say.
ROWS = {
    "unknown option": (lambda t: ["train", "--nope"], "No such option: --nope"),
    "a word for a number": (lambda t: ["train", "--epochs", "many"], "--epochs"),
    "unknown command": (lambda t: ["trian"], "No such command"),
    "no image to predict": (lambda t: ["predict", "--weights", "x"], "images"),
    "missing DATA": (lambda t: ["train", t / "missing"], "no such folder"),
    "a file for DATA": (lambda t: ["train", _file(t)], "picture: is a file (DATA is digits"),
    "eval misspelt": (
        lambda t: ["eval", "DEFUALT"],
        "no such run, checkpoint or file of weights; did you mean DEFAULT?",
    ),
    "check not prepared": (lambda t: ["prepare", "--check", t], "the command prepare did not write"),
    "bench of the plan": (lambda t: ["bench", "--link", 9], "--link: is for --plan"),
    "bench latency": (lambda t: ["bench", "--plan", "--latency", -5], "--latency: expected microseconds, 0 or more"),
    "empty DATA": (lambda t: ["train", t], "has no folder train/"),
    "class missing in val": (
        lambda t: ["train", _without_val_dog(write_folder(t / "set", 1, 1))],
        "class dog of train/ is missing",
    ),
    "fashion-mnist without files": (lambda t: ["train", f"fashion-mnist:{t}"], "no such file"),
    "image size too small": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--image-size", 40],
        f"takes at least {VARIANTS['torchvision'].min_image_size}, got 40",
    ),
    "no folder": (lambda t: ["train", write_folder(t / "set", 1, 1), "--out", ""], "--out: expected a folder, got ''"),
    "occupied folder": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--out", _occupied(t / "run")],
        "is not an empty folder",
    ),
    "output is a file": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--out", t / "set" / "train" / "cat" / "000.jpg"],
        "is not an empty folder",
    ),
    "unknown backend": (lambda t: ["train", "--backend", "tpu"], "known are auto, reference, cpu, cuda, triton"),
    "unknown variant": (lambda t: ["train", "--variant", "vgg"], f"known are {', '.join(VARIANTS)}"),
    "a variant that is nearly one": (lambda t: ["train", "--variant", "papr"], "did you mean paper?"),
    "no ranks": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--nproc", 0],
        "--nproc: expected from 1 to 1048576, got 0",
    ),
    "a number of forty digits": (lambda t: ["train", write_folder(t / "set", 1, 1), "--seed", 10**40], "--seed"),
    "a folder that cannot be": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--out", t / "set" / "train" / "cat" / "000.jpg" / "run"],
        "--out: cannot write",
    ),
    **{
        f"no {name}": (
            lambda t, name=name: ["train", write_folder(t / "set", 1, 1), f"--{name}", "--out", t / "run"],
            f"--{name}: needs {name}: pip install {name}",
        )
        for name in ("tensorboard", "wandb", "mlflow")
    },
    "shrink no run": (lambda t: ["shrink", t, "--svd", 3, "--out", t / "x"], "no checkpoint there"),
    "shrink by nothing": (lambda t: ["shrink", t, "--out", t / "x"], "expected --svd, --prune or --width"),
    "shrink into a run": (lambda t: ["shrink", t, "--svd", 3, "--out", _occupied(t / "run")], "is there already"),
    "quantize on no images": (lambda t: ["quantize", t, "--images", 0], "--images: expected a positive number, got 0"),
    "quantize weights into no folder": (lambda t: ["quantize", t, "--weight-only"], "--weight-only writes a run"),
    "quantize weights by images": (
        lambda t: ["quantize", t, "--weight-only", "--out", "x", "--images", "9"],
        "--images: is for activations",
    ),
    "quantize weights over a file": (
        lambda t: ["quantize", t, "--weight-only", "--out", "x", "--overwrite"],
        "--overwrite: is for a file",
    ),
    "a net of no width": (lambda t: ["train", "--width", 0, "--out", t / "x"], "--width: expected a factor above 0"),
    "eval an ONNX file": (lambda t: ["eval", t / "x.onnx"], "x.onnx: an ONNX file is for predict; name the run"),
    "features of an ONNX file": (
        lambda t: ["features", "a.png", "--weights", t / "x.onnx", "--layer", "fc7", "--out", t / "x.npz"],
        "x.onnx: an ONNX file is for predict; name the run",
    ),
    "quantize into a folder": (lambda t: ["quantize", t, "--out", t], "--out: expected a file that ends in .onnx"),
    "curves of a damaged run": (lambda t: ["curves", _damaged_metrics(t)], "metrics.jsonl: line 2: not JSON"),
    "curves into a folder": (lambda t: ["curves", t, "--out", t], "--out: expected a file named ."),
    "curves in an unknown format": (lambda t: ["curves", t, "--out", t / "x.zzz"], "--out: expected a file named"),
    "curves where there is no folder": (
        lambda t: ["curves", t, "--out", _occupied(t / "run") / "precious" / "x.png"],
        "--out: cannot write",
    ),
    "far more ranks than cores": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--nproc", 8 * len(os.sched_getaffinity(0)) + 1],
        "at most 8 a core can be started",
    ),
    "far more loaders than cores": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "-j", 1024, "--nproc", len(os.sched_getaffinity(0))],
        "at most 64 a core can be started",
    ),
    "five thousand loaders": (lambda t: ["train", write_folder(t / "set", 1, 1), "-j", 5000], "--workers: expected"),
    "unknown weights": (
        lambda t: ["train", write_folder(t / "set", 1, 1), "--weights", t / "none.safetensors"],
        "--weights: no file",
    ),
    "resume without a checkpoint": (lambda t: ["train", "--resume", t], "no checkpoint there"),
    "resume a damaged one": (lambda t: ["train", "--resume", spoiled_run(t / "run", _truncate)], "damaged checkpoint"),
    "resume another variant's": (
        lambda t: ["train", "--resume", spoiled_run(t / "run"), "--variant", "paper"],
        "the run has --variant torchvision, got paper",
    ),
    "resume with other classes": (
        lambda t: ["train", "--resume", spoiled_run(t / "run"), "--num-classes", 12],
        "the run has --num-classes 10, got 12",
    ),
    "resume into another folder": (
        lambda t: ["train", "--resume", spoiled_run(t / "run"), "--out", t / "other"],
        "goes on in its own folder",
    ),
    "eval without a checkpoint": (lambda t: ["eval", t], "no checkpoint there"),
    "eval a damaged one": (lambda t: ["eval", spoiled_run(t / "run", _truncate)], "damaged checkpoint"),
    "eval with no ranks": (
        lambda t: ["eval", spoiled_run(t / "run"), "--nproc", 0],
        "--nproc: expected from 1 to 1048576, got 0",
    ),
    "eval on other classes": (
        lambda t: ["eval", spoiled_run(t / "run"), write_folder(t / "set", 1, 1)],
        "its 2 classes are not the 10",
    ),
    "predict with an ONNX file of others": (
        lambda t: ["predict", "a.png", "--weights", foreign_onnx(t / "other.onnx")],
        "was not written by alexnet-fast export",
    ),
    "export in an unknown format": (
        lambda t: ["export", spoiled_run(t / "run"), "--format", "tflite"],
        "--format: expected one of onnx, pt2, aoti, got 'tflite'",
    ),
    "export over what is there": (
        lambda t: ["export", spoiled_run(t / "run"), "--format", "onnx", "--out", foreign_onnx(t / "other.onnx")],
        "is there already (--overwrite replaces it)",
    ),
    "export of a damaged one": (
        lambda t: ["export", spoiled_run(t / "run", _truncate), "--format", "pt2", "--out", t / "net.pt2"],
        "damaged checkpoint",
    ),
    "explain nothing": (lambda t: ["explain", "--weights", spoiled_run(t / "run")], "IMAGES: expected one picture"),
    "explain an unknown class": (
        lambda t: ["explain", "a.png", "--weights", spoiled_run(t / "run"), "--class", "cat", "--out", t / "x.png"],
        "knows no class 'cat'; it knows 0, 1, 2",
    ),
    "predict with a damaged one": (
        lambda t: ["predict", "a.png", "--weights", spoiled_run(t / "run", _truncate)],
        "damaged checkpoint",
    ),
}


def everything(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("row", ROWS)
def test_bad_input_gets_one_line_and_nothing_is_written_or_lost(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str
):
    if row.startswith("no ") and row[3:] in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if "ONNX" in row:
        pytest.importorskip("onnxruntime", reason="the extra bench brings it")
    if row.startswith(("curves ", "explain ")):
        pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    words, said = ROWS[row]
    words = words(tmp_path)
    monkeypatch.chdir(tmp_path)  # where runs/ would appear
    before = everything(tmp_path)
    ended = command(*words)
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert ended.out == ""
    assert everything(tmp_path) == before


def test_a_net_larger_than_the_memory_is_refused(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 16)  # 4 GiB, in pages of 64 KiB
    ended = command(
        "train", write_folder(tmp_path / "set", 1, 1), "--num-classes", 1_000_000, "--out", tmp_path / "run"
    )
    assert ended.code == 2
    assert "GB of weights, gradients and momentum, and this machine has 4.3 GB" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_want_of_memory_is_one_line(command, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("alexnet_fast.train.train", raises)
    ended = command("train")
    assert (ended.code, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("error: out of memory")
    monkeypatch.setattr("alexnet_fast.train.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command("train")


def test_more_ranks_than_gpus(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    data = write_folder(tmp_path / "set", 1, 1)
    ended = command("train", data, "--nproc", 2, "--out", tmp_path / "run")
    assert ended == (2, "", "error: 2 ranks, but torch sees 1 GPU(s) here (CUDA_VISIBLE_DEVICES= trains on the CPU)\n")
    assert not (tmp_path / "run").exists()


LAUNCHED = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "a"}, "RANK: expected a whole number from 0 to 1, got 'a'"),
        ({"RANK": "2"}, "RANK: expected a whole number from 0 to 1, got '2'"),
        ({"WORLD_SIZE": "b"}, "WORLD_SIZE: expected a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected a whole number from 1"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK: expected"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE: expected a whole number from 1 to 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: missing in the environment"),
        ({"MASTER_PORT": "x"}, "MASTER_PORT: expected a whole number from 1 to 65535"),
    ],
)
@pytest.mark.parametrize("name", ["train", "eval"])
def test_a_wrong_environment_of_ranks(command, tmp_path: Path, monkeypatch, changed: dict, said: str, name: str):
    for variable, value in {**LAUNCHED, **changed}.items():
        monkeypatch.setenv(variable, value)
    data = write_folder(tmp_path / "set", 1, 1)
    run = spoiled_run(tmp_path / "run", num_classes=2, image_size=64, transform="crop", classes=["cat", "dog"])
    words = ["train", data, "--out", tmp_path / "new"] if name == "train" else ["eval", run, data]
    ended = command(*words)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1)
    assert ended.err.startswith(f"error: {said}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_a_machines_ranks_one_says_what_is_wrong(command, monkeypatch: pytest.MonkeyPatch, rank: str, lines: int):
    for variable, value in {**LAUNCHED, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(variable, value)
    for words in (["train", "--nope"], ["train", "/missing"]):
        ended = command(*words)
        assert (ended.code, ended.err.count("\n")) == (2, lines)


@pytest.mark.parametrize(("words", "code"), [(["--version"], 0), (["--nope"], 2)])
@pytest.mark.parametrize("rank", [True, False])
def test_a_rank_that_a_launcher_started_leaves_python_as_it_is(tmp_path: Path, words: list, code: int, rank: bool):
    """DistributedDataParallel's threads outlive the process group, and are not to meet a finalized interpreter."""
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'finalized')\n")
    environment = {**os.environ, **(LAUNCHED if rank else {}), "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-m", "alexnet_fast", *words]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code
    assert ended.stdout + ended.stderr != ""
    assert ("finalized" in ended.stdout) is not rank


def test_an_instruction_set_that_is_not_there_is_one_line():
    words = [sys.executable, "-m", "alexnet_fast", "--version"]
    environment = {**os.environ, "ALEXNET_FAST_ISA": "mmx"}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    said = "error: ALEXNET_FAST_ISA=mmx: not built, or not on this processor\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", said)


def test_a_terminal_of_unknown_width(command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "0")
    out = command("bench", "--plan").out
    assert "towers" in out
    assert "…" not in out  # and in 80 columns no word is cut off


def test_ctrl_c_while_modules_are_imported_is_silent():
    words = [sys.executable, "-X", "importtime", "-m", "alexnet_fast", "doctor"]
    with subprocess.Popen(
        words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_hear
    ) as process:
        for line in process.stderr:
            if line.endswith("alexnet_fast.interrupt\n"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err


def _hear() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_too_many_bad_files_stop_the_run_with_one_line(command, tmp_path: Path, nproc: int):
    """The share is known once a batch is read, so the run has begun: it keeps a checkpoint to go on from."""
    data = _too_many_bad(write_folder(tmp_path / "set", 4, 1))
    words = ("--image-size", 64, "-b", 4, "-j", 0, "--nproc", nproc, "--out", tmp_path / "run")
    ended = command("train", data, *words)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "of 8 training files are unusable" in ended.err
    assert ended.out.count("bad file ") >= 1
    assert checkpoint.load(checkpoint.find(tmp_path / "run", "last")).state["step"] >= 1
    shutil.rmtree(tmp_path / "run")
