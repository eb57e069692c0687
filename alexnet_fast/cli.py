"""``alexnet-fast train [DATA] | eval | predict IMAGE… | features IMAGE… | explain IMAGE… | export RUN |
shrink RUN | quantize RUN | prepare SRC DST | curves RUN… | report RUN | bench | tune | doctor``

Exit codes: 0 done; 1 the run broke off; 2 the input cannot be used (one line on standard error says why); 130 and 143
stopped by Ctrl-C or SIGTERM, after a checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from alexnet_fast import __version__, backends, interrupt
from alexnet_fast.backends import BackendError
from alexnet_fast.errors import InputError, RunError, out_of_memory
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.variants import ABLATIONS
from alexnet_fast.parallel import leave, ranks_given
from alexnet_fast.terminal import escape_unknown_letters, one_line, say
from alexnet_fast.train.config import read_config, without
from alexnet_fast.train.model import scaled
from alexnet_fast.train.recipes import RECIPES
from alexnet_fast.train.trackers import TRACKERS

app = typer.Typer(
    help="AlexNet: train it, evaluate it, use it.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SCHEDULES = "step, multistep, plateau, cosine or constant"
DATA_HELP = "digits, fashion-mnist:DIR, or a folder: train/CLASS/* and val/CLASS/*, or what prepare wrote"
NET_HELP = "a run's folder (its best checkpoint), one of its checkpoints, a file of weights, a URL of one, or DEFAULT"
BACKEND_HELP = ", ".join(("auto", *backends.NAMES))
# Parameters of the command whose fields in TrainConfig have other names.
FIELDS = {"opt": "optimizer", "opt_betas": "betas", "opt_eps": "eps", "grad_accum_steps": "accumulate"}
FIELDS |= {"color_jitter": "colour_jitter"}
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


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"alexnet-fast {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="say it, and end")
    ] = False,
) -> None:
    pass


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
    opt: Annotated[str | None, _option("sgd or adamw (sgd)", "--opt", "--optimizer")] = None,
    opt_betas: Annotated[str | None, _numbers("of adamw (0.9,0.999)")] = None,
    opt_eps: Annotated[float | None, _option("of adamw (1e-8)")] = None,
    clip_grad: Annotated[
        float | None, _option("cut the norm of all gradients together to this", "--clip-grad", "--clip-grad-norm")
    ] = None,
    grad_accum_steps: Annotated[int | None, _option("batches of --batch-size whose gradients make a step (1)")] = None,
    early_stopping: Annotated[
        int | None, _option("epochs without a better held-out accuracy that end the run", "--early-stopping")
    ] = None,
    model_ema: Annotated[
        bool | None, _option("evaluate and keep a moving average of the weights", "--model-ema")
    ] = None,
    model_ema_decay: Annotated[float | None, _option("what each of its updates keeps (0.9998)")] = None,
    model_ema_steps: Annotated[int | None, _option("steps between its updates (1)")] = None,
    label_smoothing: Annotated[
        float | None, _option("share of the target spread over all classes (0)", "--label-smoothing", "--smoothing")
    ] = None,
    transform: Annotated[str | None, _option("crop, resized-crop or shift (folders crop)", panel=IMAGES)] = None,
    colour_noise: Annotated[
        float | None, _option("deviation of noise along RGB's principal components (0)", panel=IMAGES)
    ] = None,
    colour_divisor: Annotated[
        float | None, _option("what training images are divided by after the noise (1)", panel=IMAGES)
    ] = None,
    rotation: Annotated[float | None, _option("degrees that images are turned by at most (0)", panel=IMAGES)] = None,
    color_jitter: Annotated[
        float | None,
        _option("share that brightness, contrast, saturation change by at most (0)", panel=IMAGES),
    ] = None,
    auto_augment: Annotated[str | None, _option("none, or ra: RandAugment (none)", panel=IMAGES)] = None,
    ra_magnitude: Annotated[int | None, _option("of RandAugment, 0 to 30 (9)", panel=IMAGES)] = None,
    random_erase: Annotated[
        float | None,
        _option("share of images of which a rectangle is erased (0)", "--random-erase", "--reprob", panel=IMAGES),
    ] = None,
    mixup: Annotated[
        float | None, _option("alpha of MixUp, 0 for none (0)", "--mixup", "--mixup-alpha", panel=IMAGES)
    ] = None,
    cutmix: Annotated[
        float | None, _option("alpha of CutMix, 0 for none (0)", "--cutmix", "--cutmix-alpha", panel=IMAGES)
    ] = None,
    exif: Annotated[
        bool | None, _option("turn pictures upright as their EXIF says (yes)", "--exif/--no-exif", panel=IMAGES)
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
    width: Annotated[
        float | None, _option("factor on all the variant's widths, of fc6 and fc7 too (1)", panel=NET)
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
    seeds: Annotated[
        str | None,
        _option("as in 0,1,2: a run for each below --out, with mean and deviation of the accuracy", panel=RUN),
    ] = None,
    config: Annotated[
        Path | None, _option("options in a JSON or YAML file, such as a run's config.json", panel=RUN)
    ] = None,
    dry_run: Annotated[bool, _option("say what would be trained, and end", "--dry-run", panel=RUN)] = False,
    graph: Annotated[
        bool | None, _option("replay a GPU's steps as CUDA graphs (yes)", "--graph/--no-graph", panel=RANKS)
    ] = None,
    tensorboard: Annotated[
        bool | None, _option("TensorBoard logs in the output folder", "--tensorboard", panel=RUN)
    ] = None,
    wandb: Annotated[bool | None, _option("Weights & Biases has the metrics too", "--wandb", panel=RUN)] = None,
    mlflow: Annotated[bool | None, _option("MLflow has the metrics too", "--mlflow", panel=RUN)] = None,
    nproc: Annotated[int | None, _option("ranks to start here: NCCL with GPUs, gloo without (1)", panel=RANKS)] = None,
    parallel: Annotated[str | None, _option("how ranks share a step: ddp, towers or hybrid (ddp)", panel=RANKS)] = None,
    hybrid_scheme: Annotated[str | None, _option("of One weird trick: a, b or c (a)", panel=RANKS)] = None,
    gradients: Annotated[str | None, _option("sent as fp32 or bf16 (fp32)", panel=RANKS)] = None,
    precision: Annotated[str | None, _option("fp32 or bf16 autocast (fp32)", panel=RANKS)] = None,
    fold: Annotated[str | None, _option("images laid out for conv1: auto, on or off (auto)", panel=RANKS)] = None,
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
    words = {name: value for name, value in locals().items() if value is not None}
    from alexnet_fast.train import train as run
    from alexnet_fast.train import train_seeds

    for name in ("resume", "seeds", "config", "dry_run"):
        words.pop(name, None)
    for name, field in FIELDS.items():
        if name in words:
            words[field] = words.pop(name)
    taken = [name for name in ABLATIONS if words.pop(name.replace("-", "_"), False)]
    given = {**(read_config(config) if config else {}), **words}
    given = without(given, taken) if taken else given
    given = scaled(given, given.pop("width")) if "width" in given else given
    if seeds is not None:
        raise typer.Exit(train_seeds(given, seeds, resume, dry_run))
    raise typer.Exit(run(given, resume, dry_run=dry_run))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help=NET_HELP)],
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
    weights: Annotated[str, _option(f"{NET_HELP}, or an .onnx file of export")],
    top: Annotated[int, typer.Option(min=1, help="classes to name for each picture")] = 5,
    backend: Annotated[str | None, _option(f"{BACKEND_HELP} (auto)")] = None,
    exif: Annotated[
        bool | None, _option("turn pictures upright as their EXIF says (as the run)", "--exif/--no-exif")
    ] = None,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """The likeliest classes of pictures, with their probabilities."""
    from alexnet_fast.train import predict as run

    raise typer.Exit(run(images, weights, top, backend or backends.current(), as_json, exif))


@app.command()
def features(
    images: Annotated[list[Path], typer.Argument(help="picture files, or folders that prepare wrote")],
    weights: Annotated[str, _option(NET_HELP)],
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
def explain(
    weights: Annotated[str, _option(NET_HELP)],
    images: Annotated[list[Path] | None, typer.Argument(help="picture files", show_default=False)] = None,
    name: Annotated[str | None, _option("the class that is asked about (each picture's likeliest)", "--class")] = None,
    layer: Annotated[str, _option("of Grad-CAM: one with maps (relu5)")] = "relu5",
    strongest: Annotated[
        str | None,
        _option("instead: the parts of IMAGES, files or prepared folders, that channels of this layer answer to most"),
    ] = None,
    filters: Annotated[bool, _option("instead: the first layer's filters; takes no IMAGES", "--filters")] = False,
    out: Annotated[Path, _option("picture to write (explain.png)", "--out")] = Path("explain.png"),
    overwrite: Annotated[bool, _option("replace FILE if it is there", "--overwrite")] = False,
    backend: Annotated[str | None, _option(f"{BACKEND_HELP} (auto)")] = None,
) -> None:
    """Why a net says what it says of pictures: Grad-CAM, what covering a part costs, guided gradients."""
    from alexnet_fast.train.explain import explain as run

    backend = backend or backends.current()
    raise typer.Exit(run(images or [], weights, name, layer, strongest, filters, out, overwrite, backend))


@app.command()
def export(
    weights: Annotated[str, typer.Argument(metavar="RUN", help=NET_HELP)],
    kind: Annotated[str, _option("onnx, pt2 (torch.export) or aoti (AOTInductor, compiled here)", "--format")],
    out: Annotated[Path | None, _option("file to write (model.onnx or model.pt2)", "--out")] = None,
    dynamic_batch: Annotated[bool, _option("any number of images at a time, not one", "--dynamic-batch")] = False,
    preprocess: Annotated[bool, _option("it takes uint8 RGB, and normalizes it itself", "--preprocess")] = False,
    softmax: Annotated[bool, _option("it gives probabilities, not logits", "--softmax")] = False,
    overwrite: Annotated[bool, _option("replace FILE if it is there", "--overwrite")] = False,
) -> None:
    """A net as one file for other tools, with its classes' names, compared with the net before it is kept."""
    from alexnet_fast.train.export import export as run

    raise typer.Exit(run(weights, kind, out, dynamic_batch, preprocess, softmax, overwrite))


@app.command("shrink")
def shrink_(
    net: Annotated[str, typer.Argument(metavar="RUN", help=NET_HELP)],
    out: Annotated[Path, _option("folder for the smaller net, a run", "--out", "--output")],
    svd: Annotated[float | None, _option("rank of fc6 and fc7; below 1: share of their energy that stays")] = None,
    prune: Annotated[float, _option("share of each convolution's channels that goes (0)")] = 0.0,
    width: Annotated[float, _option("factor on all widths, of fc6 and fc7 too (1)")] = 1.0,
    finetune: Annotated[int, _option("epochs of training afterwards (0)")] = 0,
    data: Annotated[str | None, _option(f"{DATA_HELP} (the run's own)")] = None,
    lr: Annotated[float | None, _option("learning rate of --finetune, whose schedule is cosine (the run's)")] = None,
) -> None:
    """A smaller net of a trained one: fewer channels, fc6 and fc7 of low rank; with size, accuracy and speed."""
    from alexnet_fast.train.shrink import shrink

    raise typer.Exit(shrink(net, out, svd, prune, width, finetune, data, lr))


@app.command("quantize")
def quantize_(
    net: Annotated[str, typer.Argument(metavar="RUN", help=NET_HELP)],
    data: Annotated[str | None, _option(f"{DATA_HELP} (the run's own)")] = None,
    images: Annotated[int | None, _option("training images that activations are measured on (512)")] = None,
    weight_only: Annotated[
        bool, _option("int8 weights of the linear layers alone: nothing to measure, and a run", "--weight-only")
    ] = False,
    out: Annotated[
        Path | None, _option("file to write (model.onnx); of --weight-only a folder", "--out", "--output")
    ] = None,
    overwrite: Annotated[bool, _option("replace FILE if it is there", "--overwrite")] = False,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """A net in 8-bit integers, as an ONNX file or, of weights alone, as a run; with size, accuracy and speed."""
    from alexnet_fast.train.quantize import quantize, quantize_weights

    if weight_only:
        if out is None:
            raise InputError("--out: --weight-only writes a run, and needs its folder")
        if images is not None:
            raise InputError("--images: is for activations, which --weight-only leaves as they are")
        if overwrite:
            raise InputError("--overwrite: is for a file; --weight-only writes a new folder")
        raise typer.Exit(quantize_weights(net, out, data, as_json))
    out = out or Path("model.onnx")
    raise typer.Exit(quantize(net, out, data, 512 if images is None else images, overwrite, as_json))


@app.command()
def prepare(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a folder with train/CLASS/* and val/CLASS/*")],
    target: Annotated[str | None, typer.Argument(metavar="DST", help="what to write, or to go on with")] = None,
    size: Annotated[int, _option("side of the stored pictures in pixels (256, for nets of 192 to 256)")] = 256,
    shard_size: Annotated[int, _option("files of SRC in a shard (1000)")] = 1000,
    workers: Annotated[int | None, _option("processes (as many as cores)", "--workers", "-j")] = None,
    max_bad: Annotated[float, _option("share of a set's files that may be unusable (0.05)")] = 0.05,
    exif: Annotated[bool, _option("turn pictures upright as their EXIF says (yes)", "--exif/--no-exif")] = True,
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
    options = {"size": size, "shard_size": shard_size, "workers": workers, "max_bad": max_bad, "exif": exif}
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
def report(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path | None, _option("page to write (RUN/report.html)", "--out", "--output")] = None,
    worst: Annotated[int, typer.Option(min=0, max=1000, help="pictures with the largest loss to show")] = 24,
) -> None:
    """A run as one page of HTML: curves, filters, confusion, classes, and the pictures it is most wrong about."""
    from alexnet_fast.train import write_page

    say(Console(), f"report {write_page(run, out, worst)}")


@app.command()
def bench(
    planned: Annotated[
        bool, _option("instead of measuring: a model of training on two devices, bytes and times", "--plan")
    ] = False,
    batch_size: Annotated[
        int | None, _option("images (CPU 16, GPU 256, --plan 256 over both devices)", "--batch-size", "-b")
    ] = None,
    variant: Annotated[str | None, _option(f"of --plan: {', '.join(VARIANTS)} (paper)")] = None,
    tflops: Annotated[float | None, _option("of --plan: TFLOP/s that one device sustains (400)")] = None,
    link: Annotated[float | None, _option("of --plan: GB/s between devices, each way (450)")] = None,
    latency: Annotated[float | None, _option("of --plan: microseconds until an exchange begins (15)")] = None,
    as_json: Annotated[bool, _option("print JSON", "--json")] = False,
) -> None:
    """One look at this machine's speed against PyTorch's own modules, or, with --plan, at two devices' step."""
    from alexnet_fast.bench import commands

    options = {"variant": variant, "tflops": tflops, "link": link, "latency": latency}
    given = {name: value for name, value in options.items() if value is not None}
    if planned:
        commands.plan(batch_size, as_json, **given)
    elif given:
        raise InputError(f"--{next(iter(given))}: is for --plan")
    else:
        commands.look(batch_size, as_json)


@app.command()
def tune(
    variant: Annotated[str, _option(f"{', '.join(VARIANTS)} (torchvision)")] = "torchvision",
    batch: Annotated[str, _option("images at a time, as in 1,128,1024 (128)", "--batch", "--batch-size", "-b")] = "128",
    training: Annotated[bool, _option("training steps too", "--train")] = False,
    precision: Annotated[str, _option("fp32, fp16 or bf16 (bf16)")] = "bf16",
) -> None:
    """Measure what computes AlexNet's layers fastest on this GPU, and keep that for cudnn.benchmark and for train."""
    from alexnet_fast.bench import commands

    commands.tune(variant, batch, training, precision)


@app.command()
def doctor(as_json: Annotated[bool, _option("print JSON", "--json")] = False) -> None:
    """What is installed, what was built, and which backends work here."""
    from alexnet_fast.bench import commands

    commands.doctor([tracker.name for tracker in TRACKERS], as_json)


def main() -> None:
    """The command's entry point: turns errors into one line and an exit code."""
    interrupt.main_has_begun()
    escape_unknown_letters()
    if os.environ.get("COLUMNS") == "0":  # rich would print nothing; elsewhere this says that the width is not known
        del os.environ["COLUMNS"]
    usage_error = typer.BadParameter.__base__  # of every misuse of the command line; typer exports it under no name
    try:
        code = app(standalone_mode=False)
    except usage_error as error:
        code = _fail(2, error.format_message() or "no command given; see alexnet-fast --help")
    except (InputError, BackendError) as error:
        code = _fail(2, error)
    except (RunError, OSError, torch.distributed.DistError) as error:
        code = _fail(1, error)
    except (MemoryError, RuntimeError) as error:
        if (said := out_of_memory(error)) is None:
            raise
        code = _fail(1, said)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if interrupt.IS_THE_COMMAND and ranks_given():
        leave(code or 0)
    sys.exit(code)


def _fail(code: int, error: object) -> int:
    # Before ranks have met, all that torchrun started on a machine say the same: the first says it.
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if not local_rank.isdigit() or int(local_rank) == 0 or torch.distributed.is_initialized():
        print(f"error: {one_line(error)}", file=sys.stderr)
    return code
