"""What can be added to a run: each does what its paper or torch's module does, and a resumed run keeps its bits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from alexnet_fast.data import Transform, augmentation, training_batches
from alexnet_fast.data.augmentation import (
    JITTER_KEY,
    OPERATIONS,
    ROTATION_KEY,
    erased,
    jittered,
    rand_augmented,
    rotated,
)
from alexnet_fast.data.random import Draws
from alexnet_fast.errors import InputError
from alexnet_fast.train import checkpoint, commands
from alexnet_fast.train.config import read_config, resolve
from alexnet_fast.train.mixing import mix_images
from tests.data.pictures import picture
from tests.train import runs

EACH: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "lr": 0.001},
    "clipping": {"clip_grad": 0.5},
    "accumulation": {"accumulate": 2, "batch_size": 5},
    "moving average": {"model_ema": True, "model_ema_decay": 0.9, "model_ema_steps": 2},
    "mixup and cutmix": {"mixup": 0.4, "cutmix": 1.0},
    "rotation and jitter": {"rotation": 20.0, "colour_jitter": 0.4},
    "randaugment and erasing": {"auto_augment": "ra", "ra_magnitude": 20, "random_erase": 0.5},
    "all": {
        **{"optimizer": "adamw", "lr": 0.001, "clip_grad": 1.0, "accumulate": 2, "batch_size": 5, "model_ema": True},
        **{"model_ema_decay": 0.5, "cutmix": 0.5, "rotation": 5.0, "colour_jitter": 0.1, "early_stopping": 4},
        **{"auto_augment": "ra", "random_erase": 0.1},
    },
}


@pytest.fixture(autouse=True)
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are not drawn: that takes longer than the steps."""
    monkeypatch.setattr("alexnet_fast.train.pictures.draw_curves", lambda rows, path: None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen steps without any option."""
    run = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_fast.train.pictures.draw_curves", lambda rows, path: None)
        assert runs.train(run, max_steps=14) == 0
    return run


@pytest.mark.parametrize("name", EACH)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, plain: Path, name: str):
    """Stopped in the middle of the first epoch, which has twelve steps."""
    given = {**EACH[name], "checkpoint_steps": 5}
    assert runs.train(tmp_path / "whole", max_steps=14, **given) == 0
    assert runs.train(tmp_path / "run", max_steps=7, **given) == 0
    assert runs.train(tmp_path / "run", resume=tmp_path / "run", max_steps=14) == 0
    runs.assert_same_bits(tmp_path / "run", tmp_path / "whole")
    stop = [row for row in runs.rows(tmp_path / "run") if row["kind"] == "stop" and row["step"] < 14]
    assert [row for row in runs.rows(tmp_path / "run") if row not in stop] == runs.rows(tmp_path / "whole")
    one, other = (runs.tensors(run)["0.weight"] for run in (tmp_path / "whole", plain))
    assert not torch.equal(one, other)  # the option does something


def _first_step(run: Path, **given: Any) -> tuple[checkpoint.Checkpoint, nn.Module]:
    """What the run holds after a step, and the net before it with its gradients."""
    fixed = {"max_steps": 1, "dropout": 0.0, "warmup": 0.0}
    assert runs.train(run, **{**fixed, **given}) == 0
    found = checkpoint.load(checkpoint.find(run, "last"))
    config, data = found.config, commands.open_run_data(found.config)
    options = {"seed": 0, "epoch": 0, "first": 0, "batch_size": config.step_images, "rank": 0, "world": 1, "workers": 0}
    batch = next(training_batches(data.train, Transform(config.transform, config.image_size), **options))
    net = runs.small_net(config)
    nn.functional.cross_entropy(net((batch.images.float() / 255 - 0.5) / 0.5), batch.labels).backward()
    return found, net


def _assert_close(found: checkpoint.Checkpoint, net: nn.Module) -> None:
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found.model[key], value)


def test_adamw_is_torchs(tmp_path: Path):
    given = {"optimizer": "adamw", "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, "lr": 0.01}
    found, net = _first_step(tmp_path / "run", **given)
    torch.optim.AdamW(net.parameters(), 0.01, (0.8, 0.9), 1e-6, 0.1).step()
    _assert_close(found, net)


def test_clipping_is_torchs(tmp_path: Path):
    found, net = _first_step(tmp_path / "run", clip_grad=0.01)
    assert nn.utils.clip_grad_norm_(net.parameters(), 0.01) > 0.01
    torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=found.config.weight_decay).step()
    _assert_close(found, net)


def test_accumulated_batches_are_one_batch(tmp_path: Path):
    """Dropout included, and in the epoch's last step too, which has nine images."""
    for name, given in (("one", {"batch_size": 10}), ("parts", {"batch_size": 5, "accumulate": 2})):
        assert runs.train(tmp_path / name, epochs=1, **given) == 0
    one, parts = (runs.rows(tmp_path / name) for name in ("one", "parts"))
    assert len(one) == len(parts) == 13
    for a, b in zip(one, parts, strict=True):
        assert a.pop("kind") == b.pop("kind")
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


def test_a_moving_average_is_kept_and_evaluated(tmp_path: Path):
    """Each update keeps three quarters: after two steps 9/16 of the start, 3/16 of the first, 4/16 of the second."""
    weights = []
    for steps in (1, 2):
        assert runs.train(tmp_path / f"plain {steps}", max_steps=steps) == 0
        weights.append(runs.tensors(tmp_path / f"plain {steps}"))
    run = tmp_path / "run"
    assert runs.train(run, max_steps=2, model_ema=True, model_ema_decay=0.75) == 0
    found = checkpoint.load(checkpoint.find(run, "last"))
    start = runs.small_net(found.config).state_dict()
    for key, value in found.model.items():
        expected = 9 / 16 * start[key] + 3 / 16 * weights[0][key] + 4 / 16 * weights[1][key]
        torch.testing.assert_close(value, expected)
        assert torch.equal(found.momentum[f"weight:{key}"], weights[1][key])
    still = {"epochs": 3, "model_ema": True, "model_ema_decay": 1.0}  # the average stays where it began
    assert runs.train(tmp_path / "still", **still) == 0
    assert len({row["val_loss"] for row in runs.rows(tmp_path / "still") if row["kind"] == "epoch"}) == 1


def test_it_stops_early_and_stays_stopped(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = tmp_path / "run"
    assert runs.train(run, epochs=9, lr=0.0, early_stopping=2) == 0
    assert [row["epoch"] for row in runs.rows(run) if row["kind"] == "epoch"] == [0, 1, 2]
    assert "stopped early: 2 epochs without a better held-out accuracy" in capsys.readouterr().out
    assert runs.train(run, resume=run) == 0
    assert [row["epoch"] for row in runs.rows(run) if row["kind"] == "epoch"] == [0, 1, 2]


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_images_and_losses_are_shared_alike(name: str):
    """Images are all black or all white, so the mean of a mixed one tells its share."""
    config = resolve({"data": "digits", "out": "x", name: 1.0}, 10)
    images, labels = torch.zeros(6, 3, 50, 70), torch.arange(6)
    images[:3] = 1
    shares = set()
    for step in range(20):
        mixed, how = mix_images(config, step, images, labels)
        assert how.labels.tolist() == [5, 4, 3, 2, 1, 0]
        assert mixed[:3].mean().item() == pytest.approx(how.share, abs=1e-5)
        assert mixed[3:].mean().item() == pytest.approx(1 - how.share, abs=1e-5)
        assert set(mixed.unique().tolist()) <= {0.0, 1.0} or name == "mixup"
        shares.add(how.share)
    assert len(shares) == 20
    assert mix_images(resolve({"data": "digits", "out": "x"}, 10), 0, images, labels) == (images, None)


def _pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(picture(height, width, n)) for n in range(count)])).permute(0, 3, 1, 2)


def test_turned_images_are_pillows():
    images, indices = _pictures(5, 40, 60), torch.tensor([3, 1, 4, 15, 9])
    turned = rotated(images, indices, 30.0, seed=1, epoch=2)
    for image, index, result in zip(images, indices.tolist(), turned, strict=True):
        angle = (2 * Draws(1, 2, index, ROTATION_KEY).unit() - 1) * 30
        pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).rotate(angle, Image.Resampling.BILINEAR)
        difference = np.abs(np.asarray(pillow).astype(int) - result.permute(1, 2, 0).numpy().astype(int))
        assert np.median(difference) <= 1  # at the edge Pillow takes the nearest pixel where grid_sample fades to black
        assert (difference.max(2) > 3).mean() < 0.05
    assert torch.equal(rotated(images, indices, 0.0, seed=1, epoch=2), images)
    assert not torch.equal(rotated(images, indices, 30.0, seed=1, epoch=3), turned)


def test_jitter_is_pillows():
    images, indices = _pictures(4, 30, 40), torch.arange(4)
    for image, index, result in zip(images, indices.tolist(), jittered(images, indices, 0.5, 1, 2), strict=True):
        draws, pillow = Draws(1, 2, index, JITTER_KEY), Image.fromarray(image.permute(1, 2, 0).numpy())
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            pillow = enhance(pillow).enhance(1 + (2 * draws.unit() - 1) * 0.5)
        difference = np.asarray(pillow).astype(int) - result.permute(1, 2, 0).numpy().astype(int)
        assert np.abs(difference).max() <= 3  # Pillow rounds three times
    assert torch.equal(jittered(images, indices, 0.0, 1, 2), images)


def _by(operation: str, image: Image.Image, level: float) -> Image.Image:
    """RandAugment's operations by Pillow, with torchvision's magnitudes; geometry about the same places."""
    width, height, fill = *image.size, Image.Resampling.BILINEAR
    enhance = {"brightness": "Brightness", "colour": "Color", "contrast": "Contrast", "sharpness": "Sharpness"}
    if operation in enhance:
        return getattr(ImageEnhance, enhance[operation])(image).enhance(1 + 0.9 * level)
    affine = {
        "shear x": (1, 0.3 * level, 0, 0, 1, 0),
        "shear y": (1, 0, 0, 0.3 * level, 1, 0),
        "translate x": (1, 0, int(150 / 331 * width * level), 0, 1, 0),
        "translate y": (1, 0, 0, 0, 1, int(150 / 331 * height * level)),
    }
    if operation in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[operation], fill)
    return {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(30 * level, fill),
        "posterize": lambda: ImageOps.posterize(image, 8 - round(abs(level) * 30 / (30 / 4))),
        "solarize": lambda: ImageOps.solarize(image, int(255 * (1 - abs(level)) + 0.999)),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_of_randaugment_is_pillows(operation: str):
    images = _pictures(4, 60, 80) // torch.tensor([1, 2, 3, 1], dtype=torch.uint8)[:, None, None, None]
    images[3] = 7  # of one value
    for level in (0.3, -0.7):
        results = augmentation.to_bytes(OPERATIONS[operation](images.float(), torch.full((4,), level)))
        for image, result in zip(images, results, strict=True):
            pillow = np.asarray(_by(operation, Image.fromarray(image.permute(1, 2, 0).numpy()), level)).astype(int)
            difference = np.abs(pillow - result.permute(1, 2, 0).numpy())
            geometry = operation.startswith(("shear", "translate", "rotate"))
            assert np.median(difference) <= 1
            assert (difference.max(2) > 2).mean() <= (0.08 if geometry else 0)  # its edges are Pillow's own


def test_randaugment_draws_by_image_and_epoch():
    images, indices = _pictures(1, 40, 40).expand(200, -1, -1, -1), torch.arange(200)
    once = rand_augmented(images, indices, 15, seed=1, epoch=2)
    assert torch.equal(rand_augmented(images[:7], indices[50:57], 15, seed=1, epoch=2), once[50:57])
    assert not torch.equal(rand_augmented(images, indices, 15, seed=1, epoch=3), once)
    assert len(once.flatten(1).unique(dim=0)) > 100
    assert torch.equal(images, _pictures(1, 40, 40).expand(200, -1, -1, -1))  # its input stays
    assert (once == images).flatten(1).all(1).float().mean() < 0.1


def test_erasing_is_a_rectangle_in_so_large_a_share():
    images, indices = torch.ones(400, 3, 40, 60), torch.arange(400)
    holes = erased(images, indices, 0.25, seed=1, epoch=2) == 0
    shares = holes[:, 0].float().mean((1, 2))
    assert (shares > 0).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert shares[shares > 0].min() > 0.01
    assert shares.max() < 0.36
    assert torch.equal(holes[:, 0], holes[:, 2])
    for hole in holes[:, 0][shares > 0]:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
    assert torch.equal(erased(images[:9], indices[30:39], 0.25, 1, 2), erased(images, indices, 0.25, 1, 2)[30:39])
    assert torch.equal(erased(images, indices, 0.0, 1, 2), images)


@pytest.mark.parametrize(
    "given",
    [
        *[
            {"parallel": "hybrid", "nproc": 2, **more}
            for more in ({"mixup": 1.0}, {"clip_grad": 1.0}, {"accumulate": 2})
        ],
        {"parallel": "hybrid", "nproc": 2, "hybrid_scheme": "b", "optimizer": "adamw"},
        *[{"optimizer": "adamw", "rule": "2012"}, {"betas": (0.9, 1.0)}, {"rotation": 181.0}, {"colour_jitter": 1.5}],
        *[{"accumulate": 0}, {"clip_grad": 0.0}, {"mixup": -1.0}, {"model_ema_decay": 2.0}, {"early_stopping": 0}],
        *[{"auto_augment": "ta"}, {"ra_magnitude": 31}, {"random_erase": 1.5}],
    ],
)
def test_what_does_not_go_together_is_refused(given: dict):
    with pytest.raises(InputError, match=r"^--"):
        resolve({"data": "digits", "out": "x", **given}, 10)


# -------------------------------------------------------------------------------------------------------- what is told


def _table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_tables_tell_how_each_class_fared(tmp_path: Path):
    run = tmp_path / "run"
    assert runs.train(run, epochs=2) == 0
    confusion, classes, metrics = (_table(run / f"{name}.csv") for name in ("confusion", "classes", "metrics"))
    summary, rows = json.loads((run / "summary.json").read_text()), runs.rows(run)
    counts = np.array([row[1:] for row in confusion[1:]], int)
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == [row[0] for row in classes[1:]]
    assert (counts.sum(), np.trace(counts)) == (31, summary["top1_count"])
    for row, images, hits in zip(classes[1:], counts.sum(1), np.diag(counts), strict=True):
        assert row[1:3] == [str(images), str(hits)]
        assert float(row[3]) == pytest.approx(hits / images)
    losses = [row[metrics[0].index("loss")] for row in metrics[1:]]
    assert [float(loss) for loss in losses if loss] == [row["loss"] for row in rows if row["kind"] == "step"]
    assert Image.open(run / "confusion.png").size[0] > 300


def test_a_dry_run_says_what_would_be_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture):
    given = runs.options(tmp_path / "run", {"accumulate": 3, "lr": 0.5})
    assert commands.train(given, None, runs.small_net, dry_run=True) == 0
    said = capsys.readouterr().out
    for line in ("119 training and 31 held-out images", "6,842 of 6,842 parameters for 8 steps", "  lr: 0.5\n"):
        assert line in said
    assert not (tmp_path / "run").exists()


def test_seeds_are_runs_with_a_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("alexnet_fast.train.commands.train", _small(commands.train))
    given = runs.options(tmp_path / "runs", {"max_steps": 3})
    assert commands.train_seeds(given, "3,4", None, False) == 0
    top1 = [json.loads((tmp_path / "runs" / f"seed-{n}" / "summary.json").read_text())["top1"] for n in (3, 4)]
    record = json.loads((tmp_path / "runs" / "seeds.json").read_text())
    assert record["top1"]["mean"] == pytest.approx(np.mean(top1))
    assert record["top1"]["deviation"] == pytest.approx(np.std(top1, ddof=1))
    assert [row[0] for row in _table(tmp_path / "runs" / "seeds.csv")] == ["seed", "3", "4"]
    assert commands.train_seeds(given, "3,4,5", None, False) == 0  # goes on: two are done
    assert len(_table(tmp_path / "runs" / "seeds.csv")) == 4
    for seeds in ("", "a", "1,1", "-1"):
        with pytest.raises(InputError, match="--seeds: expected different whole numbers"):
            commands.train_seeds(given, seeds, None, False)


def _small(train):
    return lambda given, resume, dry_run: train(given, resume, runs.small_net, dry_run)


# ---------------------------------------------------------------------------------------------------------- from files

WRITTEN = {"lr": 0.5, "batch-size": 7, "opt": "adamw", "lr_milestones": [1, 2], "max_steps": None, "no_such": 1}


def test_a_configuration_file_gives_options(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in WRITTEN.items() if name != "no_such"}))
    assert read_config(path) == {"lr": 0.5, "batch_size": 7, "optimizer": "adamw", "lr_milestones": (1.0, 2.0)}
    config = resolve({"data": "digits", "out": "x"}, 10)
    path.write_text(json.dumps({**config.to_json(), "about": {}}))  # as a run writes it
    again = resolve({**read_config(path), "out": "y"}, 10)
    assert again == resolve({"data": "digits", "out": "y"}, 10)


def test_a_configuration_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 0.5\nbatch-size: 7\nmean: [0.1, 0.2, 0.3]\n")
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(InputError, match="YAML needs PyYAML: pip install pyyaml"):
        read_config(path)
    monkeypatch.undo()
    pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert read_config(path) == {"lr": 0.5, "batch_size": 7, "mean": (0.1, 0.2, 0.3)}
    for text in ("[", "a: !!python/object:os.system x", "lr: [1", "- 1", "lr: 2001-99-99", "? {a: b}: c", "\0"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"^--config: "):
            read_config(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"lr": "a"}', "config.json: lr: expected a number, got 'a'"),
        ('{"leraning_rate": 1}', "unknown option 'leraning_rate'"),
        ('{"batch_sise": 1}', "did you mean batch_size"),
        ('{"lr": -1}', "config.json: lr: expected at least 0, got -1"),
        ('{"lr": 1, "opt": "adam", "optimizer": "sgd"}', "'optimizer' is given twice"),
        ("[1]", "expected an object of options"),
        ("[" * 100_000, "nested too deep"),
        ("", "not JSON"),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path: Path, content: str, said: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"^--config: ") as caught:
        read_config(tmp_path / "config.json")
    assert said in str(caught.value)
