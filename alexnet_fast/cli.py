"""``alexnet-fast train [DATA] | eval | predict IMAGE… | features IMAGE… | prepare SRC DST | curves RUN… | bench |
doctor``

Exit codes: 0 done; 1 the run broke off; 2 the input cannot be used (one line on standard error says why); 130 and 143
stopped by Ctrl-C or SIGTERM, after a checkpoint.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from alexnet_fast import _C, __version__, backends, native
from alexnet_fast.backends import BackendError
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.variants import ABLATIONS
from alexnet_fast.terminal import escape_unknown_letters, one_line
from alexnet_fast.train.config import without
from alexnet_fast.train.recipes import RECIPES

app = typer.Typer(
    help="AlexNet: train it, evaluate it, use it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SCHEDULES = "step, multistep, plateau, cosine or constant"
DATA_HELP = "digits, fashion-mnist:DIR, or a folder: train/CLASS/* and val/CLASS/*, or what prepare wrote"
BACKEND_HELP = ", ".join(("auto", *backends.NAMES))
IMAGES, NET, RUN, RANKS = "Images", "Net", "Run", "Ranks and loading"


def _option(help: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


def _numbers(help: str, panel: str | None = None) -> Any:
    def parse(text: str) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in text.split(","))
        except ValueError:
            raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}") from None

    return typer.Option(help=help, rich_help_panel=panel, show_default=False, parser=parse, metavar="NUMBERS")


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=f"{DATA_HELP} (digits)", show_default=False)] = None,
    recipe: Annotated[str | None, _option(f"{', '.join(RECIPES)}: all that it states, but for what is given")] = None,
    epochs: Annotated[int | None, _option("passes over the training set (digits 6, folders 90)")] = None,
    batch_size: Annotated[
        int | None, _option("images a step, over all ranks (digits 64, folders 256)", "--batch-size", "-b")
    ] = None,
    lr: Annotated[float | None, _option("learning rate (digits 0.003, folders 0.01)")] = None,
    schedule: Annotated[
        str | None,
        _option(f"{SCHEDULES} (digits cosine, folders step)", "--schedule", "--sched"),
    ] = None,
    warmup: Annotated[
        float | None, _option("epochs of linear warm-up (digits 1, folders 0)", "--warmup", "--warmup-epochs")
    ] = None,
    lr_step: Annotated[
        float | None, _option("epochs between cuts of schedule step (30)", "--lr-step", "--lr-step-size")
    ] = None,
    lr_milestones: Annotated[str | None, _numbers("epochs of the cuts of schedule multistep, as in 25,51,79")] = None,
    lr_patience: Annotated[int | None, _option("epochs without improvement before schedule plateau cuts (5)")] = None,
    lr_cuts: Annotated[int | None, _option("cuts of schedule plateau at most (3)")] = None,
    lr_gamma: Annotated[float | None, _option("factor of each cut (0.1)")] = None,
    lr_head: Annotated[float | None, _option("learning rate of the last layer (as --lr)")] = None,
    bias_lr: Annotated[float | None, _option("factor on the learning rate for biases (1)")] = None,
    bias_decay: Annotated[float | None, _option("factor on the weight decay for biases (1)")] = None,
    rule: Annotated[str | None, _option("of SGD: torch, or 2012 with the rate inside the velocity (torch)")] = None,
    momentum: Annotated[float | None, _option("of SGD (0.9)")] = None,
    weight_decay: Annotated[
        float | None, _option("of SGD (digits 5e-4, folders 1e-4)", "--weight-decay", "--wd")
    ] = None,
    label_smoothing: Annotated[float | None, _option("share of the target spread over all classes (0)")] = None,
    transform: Annotated[str | None, _option("crop, resized-crop or shift (folders crop)", panel=IMAGES)] = None,
    colour_noise: Annotated[
        float | None, _option("deviation of noise along RGB's principal components (0)", panel=IMAGES)
    ] = None,
    colour_divisor: Annotated[
        float | None, _option("what training images are divided by after the noise (1)", panel=IMAGES)
    ] = None,
    mean: Annotated[str | None, _numbers("R,G,B in 0..1, taken off (the variant's)", panel=IMAGES)] = None,
    std: Annotated[str | None, _numbers("R,G,B in 0..1, divided by (the variant's)", panel=IMAGES)] = None,
    ten_crop: Annotated[
        bool | None,
        _option("eval averages over ten crops (no)", "--ten-crop/--no-ten-crop", panel=IMAGES),
    ] = None,
    variant: Annotated[str | None, _option(f"{', '.join(VARIANTS)} (torchvision)", panel=NET)] = None,
    no_lrn: Annotated[bool | None, _option("leave local response normalization out", "--no-lrn", panel=NET)] = None,
    pool_2x2: Annotated[bool | None, _option("pool 2x2 windows that do not overlap", "--pool-2x2", panel=NET)] = None,
    no_talk: Annotated[
        bool | None, _option("towers that meet in fc8 alone, conv2 and fc6 wider", "--no-talk", panel=NET)
    ] = None,
    image_size: Annotated[
        int | None,
        _option("side in pixels (digits 64, folders the variant's)", "--image-size", "--img-size", panel=NET),
    ] = None,
    num_classes: Annotated[int | None, _option("outputs (as many as DATA has classes)", panel=NET)] = None,
    dropout: Annotated[float | None, _option("of fc6 and fc7 (digits 0.2, folders 0.5)", panel=NET)] = None,
    init: Annotated[str | None, _option("variant (as it states) or kaiming (digits kaiming)", panel=NET)] = None,
    init_std: Annotated[str | None, _numbers("deviations of the eight layers' weights", panel=NET)] = None,
    init_bias: Annotated[str | None, _numbers("biases of the eight layers", panel=NET)] = None,
    weights: Annotated[
        str | None,
        _option("pretrained: DEFAULT, a file, a checkpoint's folder or a URL; a new head if classes differ", panel=NET),
    ] = None,
    freeze_features: Annotated[
        bool | None, _option("train the classifier alone", "--freeze-features", panel=NET)
    ] = None,
    out: Annotated[
        str | None, _option("output folder (runs/DATA-VARIANT-TIME)", "--out", "--output", panel=RUN)
    ] = None,
    resume: Annotated[
        str | None, _option("go on with the run in this folder, or from this checkpoint of it", panel=RUN)
    ] = None,
    max_steps: Annotated[int | None, _option("stop after so many steps in all", panel=RUN)] = None,
    checkpoint_steps: Annotated[
        int | None, _option("steps between checkpoints inside an epoch, 0 for none (digits 0, folders 1000)", panel=RUN)
    ] = None,
    keep_checkpoints: Annotated[int | None, _option("the newest so many are kept, and the best (2)", panel=RUN)] = None,
    log_steps: Annotated[int | None, _option("steps between rows of metrics.jsonl (10)", panel=RUN)] = None,
    seed: Annotated[int | None, _option("of everything drawn (0)", panel=RUN)] = None,
    tensorboard: Annotated[
        bool | None, _option("TensorBoard logs in the output folder", "--tensorboard", panel=RUN)
    ] = None,
    nproc: Annotated[int | None, _option("ranks to start here: NCCL with GPUs, gloo without (1)", panel=RANKS)] = None,
    parallel: Annotated[str | None, _option("how ranks share a step: ddp, towers or hybrid (ddp)", panel=RANKS)] = None,
    hybrid_scheme: Annotated[str | None, _option("of One weird trick: a, b or c (a)", panel=RANKS)] = None,
    gradients: Annotated[str | None, _option("sent as fp32 or bf16 (fp32)", panel=RANKS)] = None,
    precision: Annotated[str | None, _option("fp32 or bf16 autocast (fp32)", panel=RANKS)] = None,
    backend: Annotated[str | None, _option(f"{BACKEND_HELP} (auto)", panel=RANKS)] = None,
    workers: Annotated[
        int | None,
        _option(
            "loader processes or threads a rank (digits 0, folders up to 4)",
            "--workers",
            "-j",
            panel=RANKS,
        ),
    ] = None,
    cache: Annotated[
        str | None, _option("none, or device: prepared DATA in the device's memory (none)", panel=RANKS)
    ] = None,
    synthetic: Annotated[
        bool | None, _option("noise instead of DATA: times all but reading", "--synthetic", panel=RANKS)
    ] = None,
    max_bad: Annotated[float | None, _option("share of a set's files that may be unusable (0.05)", panel=RANKS)] = None,
) -> None:
    """Train AlexNet. Defaults follow DATA; config.json in the output folder holds them all."""
    given = {name: value for name, value in locals().items() if value is not None and name != "resume"}
    from alexnet_fast.train import train as run

    taken = [name for name in ABLATIONS if given.pop(name.replace("-", "_"), False)]
    given = without(given, taken) if taken else given
    raise typer.Exit(run(given, resume))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a run's folder (its best checkpoint), or one of its checkpoints")],
    data: Annotated[str | None, typer.Argument(help=f"{DATA_HELP} (the run's own)", show_default=False)] = None,
    batch_size: Annotated[int | None, _option("images at a time, over all ranks", "--batch-size", "-b")] = None,
    workers: Annotated[int | None, _option("loader processes a rank", "--workers", "-j")] = None,
    nproc: Annotated[int | None, _option("ranks to start here (1)")] = None,
    precision: Annotated[str | None, _option("fp32 or bf16")] = None,
    backend: Annotated[str | None, _option(BACKEND_HELP)] = None,
    ten_crop: Annotated[
        bool | None,
        _option("average over corners, centre and mirrors (as the recipe)", "--ten-crop/--no-ten-crop"),
    ] = None,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """Loss, top-1 and top-5 accuracy on held-out images."""
    from alexnet_fast.train import evaluate_checkpoint

    named = {"batch_size": batch_size, "workers": workers, "nproc": nproc, "precision": precision, "backend": backend}
    named["ten_crop"] = ten_crop
    options = {name: value for name, value in named.items() if value is not None}
    raise typer.Exit(evaluate_checkpoint(checkpoint, data, options, as_json))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="picture files")],
    weights: Annotated[str, _option("a run's folder (its best checkpoint), or one of its checkpoints")],
    top: Annotated[int, typer.Option(min=1, help="classes to name for each picture")] = 5,
    backend: Annotated[str | None, _option(f"{BACKEND_HELP} (auto)")] = None,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """The likeliest classes of pictures, with their probabilities."""
    from alexnet_fast.train import predict as run

    raise typer.Exit(run(images, weights, top, backend or backends.current(), as_json))


@app.command()
def features(
    images: Annotated[list[Path], typer.Argument(help="picture files")],
    weights: Annotated[str, _option("a run's folder (its best checkpoint), or one of its checkpoints")],
    layer: Annotated[list[str], _option("conv1, relu5, fc7 … or a module's name; may be given several times")],
    out: Annotated[Path, _option("file to write: an array for each layer, and the pictures' paths", "--out")],
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="images at a time")] = 32,
    overwrite: Annotated[bool, _option("replace FILE if it is there", "--overwrite")] = False,
    backend: Annotated[str | None, _option(f"{BACKEND_HELP} (auto)")] = None,
) -> None:
    """What layers of a net give for pictures, as a .npz file."""
    from alexnet_fast.train.extract import extract

    raise typer.Exit(extract(images, weights, layer, out, batch_size, overwrite, backend or backends.current()))


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a folder with train/CLASS/* and val/CLASS/*")],
    target: Annotated[str | None, typer.Argument(metavar="DST", help="what to write, or to go on with")] = None,
    size: Annotated[int, _option("side of the stored pictures in pixels (256, for nets of 192 to 256)")] = 256,
    shard_size: Annotated[int, _option("files of SRC in a shard (1000)")] = 1000,
    workers: Annotated[int | None, _option("processes (as many as cores)", "--workers", "-j")] = None,
    max_bad: Annotated[float, _option("share of a set's files that may be unusable (0.05)")] = 0.05,
    check: Annotated[bool, _option("verify the folder, changing nothing", "--check")] = False,
) -> None:
    """Decode pictures once, into shards that train and eval take for DATA. A run that was killed goes on.

    prepare --check DST names every file that is damaged, missing or foreign.
    """
    from alexnet_fast.data import commands

    if check:
        raise typer.Exit(commands.check(Path(target or source), workers))
    if target is None:
        raise InputError("prepare: expected SRC and DST, or --check DST")
    options = {"size": size, "shard_size": shard_size, "workers": workers, "max_bad": max_bad}
    raise typer.Exit(commands.prepare(Path(source), Path(target), **options))


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    out: Annotated[Path, _option("picture to write (curves.png)", "--out", "--output")] = Path("curves.png"),
    names: Annotated[str | None, _option("what to call them, separated by commas (the folders' names)")] = None,
) -> None:
    """Loss and accuracy of several runs in one picture."""
    from alexnet_fast.train import compare

    called = [run.name for run in runs] if names is None else names.split(",")
    if len(called) != len(runs):
        raise InputError(f"--names: expected {len(runs)} names, got {len(called)}")
    compare(runs, called, out)


@app.command()
def bench(
    planned: Annotated[
        bool, _option("instead of measuring: a model of training on two devices, bytes and times", "--plan")
    ] = False,
    batch_size: Annotated[
        int | None, _option("images (CPU 16, GPU 256, --plan 256 over both devices)", "--batch-size", "-b")
    ] = None,
    variant: Annotated[str, _option(f"of --plan: {', '.join(VARIANTS)} (paper)")] = "paper",
    tflops: Annotated[float, _option("of --plan: TFLOP/s that one device sustains (400)")] = 400,
    link: Annotated[float, _option("of --plan: GB/s between devices, each way (450)")] = 450,
    latency: Annotated[float, _option("of --plan: microseconds until an exchange begins (15)")] = 15,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """One look at this machine's speed against PyTorch's own modules, or, with --plan, at two devices' step."""
    from alexnet_fast import bench as measure

    if variant not in VARIANTS:
        raise InputError(f"--variant: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    for name, value in (("--batch-size", batch_size), ("--tflops", tflops), ("--link", link)):
        if value is not None and value <= 0:
            raise InputError(f"{name}: expected a positive number, got {value}")
    if planned and batch_size and batch_size % 2:
        raise InputError(f"--batch-size: expected an even number for two devices, got {batch_size}")
    if planned:
        plans = measure.plan(variant, batch_size or 256, tflops, measure.Link(link, latency))
        rows = [asdict(row) for row in plans]
        head = f"{variant}, batch {batch_size or 256}, assumed: {tflops:g} TFLOP/s, {link:g} GB/s, {latency:g} µs"
        cells = [
            (
                *(row.mode, f"{row.gradients / 1e6:.1f}", f"{row.activations / 1e6:.1f}", f"{1e3 * row.compute:.3f}"),
                *(f"{1e3 * row.exchange:.3f}", f"{1e3 * row.exposed:.3f}", f"{row.compute / row.step:.0%}"),
            )
            for row in plans
        ]
        columns = (
            "mode",
            "gradients, MB",
            "activations, MB",
            "compute, ms",
            "exchange, ms",
            "not hidden, ms",
            "efficiency",
        )
    else:
        seen = measure.look(batch=batch_size)
        rows = [{**row._asdict(), "ratio": row.ratio} for row in seen]
        head = f"{torch.get_num_threads()} threads, torch {torch.__version__}; medians, both sides channels_last"
        cells = [
            (
                *(row.case, row.dtype, f"{1e3 * row.ours:.2f}", f"{1e3 * row.eager:.2f}"),
                *(f"{row.ratio:.2f}×", f"{row.images_s:.0f}"),
            )
            for row in seen
        ]
        columns = "case", "dtype", "ours, ms", "PyTorch, ms", "ratio", "images/s"
    if as_json:
        print(json.dumps({"about": head, "rows": rows}))
        return
    table = Table(*columns, title=head)
    for row in cells:
        table.add_row(*row)
    Console().print(table)


@app.command()
def doctor(as_json: Annotated[bool, _option("print JSON", "--json")] = False) -> None:
    """What is installed, what was built, and which backends work here."""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    facts: dict[str, Any] = {
        "alexnet_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "pillow", "safetensors")},
        **{f"{name} (extra)": _version(name) for name in ("scikit-learn", "matplotlib", "tensorboard")},
        "cores": len(os.sched_getaffinity(0)),
        "gpus": ", ".join(gpus) or "none",
    }
    facts |= {f"built: {name}": value for name, value in _C.build_info().items()}
    facts["compiled module"] = native.describe()
    report = backends.report()
    if as_json:
        states = {status.name: {"available": status.available, "reason": status.reason} for status in report}
        print(json.dumps({"facts": facts, "backends": states, "auto": backends.AUTO}, default=str))
        return
    console = Console()
    about = Table(show_header=False)
    for name, value in facts.items():
        about.add_row(name, escape(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    console.print(about)
    table = Table("backend", "works here", "reason")
    for status in report:
        table.add_row(status.name, "yes" if status.available else "no", escape(status.reason))
    console.print(table)
    chosen = Table("auto takes", *(f"on {device}" for device in backends.AUTO))
    for operator in dict.fromkeys(name for rows in backends.AUTO.values() for name in rows):
        chosen.add_row(operator, *(rows.get(operator, "") for rows in backends.AUTO.values()))
    console.print(chosen)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """The command's entry point: turns errors into one line and an exit code."""
    escape_unknown_letters()
    usage_error = typer.BadParameter.__base__  # of every misuse of the command line; typer exports it under no name
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        code = _fail(2, error.format_message() or "no command given; see alexnet-fast --help")
    except (InputError, BackendError) as error:
        code = _fail(2, error)
    except (RunError, OSError) as error:
        code = _fail(1, error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    sys.exit(code)


def _fail(code: int, error: object) -> int:
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code
