"""What a run does, in full: every value is chosen here, checked, and written to config.json.

Defaults follow DATA. A folder gets the recipe of torchvision's AlexNet (batch 256, lr 0.01 divided by 10 every 30 of 90
epochs, weight decay 1e-4). The small grey sets start from Kaiming's initialization at a third of that rate: at 64x64
pixels the last pooling leaves a single pixel, which fc6 sees 36 times; from torch's own initialization, or at lr 0.01,
the loss stays near ln 10 (docs/training.md has the figures). A recipe (alexnet_fast.train.recipes) replaces what it
states.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from alexnet_fast import backends
from alexnet_fast.data.augmentation import BINS
from alexnet_fast.data.records import Count, Range, conform, fields, parse_json
from alexnet_fast.data.shards import MAX_SIZE
from alexnet_fast.data.sources import Statistics, kind_of
from alexnet_fast.data.transforms import KINDS
from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.models.variants import PIXEL_STD, Conv, ablations_of
from alexnet_fast.ops import LRN
from alexnet_fast.optim import RULES
from alexnet_fast.parallel import MODES, hybrid, towers
from alexnet_fast.terminal import nearest
from alexnet_fast.train.recipes import OF_PHOTOGRAPHS, RECIPES

# ImageNet's, for values in 0..1: components times deviations as torch7's fb.resnet published them.
IMAGENET_RGB = tuple(
    tuple(round(value * deviation, 6) for value, deviation in zip(row, (0.2175, 0.0188, 0.0045), strict=True))
    for row in ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
)
MAX_CONFIG = 1 << 20  # bytes of a configuration file
ADAMW_LR = 3e-4  # the rates of the presets are for SGD
CHOICES = {
    "recipe": tuple(RECIPES),
    "schedule": ("step", "multistep", "plateau", "cosine", "constant"),
    "rule": RULES,
    "optimizer": ("sgd", "adamw"),
    "transform": KINDS,
    "auto_augment": ("none", "ra"),
    "init": ("variant", "kaiming"),
    "cache": ("none", "device"),
    "precision": ("fp32", "bf16"),
    "fold": ("auto", "on", "off"),
    "parallel": tuple(MODES),
    "hybrid_scheme": ("a", "b", "c"),
    "gradients": ("fp32", "bf16"),
    "variant": VARIANTS,
    "backend": ("auto", *backends.NAMES),
    "quantization": ("none", "int8_weight_only"),
}
# Options that a resumed run may change: none of them changes the weights by more than rounding.
CHANGEABLE = frozenset(
    {
        *("workers", "max_steps", "checkpoint_steps", "keep_checkpoints", "log_steps", "max_bad"),
        *("tensorboard", "wandb", "mlflow", "nproc", "parallel", "graph", "fold"),
    }
)

_GREY = {"image_size": 64, "schedule": "cosine", "warmup": 1.0, "weight_decay": 5e-4, "init": "kaiming", "workers": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {**_GREY, "epochs": 6, "batch_size": 64, "lr": 0.003, "dropout": 0.2},
    "fashion-mnist": {**_GREY, "epochs": 10, "batch_size": 128, "lr": 0.004, "workers": 1, "checkpoint_steps": 200},
    "folder": {"epochs": 90, "batch_size": 256, "lr": 0.01, "schedule": "step", "workers": 4, "checkpoint_steps": 1000},
}


Text = Annotated[str, Range(1, 4096)]
Side = Annotated[int, Range(1, MAX_SIZE)]
Steps = Annotated[int, Range(1, 2**53)]
Epochs = Annotated[float, Range(0, 1e6)]
Unit = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]
Decay = Annotated[float, Range(0, 1 - 1e-12)]
Channels = tuple[Unit, Unit, Unit]
Deviation = Annotated[float, Range(1e-6, 1e3)]
Part = Annotated[float, Range(-1e3, 1e3)]


@dataclass(frozen=True)
class TrainConfig:
    """One run. Lengths in epochs count passes over the training set; ``batch_size`` counts images over all ranks.

    The types state what each option, and each value of a stored run, may be (:mod:`alexnet_fast.data.records`).
    """

    data: Text
    out: Annotated[str, Range(0, 4096)]  # '' for what writes nothing
    num_classes: Annotated[int, Range(1, 1_000_000)]
    image_size: Side
    epochs: Annotated[int, Range(1, 1_000_000)]
    batch_size: Annotated[int, Range(1, 1 << 20)]
    lr: NotNegative
    schedule: str
    recipe: str | None = None
    variant: str = "torchvision"
    synthetic: bool = False
    # Outputs of conv1 … conv5, fc6 and fc7, where they are not the variant's; the ranks of fc6 and fc7, 0 for a layer
    # that is one matrix.
    widths: Annotated[tuple[Annotated[int, Range(1, 1 << 16)], ...], Range(7, 7)] | None = None
    ranks: tuple[Annotated[int, Range(0, 1 << 16)], Annotated[int, Range(0, 1 << 16)]] = (0, 0)
    quantization: str = "none"  # or int8_weight_only: linear layers of a run that quantize wrote, which trains no more
    warmup: Epochs = 0.0  # epochs in which lr rises linearly to its value
    lr_step: Annotated[float, Range(1e-9, 1e6)] = 30.0  # epochs between two cuts of schedule "step"
    lr_milestones: tuple[Epochs, ...] = ()  # epochs at which schedule "multistep" cuts
    # Epochs without a better held-out accuracy after which schedule "plateau" cuts.
    lr_patience: Annotated[int, Range(1, 1_000_000)] = 5
    lr_cuts: Annotated[int, Range(0, 1000)] = 3  # cuts of schedule "plateau" at most
    lr_gamma: Unit = 0.1  # what each cut multiplies lr by
    lr_head: NotNegative | None = None  # of the last layer; as lr if None
    rule: str = "torch"  # how SGD moves weights; see alexnet_fast.optim
    momentum: Unit = 0.9
    weight_decay: NotNegative = 1e-4
    bias_lr: NotNegative = 1.0  # what lr is multiplied by for biases
    bias_decay: NotNegative = 1.0  # what weight_decay is multiplied by for biases
    label_smoothing: Unit = 0.0
    dropout: Unit = 0.5
    init: str = "variant"  # as the variant states it, or Kaiming normal
    # Deviations of the normal distributions that conv1 … fc8 start from; None: they start otherwise.
    init_std: Annotated[tuple[Annotated[float, Range(0, 1e3)], ...], Range(8, 8)] | None = None
    init_bias: Annotated[tuple[Annotated[float, Range(-1e6, 1e6)], ...], Range(8, 8)] | None = None
    weights: Text | None = None  # pretrained weights to start from
    freeze_features: bool = False
    precision: str = "fp32"
    backend: str = "auto"
    # Whether images are laid out for a first convolution with a stride (ops.augment's fold). A run with auto decides
    # for its device, and records on or off.
    fold: str = "auto"
    # Loader processes of each rank, threads for prepared DATA; 0 loads in the rank itself.
    workers: Annotated[int, Range(0, 1024)] = 0
    cache: str = "none"  # or device: prepared training images are read once, into the device's memory
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0
    nproc: Annotated[int, Range(1, 1 << 20)] = 1
    parallel: str = "ddp"  # how ranks share a step: see alexnet_fast.parallel
    hybrid_scheme: str = "a"  # how images reach hybrid's linear layers
    gradients: str = "fp32"  # as they travel between ranks
    max_steps: Steps | None = None  # stop after so many steps in all; the schedule still ends with the last epoch
    checkpoint_steps: Count = 0  # steps between checkpoints inside an epoch; 0: after each epoch alone
    keep_checkpoints: Steps = 2  # the newest so many, and the best
    log_steps: Steps = 10  # steps between two rows of metrics.jsonl
    max_bad: Unit = 0.05  # share of a set's files that may be unusable before the run stops
    tensorboard: bool = False
    wandb: bool = False
    mlflow: bool = False
    transform: str = "crop"  # see alexnet_fast.data.transforms
    mean: Channels = (0.5, 0.5, 0.5)
    std: tuple[Deviation, Deviation, Deviation] = (0.5, 0.5, 0.5)
    colour_noise: Annotated[float, Range(0, 1e3)] = 0.0  # deviation of the three normal draws of an image, 0: no noise
    # What the draws are multiplied by: RGB's principal components, in columns, each as long as its standard deviation.
    colour: Annotated[tuple[tuple[Part, Part, Part], ...], Range(3, 3)] = IMAGENET_RGB
    # What training images, their mean taken off, are divided by after the noise.
    colour_divisor: Annotated[float, Range(1e-6, 1e6)] = 1.0
    ten_crop: bool = False  # whether the command eval averages over ten crops; evaluations in training take the centre
    exif: bool = True  # whether pictures are turned upright as their EXIF orientation says
    rotation: Annotated[float, Range(0, 180)] = 0.0  # degrees up to which training images are turned, either way
    colour_jitter: Unit = 0.0  # up to which share brightness, contrast and saturation of training images are changed
    auto_augment: str = "none"  # or ra: RandAugment of training images
    ra_magnitude: Annotated[int, Range(0, BINS - 1)] = 9  # of RandAugment
    random_erase: Unit = 0.0  # share of training images of which a rectangle is erased
    mixup: Annotated[float, Range(0, 1e3)] = 0.0  # alpha of the Beta distribution that MixUp draws from; 0: none
    cutmix: Annotated[float, Range(0, 1e3)] = 0.0  # that of CutMix; with both, each step draws which
    optimizer: str = "sgd"
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # of AdamW
    eps: Annotated[float, Range(1e-30, 1)] = 1e-8  # of AdamW
    clip_grad: Annotated[float, Range(1e-12)] | None = None  # the norm of all gradients together is cut to this
    accumulate: Annotated[int, Range(1, 1 << 20)] = 1  # batches whose gradients make a step
    graph: bool = True  # whether a single GPU's steps of SGD are replayed as CUDA graphs
    model_ema: bool = False  # whether evaluations take a moving average of the weights
    model_ema_decay: Unit = 0.9998  # what each update keeps of it
    model_ema_steps: Steps = 1  # between updates
    early_stopping: Steps | None = None  # epochs without a better held-out accuracy after which the run ends
    # Which convolutions a GPU has run so far, by form (alexnet_fast.tuning): written by the run, taken when it resumes.
    choices: Annotated[dict[str, str], Range(0, 10_000)] = field(default_factory=dict)

    @property
    def step_images(self) -> int:
        """Images of a step, over all ranks."""
        return self.batch_size * self.accumulate

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Any, where: str = "config") -> TrainConfig:
        """What :meth:`to_json` gave; fields that a version before this one did not have are at their defaults.

        Raises ValueError, from ``where`` on, for anything else.
        """
        own = dataclasses.fields(cls)
        defaults = {field.name: field.default for field in own if field.default is not MISSING} | {"choices": {}}
        known = fields({**defaults, **record} if isinstance(record, dict) else record, HINTS, where)
        _check_known(known)
        config = cls(**known)
        check(config, 1)
        return config


HINTS = get_type_hints(TrainConfig, include_extras=True)


def preset(data: str, recipe: str | None, variant: str, synthetic: bool) -> dict[str, Any]:
    """The defaults for a DATA argument and a recipe that differ from :class:`TrainConfig`'s own."""
    kind = "folder" if synthetic else kind_of(data)
    chosen, stated = VARIANTS[variant], RECIPES[recipe] if recipe else {}
    defaults = {"image_size": chosen.image_size, **PRESETS[kind]}
    if kind == "folder":
        return {**defaults, "mean": chosen.mean, "std": chosen.std, **stated}
    size = max(defaults["image_size"], chosen.min_image_size)
    kept = {name: value for name, value in stated.items() if name not in OF_PHOTOGRAPHS}
    return {**defaults, "image_size": size, "transform": "shift", **kept}


def variant_of(given: dict[str, Any]) -> str:
    """The variant that is given, or the recipe's, or torchvision."""
    return given.get("variant") or RECIPES.get(given.get("recipe"), {}).get("variant", "torchvision")


def without(given: dict[str, Any], ablations: list[str]) -> dict[str, Any]:
    """``given`` with a variant from which ``ablations`` are taken; raises :class:`InputError` if it lacks them."""
    check_choices(given)
    variant = variant_of(given)
    for name in ablations:
        if name not in ablations_of(VARIANTS[variant]):
            raise InputError(
                f"--{name}: variant {variant} has {'no LRN' if name == 'no-lrn' else 'one tower'} as it is"
            )
        variant = f"{variant}-{name}"
    return {**given, "variant": variant}


def resolve(given: dict[str, Any], num_classes: int, statistics: Statistics | None = None) -> TrainConfig:
    """The run that ``given`` asks for: what was given, then the recipe, then DATA's preset, then the common defaults;
    checked.

    ``num_classes`` is DATA's, and so is ``statistics`` if it was prepared. Raises :class:`InputError`.
    """
    given = {"backend": backends.current(), **given}  # ALEXNET_FAST_BACKEND is the default here too
    check_choices(given)
    variant = given["variant"] = variant_of(given)
    defaults = preset(given["data"], given.get("recipe"), variant, given.get("synthetic", False))
    cores = len(os.sched_getaffinity(0)) // max(1, given.get("nproc", 1))
    defaults["workers"] = min(defaults["workers"], max(1, cores))
    if statistics:
        defaults["colour"] = statistics.colour
        # Published weights go with their own mean; nets that see 0..255 minus the set's mean start with this set's.
        if defaults["std"] == PIXEL_STD and given.get("weights") is None:
            defaults["mean"] = statistics.mean
    if given.get("optimizer") == "adamw" and given.get("recipe") is None:
        defaults["lr"] = ADAMW_LR
    if given.get("init", defaults.get("init", "variant")) == "variant":
        defaults |= {"init_std": VARIANTS[variant].init_std, "init_bias": VARIANTS[variant].init_bias}
    config = TrainConfig(**{"num_classes": num_classes, **defaults, **given})
    check(config, num_classes)
    return config


def check_choices(given: dict[str, Any]) -> None:
    """Raises :class:`InputError` for a word that is none of an option's, and for a backend that is missing here."""
    _check_known(given)
    if reason := backends.missing(given.get("backend", "auto")):
        raise InputError(f"--backend: {given['backend']!r} is missing here: {reason}")


def _check_known(given: dict[str, Any]) -> None:
    for name, known in CHOICES.items():
        if name in given and given[name] not in known and not (name == "recipe" and given[name] is None):
            raise InputError(
                f"{option(name)}: unknown {name} {given[name]!r}; known are {', '.join(known)}"
                f"{nearest(given[name], known)}"
            )


def check(config: TrainConfig, num_classes: int) -> None:
    """Raises :class:`InputError` for values out of range, and for values that do not go together."""
    try:
        for name, hint in HINTS.items():
            conform(getattr(config, name), hint, option(name))
    except ValueError as error:
        raise InputError(str(error)) from None
    try:
        net = VARIANTS[config.variant]
        (net if config.widths is None else net.resized(config.widths)).check_ranks(config.ranks)
    except ValueError as error:
        raise InputError(f"--{error} (variant {config.variant})") from None
    least = net.min_image_size
    if config.image_size < least:
        raise InputError(f"--image-size: variant {config.variant} takes at least {least}, got {config.image_size}")
    if config.ten_crop and config.transform == "shift":
        raise InputError("--ten-crop: is for photographs; this DATA's pictures are not cropped")
    if config.num_classes < num_classes:
        raise InputError(f"--num-classes: DATA has {num_classes} classes, got {config.num_classes}")
    if config.batch_size < config.nproc:
        raise InputError(f"--batch-size: {config.batch_size} images cannot be shared by {config.nproc} ranks")
    _check_parallel(config)
    if config.optimizer != "sgd" and config.rule != "torch":
        raise InputError(f"--rule: {config.rule} is of SGD, and --opt is {config.optimizer}")
    if config.schedule == "multistep" and not config.lr_milestones:
        raise InputError("--lr-milestones: schedule multistep needs them, as in 25,51,79")


def _check_parallel(config: TrainConfig) -> None:
    """Whether --parallel can split this net over these ranks."""
    reason = ""
    if config.parallel != "ddp" and (config.widths is not None or any(config.ranks)):
        reason = f"{config.parallel} splits nets of their variant's widths and of full rank"
    elif config.parallel == "towers":
        features = VARIANTS[config.variant].features
        convolutions = [layer.groups for layer in features if isinstance(layer, Conv)]
        reason = towers.refusal(
            config.nproc, convolutions, [layer.groups for layer in features if isinstance(layer, LRN)]
        )
    elif config.parallel == "hybrid":
        reason = hybrid.refusal(config.nproc)
        if VARIANTS[config.variant].linear_groups > 1:
            reason = "hybrid shards linear layers that are whole, and towers that never talk have theirs in parts"
    if reason:
        raise InputError(f"--parallel: {reason} (variant {config.variant})")
    for name in ("mixup", "cutmix", "clip_grad"):
        if getattr(config, name) and config.parallel != "ddp":
            raise InputError(f"{option(name)}: is for --parallel ddp, got {config.parallel}")
    if config.accumulate > 1 and config.parallel != "ddp":
        raise InputError(f"{option('accumulate')}: is for --parallel ddp, got {config.parallel}")
    if config.optimizer != "sgd" and config.hybrid_scheme != "a":
        raise InputError(f"--opt: {config.optimizer} is for --hybrid-scheme a, got {config.hybrid_scheme}")
    if config.hybrid_scheme != "a" and config.parallel != "hybrid":
        raise InputError(f"--hybrid-scheme: {config.hybrid_scheme} is of --parallel hybrid, got {config.parallel}")
    if config.gradients != "fp32" and config.parallel == "towers":
        raise InputError("--gradients: towers send each other no gradients of weights, so none in bf16")


def resumed(stored: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """``stored`` with what may change on resuming; raises :class:`InputError` where anything else differs."""
    check_choices(given)
    for name, value in given.items():
        before = getattr(stored, name)
        scheme = stored.hybrid_scheme if name in ("nproc", "parallel") else "a"
        if scheme != "a" and value != before:
            raise InputError(
                f"--resume: {option(name)} {before} stays with --hybrid-scheme {scheme}, whose passes are the ranks'; "
                f"got {value}"
            )
        if stored.cache == "device" and name in ("nproc", "parallel") and value != before:
            raise InputError(f"--resume: {option(name)} {before} stays with --cache device, whose order is the ranks'")
        if name not in CHANGEABLE and value != before:
            raise InputError(f"--resume: the run has {option(name)} {before}, got {value}")
    config = dataclasses.replace(stored, **given)
    check(config, 1)
    return config


# Options that are not called as their fields are.
CALLED = {"optimizer": "--opt", "betas": "--opt-betas", "eps": "--opt-eps", "accumulate": "--grad-accum-steps"}
CALLED |= {"data": "DATA", "colour_jitter": "--color-jitter"}


def option(name: str) -> str:
    return CALLED.get(name, "--" + name.replace("_", "-"))


def read_config(path: Path) -> dict[str, Any]:
    """Options from a JSON or YAML file: an object with the fields of :class:`TrainConfig`, or the options' names, null
    for what is not given. A run's config.json serves too, without its folder. Raises :class:`InputError`.
    """
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise ValueError(f"more than {MAX_CONFIG} bytes")
        content = path.read_bytes()
        record = _yaml(content, path.name) if path.suffix in (".yaml", ".yml") else parse_json(content, path.name)
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}: expected an object of options")
        if "about" in record:
            record = {name: value for name, value in record.items() if name not in ("about", "out", "choices")}
        fields = {spelling: name for name in HINTS for spelling in (name, option(name)[2:], name.replace("_", "-"))}
        given = {}
        for name, value in record.items():
            if name not in fields and name != "data":
                raise ValueError(f"{path.name}: unknown option {name!r}{nearest(name, fields)}")
            field = fields.get(name, name)
            if field in given:
                raise ValueError(f"{path.name}: {name!r} is given twice")
            if isinstance(value, str) and "\0" in value:  # no path and no name holds it
                raise ValueError(f"{path.name}: {name}: expected text without zero bytes")
            if value is not None:
                given[field] = conform(value, HINTS[field], f"{path.name}: {name}")
        return given
    except OSError as error:
        raise InputError(f"--config: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"--config: {error}") from None


def _yaml(content: bytes, name: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise InputError("--config: YAML needs PyYAML: pip install pyyaml") from None
    try:
        return yaml.safe_load(content)
    except RecursionError:
        raise ValueError(f"{name}: nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, KeyError, TypeError) as error:  # odd tags, dates
        raise ValueError(f"{name}: not YAML: {error}") from None
