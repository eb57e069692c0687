"""Two ranks, four, or one: in each mode the run is that of one process, and what it sent is what the formulas say."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from alexnet_fast.data import Transform, training_batches
from alexnet_fast.data.random import mix
from alexnet_fast.optim import SGD
from alexnet_fast.parallel import Ranks, Split, Step, launch, split_dropouts
from alexnet_fast.train import commands
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.engine import DROPOUT_KEY
from alexnet_fast.train.evaluate import evaluate, normalized
from alexnet_fast.train.schedule import learning_rate
from tests.data.pictures import write_fashion
from tests.parallel import courses
from tests.train import runs

COURSES = {
    "ddp": {"parallel": "ddp", "variant": "paper"},
    "ddp bf16": {"parallel": "ddp", "variant": "paper", "gradients": "bf16"},
    "towers": {"parallel": "towers", "variant": "paper"},
    "towers alex2012": {"parallel": "towers", "variant": "alex2012"},
    "towers frozen": {"parallel": "towers", "variant": "paper", "freeze_features": True},
    "hybrid": {"parallel": "hybrid", "variant": "paper"},
    "hybrid torchvision": {"parallel": "hybrid", "variant": "torchvision"},
    "hybrid frozen": {"parallel": "hybrid", "variant": "paper", "freeze_features": True},
    "hybrid b": {"parallel": "hybrid", "variant": "paper", "hybrid_scheme": "b"},
    "hybrid c": {"parallel": "hybrid", "variant": "paper", "hybrid_scheme": "c"},
}
RESUMED = ("towers", "hybrid", "hybrid b", "hybrid c")
OF_TWO = [name for name in COURSES if name.startswith("towers")]


def _courses(ranks: Ranks, folder: str) -> int:
    """Every course on these ranks; on two of them the resumed ones, and those with a fault, too."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(300, exit=True)  # ranks that wait for each other
    root = Path(folder)
    for name, given in COURSES.items():
        if ranks.world == 2 or name not in OF_TWO:
            courses.course(ranks, root / name, **given)
    if ranks.world == 2:
        for name in RESUMED:
            courses.course(ranks, root / f"{name} resumed", **{**COURSES[name], "max_steps": 8})
            courses.go_on(ranks, root / f"{name} resumed", max_steps=15)
        courses.course(ranks, root / "handed on", **{**COURSES["towers"], "max_steps": 8})
        said = {}
        for name in ("ddp", "towers", "hybrid"):
            out = root / f"{name} spoiled"
            said[name] = courses.caught(_spoiled, ranks, out, COURSES[name])
        (root / f"said {ranks.rank}.json").write_text(json.dumps(said))
        (root / f"order {ranks.rank}.json").write_text(json.dumps(_order(ranks)))
    return 0


def _order(ranks: Ranks) -> list[str]:
    """What happens in a backward pass through a convolution and 28 MB of a linear layer, in order."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 4500))
    events: list[str] = []
    send = default_hooks.allreduce_hook

    def noted(group, bucket):
        events.append(f"{sum(p.numel() for p in bucket.parameters()) * 4 // 10**6} MB leave")
        return send(group, bucket)

    with mock.patch.object(default_hooks, "allreduce_hook", noted):
        split = Split(net, [], ranks, Step(nn.CrossEntropyLoss(reduction="sum"), contextlib.nullcontext, 16))
        events.clear()
        net[0].weight.register_hook(lambda gradient: events.append("convolution"))
        split.train(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64), 4, lambda: None)
    return events


def _spoiled(ranks: Ranks, out: Path, given: dict) -> int:
    """A course in which the last rank's copy of a weight becomes NaN in the sixth step."""
    seen = 0
    step = SGD.step

    def spoil(optimizer, *args):
        nonlocal seen
        seen += 1
        if seen == 6 and ranks.rank == ranks.world - 1:
            optimizer.param_groups[0]["params"][1].data[0] = math.nan  # conv1's bias
        return step(optimizer, *args)

    SGD.step = spoil
    try:
        return courses.course(ranks, out, **given)
    finally:
        SGD.step = step


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the courses, with their data."""
    root = tmp_path_factory.mktemp("courses")
    write_fashion(root / "set", **runs.SIZES)
    return root


def _folder(shared: Path, name: str) -> Path:
    root = shared / name
    root.mkdir()
    (root / "set").symlink_to(shared / "set")
    return root


def _ran(shared: Path, world: int) -> Path:
    root = _folder(shared, f"{world}")
    assert launch(_courses, (str(root),), world) == 0
    return root


@pytest.fixture(scope="module")
def two(shared: Path) -> Path:
    return _ran(shared, 2)


@pytest.fixture(scope="module")
def alone(shared: Path) -> Path:
    """The courses in one process, those of towers as plain ones."""
    root = _folder(shared, "alone")
    for name, given in COURSES.items():
        courses.course(Ranks(), root / name, **{**given, "parallel": "ddp", "hybrid_scheme": "a", "gradients": "fp32"})
    return root


def _assert_same_course(one: Path, other: Path, loss: float = 1e-6, weight: float = 1e-6) -> None:
    assert len(courses.losses(one)) == courses.STEPS["max_steps"]
    assert courses.losses(one) == pytest.approx(courses.losses(other), rel=loss)
    a, b = runs.tensors(one), runs.tensors(other)
    assert set(a) == set(b)
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=weight, atol=weight * float(value.abs().max()), msg=key)


@pytest.mark.parametrize("name", [name for name in COURSES if name not in ("ddp bf16", "hybrid b", "hybrid c")])
def test_two_ranks_give_the_course_of_one_process(two: Path, alone: Path, name: str):
    """Loss by loss, with dropout; the last step of an epoch has an odd number of images."""
    _assert_same_course(alone / name, two / name)


def test_the_courses_differ_where_they_should(two: Path):
    """Losses of another scheme or rounding differ, so that equal losses mean something."""
    for name in ("hybrid b", "hybrid c", "ddp bf16"):
        assert courses.losses(two / name) != pytest.approx(courses.losses(two / "ddp"), rel=1e-5)
    assert courses.losses(two / "ddp bf16") == pytest.approx(courses.losses(two / "ddp"), rel=0.05)


def _reference(config: TrainConfig, scheme: str, world: int) -> list[float]:
    """The losses of hybrid's scheme b or c in one process: the linear layers move after each part of a batch."""
    net = courses.build(config)
    data = commands.open_run_data(config)
    dropouts = split_dropouts(net, config.batch_size)
    convolutions, linears = list(net.features.parameters()), list(net.classifier.parameters())
    options = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    optimizers = [torch.optim.SGD(part, config.lr, **options) for part in (convolutions, linears)]
    found, step = [], 0
    net.train()
    for epoch in range(2):
        batches = training_batches(
            data.train,
            Transform(config.transform, config.image_size),
            **{"seed": config.seed, "epoch": epoch, "first": 0, "batch_size": config.batch_size},
            **{"rank": 0, "world": 1, "workers": 0},
        )
        for batch in batches:
            if step == config.max_steps:
                break
            for layer, dropout in enumerate(dropouts):
                dropout.seed = mix(config.seed, step, layer, DROPOUT_KEY) >> 1
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(config, step, 12)
            features = net.features(normalized(batch.images, config, torch.device("cpu")))
            sent = features.detach().requires_grad_()
            numbers = torch.arange(batch.counted)
            share = -(-batch.counted // world)
            share = -(-share // world) * world if scheme == "c" else share
            own = numbers % world if scheme == "b" else numbers // world // (share // world)
            total = 0.0
            for part in range(world):
                rows = numbers[own == part]
                if not len(rows):
                    continue
                for dropout in dropouts:
                    dropout.rows = rows
                logits = net.classifier(net.avgpool(sent[rows]).flatten(1))
                loss = nn.functional.cross_entropy(logits, batch.labels[rows], reduction="sum")
                (loss / len(rows)).backward(inputs=linears, retain_graph=True)
                (loss / batch.counted).backward(inputs=[sent])
                optimizers[1].step()
                optimizers[1].zero_grad()
                total += loss.item()
            features.backward(sent.grad)
            optimizers[0].step()
            optimizers[0].zero_grad()
            found.append(total / batch.counted)
            step += 1
    return found


@pytest.mark.parametrize("scheme", ["b", "c"])
def test_linear_layers_move_after_each_part_of_a_batch(two: Path, scheme: str):
    config = commands.checkpoint.load((two / f"hybrid {scheme}" / "checkpoints" / "last").resolve()).config
    assert courses.losses(two / f"hybrid {scheme}") == pytest.approx(_reference(config, scheme, 2), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- bytes

NUMBER = 8  # bytes: the courses are in float64
IMAGES = 119 + 3 * 10  # of fifteen steps
SAVES = 4  # after steps 5, 10, 12 and 15


def _sizes(run: Path) -> dict[str, int]:
    return {key: value.numel() for key, value in runs.tensors(run).items() if not key.startswith("momentum")}


def test_towers_send_what_the_paper_says(two: Path):
    """128·13·13, 128·6·6 and twice 2048 numbers an image there; here at 64 pixels 3·3 and 1·1, an eighth, 16 wide."""
    conv3, fc6, fc7, fc8 = 16 * 3 * 3, 16 * 1 * 1, courses.WIDTH // 2, courses.WIDTH // 2
    sent = courses.summary(two / "towers")["bytes_sent"]
    assert sent["activations"] == NUMBER * IMAGES * (2 * (conv3 + fc6 + fc7) + fc8)
    halves = sum(n for key, n in _sizes(two / "towers").items() if not key.startswith("classifier.6")) // 2
    assert sent == {"activations": sent["activations"], "weights": SAVES * 2 * NUMBER * halves}
    frozen = courses.summary(two / "towers frozen")["bytes_sent"]
    assert frozen["activations"] == NUMBER * IMAGES * (conv3 + fc6 + 2 * fc7 + fc8)  # to frozen layers nothing


def test_the_papers_sizes_give_the_papers_traffic():
    """The formula of parallel/towers.py, and the gradient that data parallelism sends instead."""
    forward = [128 * 4 * size / 1e6 for size in (128 * 13 * 13, 128 * 6 * 6, 2048, 2048)]
    assert [round(size, 1) for size in forward] == [11.1, 2.4, 1.0, 1.0]
    assert round(sum(forward) + sum(forward[:3])) == 30
    assert round(4 * 60_965_224 / 1e6) == 244


def test_data_parallelism_sends_every_gradient(two: Path):
    gradients = 15 * NUMBER * sum(_sizes(two / "ddp").values())
    assert courses.summary(two / "ddp")["bytes_sent"] == {"gradients": gradients}
    assert courses.summary(two / "ddp bf16")["bytes_sent"] == {"gradients": gradients // NUMBER * 2}


def test_linear_gradients_leave_before_the_convolutions_are_differentiated(two: Path):
    assert json.loads((two / "order 0.json").read_text()) == ["28 MB leave", "convolution", "0 MB leave"]


@pytest.mark.parametrize("scheme", ["hybrid", "hybrid b", "hybrid c"])
def test_hybrid_sends_gradients_of_convolutions_and_activations(two: Path, scheme: str):
    sizes = _sizes(two / scheme)
    sent = courses.summary(two / scheme)["bytes_sent"]
    assert sent["gradients"] == 15 * NUMBER * sum(n for key, n in sizes.items() if key.startswith("features"))
    rows = 15 * (12 if scheme == "hybrid c" else 10)  # places of a step: equally many a rank, and a pass
    numbers = 2 * 32 + 2 * courses.WIDTH + 2 * 10  # conv5, fc6 and the logits, forward and backward
    assert sent["activations"] == rows * (NUMBER * numbers + 8) // 2  # and each label, eight bytes


# ---------------------------------------------------------------------------------------- checkpoints and evaluation


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(two: Path, name: str):
    runs.assert_same_bits(two / name, two / f"{name} resumed")
    assert runs.rows(two / name)[-1] == runs.rows(two / f"{name} resumed")[-1]
    assert courses.summary(two / f"{name} resumed")["restarts"] == 1
    assert courses.summary(two / name)["images_trained"] == IMAGES


def test_checkpoints_move_between_towers_and_one_process(two: Path, alone: Path):
    courses.go_on(Ranks(), two / "handed on", parallel="ddp", max_steps=15)
    _assert_same_course(alone / "towers", two / "handed on")


@pytest.mark.parametrize("name", ["ddp", "towers", "hybrid", "hybrid b"])
def test_evaluation_counts_what_one_process_counts(two: Path, name: str):
    found = commands.checkpoint.load((two / name / "checkpoints" / "last").resolve())
    config = dataclasses.replace(found.config, nproc=1, parallel="ddp", hybrid_scheme="a")
    net = courses.build(config)
    net.load_state_dict(found.model)
    result, _ = evaluate(net, commands.open_run_data(config).val, config, Ranks())
    assert courses.evaluations(two / name)[-1] == (result.top1, result.top5, 31)


# ---------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("name", ["ddp", "towers", "hybrid"])
def test_a_nan_on_one_rank_stops_all_of_them_alike(two: Path, name: str):
    said = [json.loads((two / f"said {rank}.json").read_text())[name] for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("RunError: the loss is nan at step 7, lr")
    kept = sorted((two / f"{name} spoiled" / "checkpoints").glob("step-*"))
    assert [path.name for path in kept] == ["step-00000000", "step-00000005"]
    assert all(value.isfinite().all() for value in commands.checkpoint.load(kept[1]).model.values())


@pytest.mark.soak
def test_four_ranks_give_the_course_of_one_process(shared: Path, alone: Path):
    four = _ran(shared, 4)
    for name in ("ddp", "hybrid", "hybrid torchvision", "hybrid frozen"):
        _assert_same_course(alone / name, four / name)
    for scheme in "bc":
        config = commands.checkpoint.load((four / f"hybrid {scheme}" / "checkpoints" / "last").resolve()).config
        assert courses.losses(four / f"hybrid {scheme}") == pytest.approx(_reference(config, scheme, 4), rel=1e-5)
    gradients = 15 * NUMBER * sum(_sizes(four / "ddp").values()) * 2 * 3 // 4
    assert courses.summary(four / "ddp")["bytes_sent"]["gradients"] == pytest.approx(gradients, rel=1e-5)
