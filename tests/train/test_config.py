"""What a run's configuration holds, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from alexnet_fast import backend
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.train.config import TrainConfig, resolve, resumed

DIGITS = {"data": "digits", "out": "runs/x"}


def test_a_folder_gets_torchvisions_recipe():
    config = resolve({"data": "/pictures", "out": "x"}, 1000)
    recipe = (config.batch_size, config.lr, config.schedule, config.lr_step, config.lr_gamma, config.epochs)
    assert recipe == (256, 0.01, "step", 30, 0.1, 90)
    assert (config.momentum, config.weight_decay, config.dropout) == (0.9, 1e-4, 0.5)
    assert (config.image_size, config.transform, config.init) == (224, "crop", "variant")
    assert config.mean == VARIANTS["torchvision"].mean


@pytest.mark.parametrize("variant", VARIANTS)
def test_digits_fit_every_variant(variant: str):
    config = resolve({**DIGITS, "variant": variant}, 10)
    assert config.image_size == max(64, VARIANTS[variant].min_image_size)
    assert (config.transform, config.init, config.mean) == ("shift", "kaiming", (0.5, 0.5, 0.5))


def test_the_environments_backend_is_the_default():
    with backend("reference"):
        assert resolve(DIGITS, 10).backend == "reference"
        assert resolve({**DIGITS, "backend": "cpu"}, 10).backend == "cpu"


def test_what_is_given_wins_over_the_preset():
    assert resolve({**DIGITS, "lr": 0.5, "image_size": 100}, 10).lr == 0.5


def test_it_survives_json():
    config = resolve(DIGITS, 10)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="config: unknown 'unknown'"):
        TrainConfig.from_json({**config.to_json(), "unknown": 1})
    before = {name: value for name, value in config.to_json().items() if name not in ("max_bad", "momentum")}
    assert TrainConfig.from_json(before) == config  # of a version that had fewer fields


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in ("data", "lr", "epochs", "variant", "mean")
            for value in (None, [], {}, "x" * 5000)
        ],
        *[("batch_size", 10**30), ("seed", 10**40), ("std", [0, 0, 0]), ("mean", ["a", 0, 0]), ("num_classes", True)],
        *[("colour", [[0, 0, 0]]), ("init_std", [-1] * 8), ("recipe", "x"), ("image_size", 7), ("parallel", "towers")],
    ],
)
def test_stored_values_of_another_type_or_range_are_named(field: str, value: object):
    with pytest.raises(ValueError, match=field.replace("_", "[-_]")):
        TrainConfig.from_json({**resolve(DIGITS, 10).to_json(), field: value})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"variant": "vgg"}, "--variant: unknown variant 'vgg'; known are torchvision, paper, "),
        ({"backend": "tpu"}, "--backend: unknown backend 'tpu'; known are auto, reference, cpu, cuda, triton"),
        (
            {"schedule": "linear"},
            "--schedule: unknown schedule 'linear'; known are step, multistep, plateau, ",
        ),
        ({"precision": "fp16"}, "known are fp32, bf16"),
        ({"init": "zeros"}, "known are variant, kaiming"),
        ({"image_size": 62}, "--image-size: variant torchvision takes at least 63, got 62"),
        ({"num_classes": 9}, "--num-classes: DATA has 10 classes, got 9"),
        ({"batch_size": 1, "nproc": 2}, "--batch-size: 1 images cannot be shared by 2 ranks"),
        ({"epochs": 0}, "--epochs: expected from 1 to 1000000, got 0"),
        ({"lr": float("nan")}, "--lr: expected a finite number, got nan"),
        ({"lr": float("inf")}, "--lr"),
        ({"dropout": 1.5}, "--dropout: expected from 0 to 1, got 1.5"),
        ({"max_steps": 0}, "--max-steps"),
        ({"workers": -1}, "--workers"),
        ({"lr_step": 0.0}, "--lr-step"),
        ({"seed": 10**40}, "--seed: expected from 0 to 9223372036854775807, got a number of more than 20 digits"),
        ({"batch_size": 10**30}, "--batch-size: expected from 1 to 1048576, got"),
        ({"image_size": 100_000}, "--image-size: expected from 1 to 4096, got 100000"),
        ({"num_classes": 10**9}, "--num-classes: expected from 1 to 1000000, got 1000000000"),
        ({"init_std": (-1.0,) * 8}, "--init-std[0]: expected from 0 to 1000, got -1.0"),
        ({"mean": (float("nan"),) * 3}, "--mean[0]: expected a finite number, got nan"),
        ({"init_bias": (float("inf"),) * 8}, "--init-bias[0]: expected a finite number, got inf"),
    ],
)
def test_wrong_values_are_refused_with_what_is_wanted(given: dict, said: str):
    with pytest.raises(InputError) as caught:
        resolve({**DIGITS, **given}, 10)
    assert said in str(caught.value)


def test_a_missing_backend_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("alexnet_fast.backends.missing", lambda name: "no such card" if name == "cuda" else "")
    with pytest.raises(InputError, match="'cuda' is missing here: no such card"):
        resolve({**DIGITS, "backend": "cuda"}, 10)


@pytest.mark.parametrize(
    ("name", "value"), [("variant", "paper"), ("num_classes", 11), ("lr", 0.5), ("data", "/other")]
)
def test_a_resumed_run_keeps_what_moves_weights(name: str, value: object):
    config = resolve(DIGITS, 10)
    assert resumed(config, {"workers": 3, "max_steps": 9, name: getattr(config, name)}).workers == 3
    with pytest.raises(InputError, match="--resume: the run has"):
        resumed(config, {name: value})


def test_ranks_that_hold_their_part_of_the_images_stay_as_many():
    config = dataclasses.replace(resolve(DIGITS, 10), cache="device")
    with pytest.raises(InputError, match="--resume: --nproc 1 stays with --cache device"):
        resumed(config, {"nproc": 2})
    assert resumed(config, {"nproc": 1}) == config
