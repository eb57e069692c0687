"""The command report: a run as one page of HTML that needs no other file and asks no server for anything."""

from __future__ import annotations

import base64
import contextlib
import heapq
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from alexnet_fast import backends
from alexnet_fast.data import NOT_COUNTED, Data, Transform, evaluation_batches
from alexnet_fast.data.loader import worker_deaths_named
from alexnet_fast.errors import InputError, needs
from alexnet_fast.parallel import plan_devices
from alexnet_fast.terminal import shown
from alexnet_fast.train import checkpoint
from alexnet_fast.train.checkpoint import Checkpoint, check_writable
from alexnet_fast.train.commands import open_run_data
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.evaluate import CONFUSION_CLASSES, scores, using
from alexnet_fast.train.model import build_model, skeleton
from alexnet_fast.train.outputs import check_kind, written
from alexnet_fast.train.pictures import draw_confusion, draw_curves, draw_filters
from alexnet_fast.train.report import read_curves

SMALL = 96  # pixels; larger pictures stand as JPEG
STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr { border-top: 1px solid #8884; } td { overflow-wrap: anywhere; }
img { max-width: 100%; background: white; }
.worst { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure img { width: 100%; image-rendering: pixelated; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; } .wrong { color: #c33; }
"""


@dataclass(frozen=True, order=True)
class Miss:
    """A held-out image: its loss, number, label, answer, the answer's and the label's probability, and its pixels."""

    loss: float
    number: int
    label: int
    answer: int
    sure: float
    right: float
    pixels: Any = None


def write_page(
    run: Path, out: Path | None, worst: int, build: Callable[[TrainConfig], nn.Module] = build_model
) -> Path:
    """Writes the page of ``run`` to ``out``, or to report.html in its folder, and returns where: curves, filters,
    confusion, classes, options, and the ``worst`` held-out pictures by loss, all of the best checkpoint.

    Raises:
        InputError: there is no run that was evaluated, or its images have changed; ``out`` cannot be written;
            matplotlib is missing.
    """
    needs("report", "matplotlib")
    out = out or run / "report.html"
    check_kind(out)
    check_writable(out, "--out")
    rows = read_curves(run)
    found = checkpoint.load(checkpoint.find(run, "best", "last"))
    if found.config.num_classes > CONFUSION_CLASSES:
        raise InputError(f"report: is for up to {CONFUSION_CLASSES} classes, {run} has {found.config.num_classes}")
    found.check(skeleton(found.config, build))
    config = replace(found.config, backend=backends.current(), weights=None)
    data = open_run_data(config, held_out_alone=True)
    if data.classes != found.classes:
        raise InputError(f"{run}: DATA has changed: {config.data} now has {len(data.classes)} classes, or others")
    net = build(config)
    net.load_state_dict(found.read(net)[0])
    with using(config.backend), worker_deaths_named():
        confusion, misses = _evaluated(net, data, config, worst)
    if not confusion.any():
        raise InputError(f"none of the {len(data.val)} held-out images could be used")
    names = data.classes + [f"class {number}" for number in range(len(data.classes), config.num_classes)]
    text = _page(run, rows, found, net, names, confusion, misses, data)
    try:
        with written(out) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out: cannot write {out}: {error.strerror or error}") from None
    return out


def _evaluated(net: nn.Module, data: Data, config: TrainConfig, worst: int) -> tuple[Tensor, list[Miss]]:
    """How often each label, a row, got which answer; and the ``worst`` images, the largest loss first."""
    device = torch.device(plan_devices(1))
    net = net.to(device, memory_format=torch.channels_last).eval()
    confusion = torch.zeros(config.num_classes, config.num_classes, dtype=torch.int64)
    misses: list[Miss] = []
    batches = evaluation_batches(
        data.val,
        Transform(config.transform, config.image_size),
        batch_size=config.batch_size,
        rank=0,
        world=1,
        workers=config.workers,
        device=device,
    )
    with torch.no_grad(), contextlib.closing(batches):
        for batch in batches:
            logits = scores(net, batch.images, config, device, False).cpu()
            kept = batch.labels != NOT_COUNTED
            logits, labels = logits[kept], batch.labels[kept]
            losses = F.cross_entropy(logits, labels, reduction="none")
            sure, answers = logits.softmax(1).max(1)
            confusion.index_put_((labels, answers), torch.ones_like(labels), accumulate=True)
            numbers = batch.index[kept].tolist()
            columns = (losses, labels, answers, sure, (-losses).exp())
            for place, (loss, label, answer, *chances) in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
                if len(misses) < worst or (misses and loss > misses[0].loss):
                    pixels = batch.images[kept][place].permute(1, 2, 0).cpu().numpy()
                    keep = heapq.heappush if len(misses) < worst else heapq.heapreplace
                    keep(misses, Miss(loss, numbers[place], int(label), int(answer), *chances, pixels))
    return confusion, sorted(misses, reverse=True)


def _page(
    run: Path,
    rows: list[dict[str, Any]],
    found: Checkpoint,
    net: nn.Module,
    names: list[str],
    confusion: Tensor,
    misses: list[Miss],
    data: Data,
) -> str:
    step, count, hits = found.state["step"], int(confusion.sum()), int(confusion.diagonal().sum())
    config = found.config
    facts = {
        "data": "noise" if config.synthetic else config.data,
        "net": f"{config.variant}, {config.image_size}x{config.image_size} pixels",
        "checkpoint": f"{found.path.name}, the run's best",
        "held-out accuracy": f"{hits / count:.2%} ({hits} of {count})",
        "trained": f"{step} steps of {config.step_images} images",
        "seed": config.seed,
    }
    if count < len(data.val):
        facts["not counted"] = f"{len(data.val) - count} held-out files that could not be used"
    parts = [
        ("", _table(facts)),
        ("Curves", _drawn(lambda file: draw_curves(rows, file), "loss, accuracy and learning rate over steps")),
        ("Filters of the first layer", _drawn(lambda file: draw_filters(net, step, file), "filters of conv1")),
        ("Confusion", _drawn(lambda file: draw_confusion(confusion, names, file), "labels and answers")),
        ("Classes, the worst first", _classes(confusion, names)),
        (f"The {len(misses)} pictures with the largest loss", _worst(misses, names, data)),
        ("Options", f"<details><summary>all of them</summary>{_table(config.to_json())}</details>"),
    ]
    title = f"{_text(run.resolve().name)}: {hits / count:.2%}"
    body = "\n".join((f"<h2>{_text(head)}</h2>\n" if head else "") + part for head, part in parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _text(value: object) -> str:
    """``value`` on one line, with nothing in it read as markup: strangers may have named the files and classes."""
    return escape(shown(value))


def _picture(content: bytes, kind: str, about: str) -> str:
    return f'<img alt="{_text(about)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def _drawn(draw: Callable[[io.BytesIO], None], about: str) -> str:
    file = io.BytesIO()
    draw(file)
    return _picture(file.getvalue(), "png", about)


def _classes(confusion: Tensor, names: list[str]) -> str:
    """A row for each class: its images, how many of them were right, and the commonest wrong answer."""
    rows = []
    for name, label, counts in zip(names, range(len(names)), confusion.tolist(), strict=True):
        if images := sum(counts):
            hits, counts[label] = counts[label], 0
            most = max(range(len(counts)), key=counts.__getitem__)
            instead = f"{_text(names[most])} ({counts[most]})" if counts[most] else ""
            rows.append((hits / images, label, name, images, hits, instead))
    cells = "\n".join(
        f'<tr><td>{_text(name)}</td><td class="n">{images}</td><td class="n">{hits}</td>'
        f'<td class="n">{share:.1%}</td><td>{instead}</td></tr>'
        for share, _, name, images, hits, instead in sorted(rows)
    )
    head = '<th>class</th><th class="n">images</th><th class="n">right</th><th class="n">accuracy</th>'
    return f"<table><thead><tr>{head}<th>most often instead</th></tr></thead><tbody>\n{cells}\n</tbody></table>"


def _worst(misses: list[Miss], names: list[str], data: Data) -> str:
    paths = getattr(data.val, "paths", None)
    figures = []
    for miss in misses:
        kind = "png" if max(miss.pixels.shape) <= SMALL else "jpeg"
        file = io.BytesIO()
        Image.fromarray(miss.pixels).save(file, kind)
        name = paths[miss.number].name if paths else f"image {miss.number}"
        told = f"{_text(names[miss.label])} {miss.right:.1%}"
        if miss.answer != miss.label:
            told += f'<br><span class="wrong">{_text(names[miss.answer])} {miss.sure:.1%}</span>'
        picture = _picture(file.getvalue(), kind, name)
        figures.append(
            f"<figure>{picture}<figcaption>{told}<br>{_text(name)}, loss {miss.loss:.2f}</figcaption></figure>"
        )
    return '<div class="worst">\n' + "\n".join(figures) + "\n</div>"


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items())
    return f"<table><tbody>{rows}</tbody></table>"
