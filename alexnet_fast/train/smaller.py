"""What a smaller net is worth: size, accuracy and speed before and after, as the commands shrink and quantize show."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from alexnet_fast.data.sources import Split
from alexnet_fast.errors import InputError
from alexnet_fast.parallel import Ranks, plan_devices
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.evaluate import evaluate, using
from alexnet_fast.train.inference import Found, model_of

BATCH, ROUNDS = 32, 9  # of the timings: images at a time, and calls of which the fastest counts


class Net(NamedTuple):
    """What is measured: a net on its device, and how its accuracy is found."""

    module: nn.Module
    bytes: int  # of the weights, or of the file
    parameters: int
    config: TrainConfig


class Measured(NamedTuple):
    bytes: int
    parameters: int
    top1: float
    images_s: float  # in float32, in batches of BATCH
    latency_ms: float  # of one image


COLUMNS = "", "bytes", "parameters", "top-1", "images/s", "one image, ms"


def net_of(found: Found, config: TrainConfig) -> Net:
    """What was found, on this machine's device."""
    module = model_of(found, torch.device(plan_devices(1)))
    parameters = list(module.parameters())
    return Net(module, sum(p.nbytes for p in parameters), sum(p.numel() for p in parameters), config)


def compare(nets: dict[str, Net], split: Split) -> dict[str, Measured]:
    """Each net on the held-out images ``split``, and their speeds, in calls that alternate."""
    device = torch.device(plan_devices(1))
    accuracies = {}
    for name, net in nets.items():
        with using(net.config.backend):
            result, bad = evaluate(net.module, split, net.config, Ranks(device=device))
        if len(bad) > net.config.max_bad * len(split):
            path, reason = next(iter(bad.items()))
            raise InputError(f"{len(bad)} of {len(split)} files are unusable, such as {path}: {reason}")
        accuracies[name] = result.top1
    side = next(iter(nets.values())).config.image_size
    times: dict[tuple[str, int], float] = {}
    with torch.inference_mode():
        for _ in range(2 + ROUNDS):
            for batch in (BATCH, 1):
                images = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
                for name, net in nets.items():
                    start = time.perf_counter()
                    net.module(images).cpu()
                    seconds = time.perf_counter() - start
                    times[name, batch] = min(seconds, times.get((name, batch), seconds))
    return {
        name: Measured(net.bytes, net.parameters, accuracies[name], BATCH / times[name, BATCH], 1e3 * times[name, 1])
        for name, net in nets.items()
    }


def cells(name: str, row: Measured, before: Measured) -> list[str]:
    """A row of the table, with how many times smaller it is than ``before``."""
    times = "" if row is before else f" ({before.bytes / row.bytes:.0f}× smaller)"
    numbers = f"{row.bytes / 1e6:.2f} MB{times}", f"{row.parameters:,}", f"{row.top1:.2%}"
    return [name, *numbers, f"{row.images_s:.0f}", f"{row.latency_ms:.2f}"]


def markdown(rows: dict[str, Measured]) -> str:
    """The table as documents have it."""
    before = next(iter(rows.values()))
    lines = [
        COLUMNS,
        ["---", *["---:"] * (len(COLUMNS) - 1)],
        *(cells(name, row, before) for name, row in rows.items()),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show(rows: dict[str, Measured]) -> None:
    before = next(iter(rows.values()))
    table = Table(*COLUMNS)
    for name, row in rows.items():
        table.add_row(*cells(name, row, before))
    Console().print(table)
