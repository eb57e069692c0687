"""What a recipe sets, that each of its values can be set otherwise, and what its parts do to the net."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_fast.data import Batch
from alexnet_fast.data.sources import Statistics
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.train.config import TrainConfig, resolve
from alexnet_fast.train.evaluate import augmented, scores
from alexnet_fast.train.model import build_model
from alexnet_fast.train.optimizer import build_optimizer
from alexnet_fast.train.recipes import RECIPES
from tests.train.runs import rows, small_net, train

CPU = torch.device("cpu")
STATISTICS = Statistics((0.1, 0.2, 0.3), ((1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)))


def resolved(recipe: str, **given) -> TrainConfig:
    return resolve({"data": "/pictures", "out": "x", "recipe": recipe, **given}, 1000)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_value_is_in_the_configuration_and_can_be_set_otherwise(recipe: str):
    config = dataclasses.asdict(resolved(recipe))
    assert {name: config[name] for name in RECIPES[recipe]} == RECIPES[recipe]
    others = {"schedule": "constant", "rule": "torch", "init": "kaiming", "transform": "shift", "precision": "bf16"}
    for name, value in RECIPES[recipe].items():
        if name == "variant":
            other = "owt"
        elif name == "lr_milestones":
            other = (1.0,)
        elif isinstance(value, bool):
            other = not value
        else:
            other = others.get(name) or (value // 2 + 1 if isinstance(value, int) else value / 2)
        given = {"ten_crop": False, name: other}
        assert getattr(resolved(recipe, **given), name) == other


def test_the_2012_values():
    config = resolved("paper")
    assert (config.batch_size, config.momentum, config.weight_decay, config.lr) == (128, 0.9, 5e-4, 0.01)
    assert (config.rule, config.schedule, config.lr_gamma, config.lr_cuts) == ("2012", "plateau", 0.1, 3)
    assert (config.dropout, config.colour_noise, config.ten_crop, config.epochs) == (0.5, 0.1, True, 90)
    assert config.init_std == (0.01,) * 8
    assert config.init_bias == (0, 1, 0, 1, 1, 1, 1, 0)
    assert (config.variant, config.mean) == ("paper", VARIANTS["paper"].mean)
    log = resolved("alex2012")
    assert (log.lr_milestones, log.bias_lr, log.bias_decay, log.colour_divisor) == ((25, 51, 79), 2, 0, 1.1)
    assert log.init_std == (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01)


def test_prepared_data_brings_its_own_mean_and_colours():
    given = {"data": "/pictures", "out": "x", "recipe": "paper"}
    config = resolve(given, 10, STATISTICS)
    assert (config.mean, config.colour) == (STATISTICS.mean, STATISTICS.colour)
    assert resolve({**given, "mean": (0.5, 0.5, 0.5)}, 10, STATISTICS).mean == (0.5, 0.5, 0.5)
    # Weights that were trained with a mean keep it.
    assert resolve({**given, "recipe": "torchvision"}, 10, STATISTICS).mean == VARIANTS["torchvision"].mean
    assert resolve({**given, "weights": "x.pth"}, 10, STATISTICS).mean == VARIANTS["paper"].mean


def test_small_grey_sets_keep_their_own_pictures():
    config = resolve({"data": "digits", "out": "x", "recipe": "paper"}, 10)
    assert (config.transform, config.colour_noise, config.ten_crop, config.image_size) == ("shift", 0.0, False, 64)
    assert (config.rule, config.batch_size) == ("2012", 128)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"recipe": "resnet"}, "--recipe: unknown recipe 'resnet'; known are paper, "),
        ({"schedule": "multistep"}, "--lr-milestones: schedule multistep needs them"),
        ({"init_std": (0.1, 0.2)}, "--init-std: expected 8 entries, got 2"),
        ({"std": (1.0, 0.0, 1.0)}, "--std[1]: expected from 1e-06 to 1000, got 0.0"),
        ({"colour_divisor": 0.0}, "--colour-divisor"),
        ({"lr_head": -1.0}, "--lr-head"),
    ],
)
def test_wrong_values_are_refused(given: dict, said: str):
    with pytest.raises(InputError) as caught:
        resolve({"data": "/pictures", "out": "x", **given}, 10)
    assert said in str(caught.value)


def test_initial_weights_and_biases_can_be_set():
    biases = tuple(float(layer) for layer in range(8))
    given = {"recipe": "paper", "init_std": (0.1,) * 7 + (0.5,), "init_bias": biases}
    model = build_model(resolve({"data": "/pictures", "out": "x", **given}, 10))
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert [float(layer.bias.detach().mean()) for layer in layers] == list(biases)
    assert [layer.weight.std().item() for layer in layers] == pytest.approx([0.1] * 7 + [0.5], rel=0.05)


def test_biases_and_the_head_have_rates_of_their_own():
    config = resolved("caffe", lr=0.5, weight_decay=0.25, lr_head=4.0)
    net = small_net(config)
    groups = build_optimizer(config, dict(net.named_parameters())).param_groups
    found = {tuple(p.shape): (group["base"], group["weight_decay"]) for group in groups for p in group["params"]}
    head, first = net[-1], net[0]
    assert found[tuple(first.weight.shape)] == (0.5, 0.25)
    assert found[tuple(first.bias.shape)] == (1.0, 0.0)
    assert found[tuple(head.weight.shape)] == (4.0, 0.25)
    assert found[tuple(head.bias.shape)] == (8.0, 0.0)


def test_the_update_is_the_one_of_2012():
    config = resolved("paper", lr=0.5, weight_decay=0.25)
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(config, {"fc.weight": weight})
    v, w = 0.0, 2.0
    for lr, grad in ((0.5, 1.0), (0.05, -3.0)):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = torch.tensor([grad])
        optimizer.step()
        v = 0.9 * v - 0.25 * lr * w - lr * grad
        w += v
        assert weight.item() == pytest.approx(w, rel=1e-6)


def noise(images: torch.Tensor, **given) -> torch.Tensor:
    given = {"data": "/pictures", "out": "x", "image_size": 64, "mean": (0.0,) * 3, "std": (1.0,) * 3, **given}
    config = resolve(given, 10, STATISTICS)
    batch = Batch(images, torch.zeros(len(images)), len(images), [], torch.arange(len(images)), False)
    return augmented(batch, config, CPU, epoch=0)


def test_colour_noise_is_one_shift_an_image_along_the_components():
    images = torch.randint(256, (400, 3, 64, 64), dtype=torch.uint8)
    shift = noise(images, colour_noise=0.1) - noise(images)
    assert shift.var((2, 3)).max() < 1e-10
    torch.testing.assert_close(shift.mean((2, 3)).std(0), torch.tensor([0.1, 0.2, 0.3]), rtol=0.15, atol=0)
    divided = noise(images, colour_noise=0.1, colour_divisor=1.1)
    torch.testing.assert_close(divided, noise(images, colour_noise=0.1) / 1.1)


def test_ten_crops_are_corners_centre_and_mirrors_averaged_by_probability():
    config = resolve({"data": "/pictures", "out": "x", "image_size": 64}, 10)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 10))
    images = torch.randint(256, (3, 3, 73, 73), dtype=torch.uint8)
    with torch.no_grad():
        found = scores(net, images, config, CPU, ten_crop=True)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
        expected = torch.zeros(3, 10)
        for top, left in ((0, 0), (0, 9), (9, 0), (9, 9), (4, 4)):
            crop = (images[:, :, top : top + 64, left : left + 64] / 255 - mean) / std
            expected += net(crop).softmax(1) + net(crop.flip(3)).softmax(1)
    torch.testing.assert_close(found.exp(), expected / 10)
    torch.testing.assert_close(
        F.cross_entropy(found, torch.tensor([1, 2, 3])), F.nll_loss(found, torch.tensor([1, 2, 3]))
    )


def test_a_plateau_is_kept_over_a_resume(tmp_path: Path):
    given = {"schedule": "plateau", "lr_patience": 1, "lr": 1e-9, "warmup": 0.0, "epochs": 4}  # nothing is ever better
    assert train(tmp_path / "whole", **given) == 0
    rates = [row["lr"] for row in rows(tmp_path / "whole") if row["kind"] == "step"]
    assert rates == pytest.approx([1e-9] * 24 + [1e-10] * 12 + [1e-11] * 12)
    assert train(tmp_path / "parts", max_steps=30, **given) == 0
    assert train(tmp_path / "parts", resume=tmp_path / "parts", max_steps=48) == 0
    assert [row["lr"] for row in rows(tmp_path / "parts") if row["kind"] == "step"] == rates
