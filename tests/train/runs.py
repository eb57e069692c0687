"""Short runs of a small net on a small set, in this process, in ranks, or as a process of their own that can be killed.

python -m tests.train.runs '{"out": "...", "max_steps": 5, ...}' [RUN TO RESUME]
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import commands
from alexnet_fast.train.config import TrainConfig
from tests.data.pictures import write_fashion

ROOT = Path(__file__).parents[2]
# 119 images in steps of 10: twelve steps an epoch, of which the last has nine images.
SIZES = {"train": 119, "val": 31}
GIVEN: dict[str, Any] = {"batch_size": 10, "epochs": 2, "log_steps": 1, "lr": 0.01, "checkpoint_steps": 0, "workers": 0}


def small_net(config: TrainConfig) -> nn.Module:
    torch.manual_seed(config.seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Dropout(config.dropout),
        nn.Linear(8 * 49, config.num_classes),
    )


def options(out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What a new run is given: GIVEN, a small set of its own beside ``out``, and ``given``."""
    data = write_fashion(out.parent / "set", **SIZES)
    return {**GIVEN, "data": f"fashion-mnist:{data}", "out": str(out), **given}


def train(out: Path, resume: Path | None = None, **given: Any) -> int:
    """A run in this process, or in ranks that it starts."""
    return commands.train(given if resume else options(out, given), str(resume) if resume else None, small_net)


def start(
    out: Path,
    resume: Path | None = None,
    torchrun: tuple[str, ...] = (),
    module: str = "tests.train.runs",
    **given: Any,
) -> subprocess.Popen:
    """A run of ``module`` in a process of its own, or in those that torchrun starts with the words given for it.

    Standard output and error go to ``out``'s name with .log.
    """
    words = json.dumps(given if resume else options(out, given))
    through = ["torch.distributed.run", *torchrun, "-m"] if torchrun else []
    command = [sys.executable, "-m", *through, module, words]
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [*command, *([str(resume)] if resume else [])],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=_hear_sigint,
        )


def _hear_sigint() -> None:
    """A shell starts its background jobs deaf to SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    """Returns once ``run`` has reported ``step``."""
    deadline = time.monotonic() + 300
    while all(row.get("step", 0) < step for row in rows(run)):
        assert process.poll() is None, run.with_suffix(".log").read_text()
        assert time.monotonic() < deadline, run.with_suffix(".log").read_text()
        time.sleep(0.01)


def rows(run: Path) -> list[dict[str, Any]]:
    """The whole rows of metrics.jsonl, without what a clock gave."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    clocks = ("images_per_second", "seconds")
    return [{key: value for key, value in json.loads(line).items() if key not in clocks} for line in lines]


def tensors(run: Path, link: str = "last") -> dict[str, Tensor]:
    """Weights and momentum of a checkpoint."""
    folder = run / "checkpoints" / link
    model, momentum = (load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer"))
    return {**model, **{f"momentum of {key}": value for key, value in momentum.items()}}


def assert_same_bits(one: Path, other: Path) -> None:
    a, b = tensors(one), tensors(other)
    assert set(a) == set(b)
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started and that run still."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += [int(child) for child in task.read_text().split()]
    return [child for child in found if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


def main(build: Callable[[TrainConfig], nn.Module]) -> None:
    torch.set_num_threads(1)  # two threads would wait for each other over every small operator of a busy machine
    resumed = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    try:
        sys.exit(commands.train(json.loads(sys.argv[1]), str(resumed) if resumed else None, build))
    except (InputError, RunError) as error:
        print(f"error: {error}")
        sys.exit(2 if isinstance(error, InputError) else 1)


if __name__ == "__main__":
    main(small_net)
