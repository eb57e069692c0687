"""What the loop of one process does with its steps, its sums and its faults."""

from __future__ import annotations

import builtins
import dataclasses
import fcntl
import io
import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from alexnet_fast import AlexNet, FusedSequential, tuning
from alexnet_fast.data import Transform, training_batches
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import checkpoint, commands
from alexnet_fast.train.config import resolve
from alexnet_fast.train.evaluate import Evaluation, fold_for
from alexnet_fast.train.report import Report
from tests.data.pictures import write_folder
from tests.train import runs


def test_it_learns_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    assert runs.train(run, epochs=4) == 0
    rows = runs.rows(run)
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    assert [row["step"] for row in steps] == list(range(1, 49))
    assert [(row["epoch"], row["step"], row["count"]) for row in epochs] == [(e, 12 * (e + 1), 31) for e in range(4)]
    assert epochs[-1]["val_top1"] > 0.9
    assert epochs[-1]["train_loss"] < 0.5 * epochs[0]["train_loss"]
    # The mean of an epoch weighs each image once: the last of its steps has nine, the others ten.
    first = [row["loss"] for row in steps[:12]]
    assert epochs[0]["train_loss"] == pytest.approx((10 * sum(first[:11]) + 9 * first[11]) / 119)
    best = max(epochs, key=lambda row: (row["val_top1"], -row["step"]))
    assert (run / "checkpoints" / "best").resolve().name == f"step-{best['step']:08d}"
    said = capsys.readouterr().out
    assert "119 training and 31 held-out images of 10 classes" in said
    assert "epoch 4/4  step 48/48  loss" in said
    assert f"held-out accuracy {epochs[-1]['val_top1']:.2%}" in said
    config = json.loads((run / "config.json").read_text())
    assert (config["lr"], config["seed"], config["about"]["training_images"]) == (0.01, 0, 119)


def test_pictures_show_what_they_claim(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    run = tmp_path / "run"
    assert runs.train(run, epochs=1) == 0
    assert Image.open(run / "curves.png").size == (1440, 432)
    sheet = np.asarray(Image.open(run / "conv1.png"))
    filters = sheet[-(8 * 12 * 4 + 4) :, : 1 * 12 * 4 + 4]  # 8 of 11x11 in one column, a white line between
    assert (sheet[: -len(filters)] < 128).any()  # what they are and their scale, in words
    weights = runs.tensors(run)["0.weight"]
    scaled = ((weights[5] / weights.abs().max() + 1) / 2 * 255).round().permute(1, 2, 0)
    shown = filters[5 * 48 + 4 : 6 * 48 : 4, 4:48:4]
    assert (shown == scaled.numpy().astype(np.uint8)).all()


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert runs.train(tmp_path / "run", epochs=3) == 0
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert not (tmp_path / "run" / "curves.png").exists()
    assert (tmp_path / "run" / "conv1.png").exists()


def test_the_bar_is_gone_before_the_summary(tmp_path: Path):
    screen = io.StringIO()
    config = resolve({"data": "digits", "out": str(tmp_path)}, 10)
    report = Report(config, Console(force_terminal=True, file=screen), step=0, steps=3, metrics_bytes=0)
    report.finished(Evaluation(1.0, 1, 1, 2), dict(checkpoint.START), 1.0, {}, {})
    report.close()
    assert "held-out accuracy 50.00%" in screen.getvalue()
    assert screen.getvalue().rfind("\x1b[2K") < screen.getvalue().find("held-out accuracy")  # the bar's line, erased
    assert report.bar.live.transient


@pytest.mark.parametrize(("classes", "told"), [(5, False), (6, True)])
def test_among_five_classes_the_first_five_are_not_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, classes: int, told: bool
):
    config = resolve({"data": "/pictures", "out": str(tmp_path)}, classes)
    report = Report(config, Console(), step=0, steps=3, metrics_bytes=0)
    row = {"epoch": 0, "step": 1, "val_loss": 1.0, "val_top1": 0.5, "val_top5": 1.0, "count": 4}
    report.evaluated("stop", row)
    report.close()
    assert ("top-5" in capsys.readouterr().out) == told


def test_a_set_smaller_than_the_batch_trains(tmp_path: Path):
    run = tmp_path / "run"
    assert runs.train(run, batch_size=500, epochs=3) == 0
    assert [row["step"] for row in runs.rows(run) if row["kind"] == "step"] == [1, 2, 3]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert runs.train(tmp_path / name, seed=seed, max_steps=5) == 0
    runs.assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(runs.tensors(tmp_path / "a")["0.weight"], runs.tensors(tmp_path / "c")["0.weight"])


@pytest.mark.parametrize("size", [10, 500])
def test_a_step_is_torchs_sgd_on_the_mean_over_the_batch(tmp_path: Path, size: int):
    """One step of the run against one written out here; 500 are more than the set's 119 images."""
    run = tmp_path / "run"
    assert runs.train(run, batch_size=size, max_steps=1, dropout=0.0, label_smoothing=0.1, warmup=0.0) == 0
    found = commands.checkpoint.load(commands.checkpoint.find(run, "last"))
    config, data = found.config, commands.open_run_data(found.config)
    transform = Transform(config.transform, config.image_size)
    options = {"seed": 0, "epoch": 0, "first": 0, "batch_size": size, "rank": 0, "world": 1, "workers": 0}
    batch = next(training_batches(data.train, transform, **options))
    net = runs.small_net(config)
    optimizer = torch.optim.SGD(net.parameters(), config.lr, momentum=0.9, weight_decay=config.weight_decay)
    nn.functional.cross_entropy(
        net((batch.images.float() / 255 - 0.5) / 0.5), batch.labels, label_smoothing=0.1
    ).backward()
    optimizer.step()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found.model[key], value)


def test_bf16_autocast_trains(tmp_path: Path):
    assert runs.train(tmp_path / "fp32", max_steps=5) == 0
    assert runs.train(tmp_path / "bf16", max_steps=5, precision="bf16") == 0
    one, other = (runs.tensors(tmp_path / name)["0.weight"] for name in ("fp32", "bf16"))
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0.1, atol=1e-3)


def test_max_steps_stops_evaluates_and_can_be_raised(tmp_path: Path, capsys: pytest.CaptureFixture):
    """No epoch has ended in the first run, so there is no best checkpoint, and the last line names none."""
    run = tmp_path / "run"
    assert runs.train(run, max_steps=5) == 0
    assert [row["kind"] for row in runs.rows(run)] == ["step"] * 5 + ["stop"]
    assert not (run / "checkpoints" / "best").exists()
    assert capsys.readouterr().out.endswith(f"{run}/conv1.png {run}/checkpoints/last\n")
    assert runs.train(run, resume=run, max_steps=14) == 0
    assert capsys.readouterr().out.endswith(f"{run}/checkpoints/best {run}/checkpoints/last\n")
    assert [row["kind"] for row in runs.rows(run)] == ["step"] * 12 + ["epoch"] + ["step"] * 2 + ["stop"]


@pytest.mark.parametrize("lr", [1e30, 1e39])  # the second step's loss overflows; the first step's weights do
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path, lr: float):
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"--lr or lengthen --warmup"):
        runs.train(run, lr=lr, warmup=0.0, checkpoint_steps=1, epochs=3)
    for folder in (run / "checkpoints").glob("step-*"):
        assert all(value.isfinite().all() for value in commands.checkpoint.load(folder).model.values())
    assert all(math.isfinite(row.get("loss", 0)) for row in runs.rows(run))


def test_noise_instead_of_data(tmp_path: Path):
    run = tmp_path / "run"
    given = {"synthetic": True, "num_classes": 7, "image_size": 64, "max_steps": 2, "batch_size": 8, "workers": 0}
    assert commands.train({**given, "out": str(run)}, None, runs.small_net) == 0
    assert runs.rows(run)[-1]["count"] == 1280


def test_tensorboard_logs_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    run = tmp_path / "run"
    assert runs.train(run, epochs=1, tensorboard=True) == 0
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert runs.train(tmp_path / "plain", max_steps=1) == 0
    assert not (tmp_path / "plain" / "tensorboard").exists()


# ----------------------------------------------------------------------------------------------------- what is taken up


@pytest.mark.parametrize("damage", ["gone", "cut", "a line"])
def test_a_run_goes_on_without_its_metrics(tmp_path: Path, capsys: pytest.CaptureFixture, damage: str):
    run = tmp_path / "run"
    assert runs.train(run, max_steps=5) == 0
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        lines[2] = lines[2][:5] if damage == "cut" else b"[]\n"
        path.write_bytes(b"".join(lines[: 3 if damage == "cut" else None]))
    capsys.readouterr()
    assert runs.train(run, resume=run, max_steps=8) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "metrics.jsonl" in said[0]
    assert [row["step"] for row in runs.rows(run)] == [*range(1, 1 if damage == "gone" else 3), 6, 7, 8, 8]


def _left_unsaved(tmp_path: Path) -> Path:
    """The folder of a run that was killed before its first checkpoint."""
    run = tmp_path / "run"
    assert runs.train(run, max_steps=1) == 0
    for path in run.iterdir():
        if path.name not in (".lock", "config.json", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (run / "checkpoints" / ".unfinished-step-00000000").mkdir(parents=True)
    return run


@pytest.mark.parametrize("how", ["resume", "out"])
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture, how: str
):
    run = _left_unsaved(tmp_path)
    capsys.readouterr()
    assert runs.train(run, resume=run if how == "resume" else None, max_steps=2) == 0
    assert f"anew   {run} was left before its first checkpoint" in capsys.readouterr().out
    assert [row["step"] for row in runs.rows(run)] == [1, 2, 2]


@pytest.mark.parametrize("content", ["[]", "{", '{"about": {}}', "[" * 100_000])
def test_an_unsaved_run_without_a_whole_configuration_is_named(tmp_path: Path, content: str):
    run = _left_unsaved(tmp_path)
    (run / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json: damaged: config\.json"):
        runs.train(run, resume=run)
    (run / "config.json").unlink()
    with pytest.raises(InputError, match="no checkpoint there"):
        runs.train(run, resume=run)


def test_a_checkpoint_is_there_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("alexnet_fast.train.engine.Trainer._step", dies)
        with pytest.raises(KeyboardInterrupt):
            runs.train(run, max_steps=3)
    assert (run / "checkpoints" / "last").resolve().name == "step-00000000"
    assert runs.train(run, resume=run) == 0
    assert runs.train(tmp_path / "whole", max_steps=3) == 0
    runs.assert_same_bits(run, tmp_path / "whole")


def test_each_resume_is_a_restart_also_from_one_checkpoint(tmp_path: Path):
    run = tmp_path / "run"
    assert runs.train(run, max_steps=2) == 0
    for restarts in (1, 2, 3):
        assert runs.train(run, resume=run) == 0
        assert json.loads((run / "summary.json").read_text())["restarts"] == restarts


def test_a_refused_resume_changes_nothing(tmp_path: Path):
    """While the run that holds the folder goes on."""
    run = tmp_path / "run"
    assert runs.train(run, max_steps=2) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with (run / ".lock").open("w") as file:
        ready, held = multiprocessing.Pipe()
        holder = multiprocessing.get_context("fork").Process(target=_hold, args=(file, ready, held))
        holder.start()
        assert ready.recv()
        with pytest.raises(InputError, match="another run is writing there"):
            runs.train(run, resume=run, max_steps=9)
        ready.close()
        holder.kill()
        holder.join()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def _hold(file, ready, held) -> None:
    fcntl.lockf(file, fcntl.LOCK_EX)
    ready.close()
    held.send(True)
    time.sleep(60)


# ------------------------------------------------------------------------------------------------------------ bad files


def _folder_run(tmp_path: Path, spoiled: int, part: str = "train", **given) -> Path:
    """A run over 40 pictures of which the first ``spoiled`` of one class are no pictures."""
    root = write_folder(tmp_path / "set", train=20, val=10)
    for path in sorted((root / part / "dog").iterdir())[:spoiled]:
        path.write_text("no picture")
    options = {**runs.GIVEN, "image_size": 64, "lr": 0.001, "epochs": 2, "data": str(root), **given}
    commands.train({**options, "out": str(tmp_path / "run")}, None, runs.small_net)
    return tmp_path / "run"


def test_few_bad_files_are_named_counted_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = _folder_run(tmp_path, 2)
    bad = [row for row in runs.rows(run) if row["kind"] == "bad file"]
    assert [Path(row["path"]).name for row in sorted(bad, key=lambda row: row["path"])] == ["000.jpg", "001.jpg"]
    assert all(row["set"] == "training" and "not an image" in row["reason"] for row in bad)
    said = capsys.readouterr().out
    assert said.count("bad file ") == 2
    assert "2 bad files were replaced" in said
    assert runs.rows(run)[-1]["count"] == 20


def test_a_bad_held_out_file_is_left_out_of_the_count(tmp_path: Path):
    run = _folder_run(tmp_path, 1, "val")
    assert runs.rows(run)[-1]["count"] == 19
    assert [row["set"] for row in runs.rows(run) if row["kind"] == "bad file"] == ["held-out"]


@pytest.mark.parametrize(("spoiled", "part"), [(3, "train"), (20, "train"), (2, "val"), (10, "val")])
def test_past_the_stated_share_the_run_stops_and_can_go_on(tmp_path: Path, spoiled: int, part: str):
    files, kind = (40, "training") if part == "train" else (20, "held-out")
    with pytest.raises(InputError, match=rf"of {files} {kind} files are unusable, more than the share --max-bad 0.05"):
        _folder_run(tmp_path, spoiled, part)
    run = tmp_path / "run"
    assert (run / "checkpoints" / "last" / "state.json").exists()
    with pytest.raises(InputError, match="files are unusable"):
        runs.train(run, resume=run)
    for path in (tmp_path / "set" / part / "dog").iterdir():
        if path.read_bytes().startswith(b"no picture"):
            Image.new("RGB", (70, 70)).save(path)
    assert runs.train(run, resume=run) == 0
    assert runs.rows(run)[-1]["step"] == 8


def test_a_larger_share_can_be_allowed(tmp_path: Path):
    assert runs.rows(_folder_run(tmp_path, 10, max_bad=0.5))[-1]["count"] == 20


# ---- Images that come folded -----------------------------------------------------------------------------------------

SMALL = {"widths": (8, 8, 8, 8, 8, 16, 16), "variant": "torchvision", "epochs": 1, "mixup": 0.2, "graph": False}


def small_alexnet(out: Path, resume: Path | None = None, **given) -> list[dict]:
    """The rows of a run of a narrow AlexNet."""
    given = given if resume else runs.options(out, {**SMALL, **given})
    assert commands.train(given, str(resume) if resume else None) == 0
    return runs.rows(out)


def test_a_run_on_folded_images_is_that_on_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Within rounding, in training and evaluation; and its net sees no other images."""
    seen, sides = [], FusedSequential._fused

    def noted(self, x):
        seen.append(x.shape[1:])
        return sides(self, x)

    monkeypatch.setattr(FusedSequential, "_fused", noted)
    found = {fold: small_alexnet(tmp_path / fold, fold=fold) for fold in ("on", "off")}
    assert sum(shape == (48, 17, 17) for shape in seen) == sum(shape == (3, 64, 64) for shape in seen) == 16
    for one, other in zip(*found.values(), strict=True):
        for name in one.keys() & {"loss", "train_loss", "val_loss"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4)
    weights = [runs.tensors(tmp_path / fold)["features.0.weight"] for fold in found]
    assert weights[0].shape == (8, 3, 11, 11)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_a_run_keeps_to_the_fold_that_it_began_with(tmp_path: Path):
    """Which auto has decided is in its checkpoints. Going on gives the same bits, and may be told otherwise."""

    def fold(run: Path) -> str:
        return checkpoint.load(checkpoint.find(run, "last")).config.fold

    whole, broken, plain = tmp_path / "whole", tmp_path / "broken", tmp_path / "plain"
    small_alexnet(whole, fold="on", precision="bf16")
    small_alexnet(broken, fold="on", precision="bf16", max_steps=5)
    small_alexnet(broken, broken, max_steps=None)
    assert fold(broken) == "on"
    runs.assert_same_bits(whole, broken)
    small_alexnet(plain, max_steps=5)
    assert fold(plain) == "off"
    small_alexnet(plain, plain, fold="on", max_steps=7)
    assert fold(plain) == "on"


def test_ranks_fold_as_one_process_does(tmp_path: Path):
    one, two, auto = tmp_path / "one", tmp_path / "two", tmp_path / "auto"
    small_alexnet(one, fold="on", max_steps=3, mixup=0.0)
    small_alexnet(two, fold="on", max_steps=3, mixup=0.0, nproc=2)
    torch.testing.assert_close(runs.tensors(two), runs.tensors(one), rtol=1e-4, atol=1e-5)
    small_alexnet(auto, max_steps=1, nproc=2)
    assert checkpoint.load(checkpoint.find(auto, "last")).config.fold == "off"


def test_a_fold_that_cannot_be_is_refused(tmp_path: Path):
    for given, reason in (
        ({"random_erase": 0.5}, "erasing and CutMix"),
        ({"cutmix": 1.0}, "erasing and CutMix"),
        ({"variant": "owt", "image_size": 67}, "no first convolution"),
    ):
        with pytest.raises(InputError, match=f"--fold: {reason}"):
            small_alexnet(tmp_path / next(iter(given)), fold="on", **given)


def test_where_a_fold_pays(monkeypatch: pytest.MonkeyPatch):
    """On a GPU with bfloat16, where the table takes a kernel of this package for the first layer of a rank's batch."""
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    model = AlexNet(2, widths=(64, 8, 8, 8, 8, 16, 16))

    def folds(device: str, training: bool, **given) -> bool:
        given = {"precision": "bf16", "batch_size": 128, **given}
        config = dataclasses.replace(resolve({"data": ".", "out": ""}, 2), **given)
        return fold_for(model, config, torch.device(device), training) is not None

    for training in (True, False):
        assert folds("cuda", training)
        assert folds("cuda", training, batch_size=8, backend="cuda")
        assert not folds("cpu", training)
        for other in ({"precision": "fp32"}, {"batch_size": 8}, {"nproc": 16}, {"backend": "reference"}):
            assert not folds("cuda", training, **other), other
        for option in ({"random_erase": 0.5}, {"cutmix": 1.0}):
            assert folds("cuda", training, **option) != training
