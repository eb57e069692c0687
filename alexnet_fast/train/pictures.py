"""What a run looks like: its curves, the filters of its first layer, and why its net answers as it does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from alexnet_fast.terminal import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = 50  # up to so many classes their names have room beside the table
FILTER_PIXEL = 4  # edge of one weight in conv1.png, in pixels
FILTER_ROWS = 8
TITLE = 14  # pixels of a line above the filters


def _label(name: str) -> str:
    """``name`` as matplotlib shows it as it is, which sets formulas between dollars and stops at broken letters."""
    return shown(name).replace("$", r"\$")


def _save(figure: Figure, path: Path | BinaryIO, dpi: int) -> None:
    with warnings.catch_warnings():
        # Its font has no Chinese, for one: boxes stand for such letters, and a line for each would say so.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(path, dpi=dpi)


def draw_curves(rows: list[dict[str, Any]], path: Path | BinaryIO) -> None:
    """Loss, accuracy and learning rate over steps, from the rows of metrics.jsonl; raises ImportError without
    matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = dict(zip(("loss", "top1", "lr"), figure.subplots(1, 3), strict=True))
    steps = [row for row in rows if row["kind"] == "step"]
    evaluations = [row for row in rows if row["kind"] in ("epoch", "stop")]
    for name, title in (("loss", "cross-entropy"), ("top1", "top-1 accuracy"), ("lr", "learning rate")):
        panel = panels[name]
        panel.plot([row["step"] for row in steps], [row[name] for row in steps], color="tab:blue", label="training")
        if name != "lr":
            values = [row[f"val_{name}"] for row in evaluations]
            panel.plot([row["step"] for row in evaluations], values, "o-", color="tab:orange", label="held out")
            panel.legend(loc="upper right" if name == "loss" else "lower right")
        panel.set(title=title, xlabel="step")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    _save(figure, path, 120)


def draw_runs(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Training loss, held-out loss and held-out accuracy over steps of several runs in one picture, by name; raises
    ImportError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 3), ("loss", "val_loss", "val_top1"), strict=True)
    titles = {"loss": "training cross-entropy", "val_loss": "held-out cross-entropy", "val_top1": "held-out accuracy"}
    for panel, value in panels:
        lines = {}
        for number, (name, rows) in enumerate(runs.items()):
            points = [(row["step"], row[value]) for row in rows if value in row]
            # Each run's line is thinner than the one before it, so that runs that agree are all seen.
            style = {"linewidth": 4 / (1 + number), "marker": "" if value == "loss" else "o"}
            lines |= dict.fromkeys(panel.plot(*zip(*points, strict=True), **style), _label(name))
        panel.set(title=titles[value], xlabel="step")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        # Told by hand: of its own accord a legend leaves out what begins with an underscore.
        panel.legend(lines.keys(), lines.values(), loc="lower right" if value == "val_top1" else "upper right")
    _save(figure, path, 120)


def draw_confusion(counts: Tensor, names: list[str], path: Path | BinaryIO) -> None:
    """How often each label, a row, got each answer, as a share of the label's images; raises ImportError without
    matplotlib.
    """
    from matplotlib.figure import Figure

    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy()
    side = min(20.0, 4 + 0.3 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    panel = figure.subplots()
    picture = panel.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(picture, ax=panel, shrink=0.6, label="share of the label's images")
    panel.set(title="held-out images", xlabel="answer", ylabel="label")
    if len(names) <= NAMED:
        shown_names = [_label(name) for name in names]
        panel.set_xticks(range(len(names)), shown_names, rotation=90)
        panel.set_yticks(range(len(names)), shown_names)
    _save(figure, path, 120)


class Explained(NamedTuple):
    """One picture and why it is what it is said to be: uint8 (H, W, 3); Grad-CAM (h, w); the probability that is lost
    where a square covers it (H, W); guided gradients (3, H, W)."""

    title: str
    pixels: np.ndarray
    grad_cam: Tensor
    occlusion: Tensor
    guided: Tensor


def draw_explained(rows: list[Explained], layer: str, path: Path) -> None:
    """A row for each picture; raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6 * len(rows)), layout="constrained")
    titles = f"Grad-CAM at {layer}", "probability lost where covered", "guided gradients"
    for row, panels in zip(rows, figure.subplots(len(rows), 4, squeeze=False), strict=True):
        grey = row.pixels.mean(2)
        height, width = grey.shape
        reach = max(float(row.occlusion.abs().max()), 1e-6)
        maps = {"extent": (-0.5, width - 0.5, height - 0.5, -0.5), "alpha": 0.6}
        panels[0].imshow(row.pixels)
        for panel, values, colours in (
            (panels[1], row.grad_cam, {"cmap": "inferno", "vmin": 0, "interpolation": "bilinear"}),
            (panels[2], row.occlusion, {"cmap": "RdBu_r", "vmin": -reach, "vmax": reach}),
        ):
            panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
            figure.colorbar(panel.imshow(values.numpy(), **maps, **colours), ax=panel, shrink=0.8)
        panels[3].imshow(_scaled(row.guided[None], float(row.guided.abs().max()))[0])
        for panel, title in zip(panels, (_label(row.title), *titles), strict=True):
            panel.set(title=title, xticks=[], yticks=[])
    _save(figure, path, 100)


def draw_strongest(rows: dict[str, list[tuple[float, np.ndarray]]], path: Path) -> None:
    """A row for each of a layer's channels, by name: pictures uint8 (h, w, 3), each under its activation; raises
    ImportError without matplotlib."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(1.3 * columns + 1.2, 1.5 * len(rows)), layout="constrained")
    for (name, patches), panels in zip(rows.items(), figure.subplots(len(rows), columns, squeeze=False), strict=True):
        panels[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for panel, (value, pixels) in zip(panels, patches, strict=True):
            panel.imshow(pixels)
            panel.set(xticks=[], yticks=[])
            panel.set_title(f"{value:.3g}", fontsize=8)
    _save(figure, path, 100)


def draw_filters(model: nn.Module, step: int | None, path: Path | BinaryIO) -> None:
    """The first convolution's filters as RGB pictures, 8 in a column, under a line with their scale, which is one for
    all: 0 is grey, and the weight farthest from it black or white.
    """
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Conv2d)).detach().float().cpu()
    reach = float(weight.abs().max())
    filters = _scaled(weight, reach)
    count, height, width, _ = filters.shape
    columns = -(-count // FILTER_ROWS)
    sheet = np.full((FILTER_ROWS * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, np.uint8)
    for number, picture in enumerate(filters):
        top, left = number // columns * (height + 1) + 1, number % columns * (width + 1) + 1
        sheet[top : top + height, left : left + width] = picture
    size = (sheet.shape[1] * FILTER_PIXEL, sheet.shape[0] * FILTER_PIXEL)
    when = "" if step is None else f" after step {step}"
    lines = [f"conv1{when}: {count} filters", f"black -{reach:.2g}, grey 0, white {reach:.2g}"]
    font = ImageFont.load_default(TITLE - 4)
    width = max(size[0], *(round(font.getlength(line)) + 8 for line in lines))
    picture = Image.new("RGB", (width, size[1] + TITLE * len(lines)), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(picture).text((4, 2 + TITLE * number), line, "black", font)
    picture.paste(Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST), (0, TITLE * len(lines)))
    picture.save(path, "PNG")


def _scaled(weight: Tensor, reach: float) -> np.ndarray:
    """(filters, 3, h, w) to uint8 (filters, h, w, 3): -reach black, reach white."""
    scaled = weight / max(reach, 1e-12) * 0.5 + 0.5
    return (scaled * 255).round().byte().permute(0, 2, 3, 1).numpy()
