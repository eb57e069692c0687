"""Trained weights: published ones, files, folders and URLs, read without running anything that they hold."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_fast.models.preprocessing import ImageClassification, imagenet_categories
from alexnet_fast.models.variants import IMAGENET_MEAN, IMAGENET_STD

HEADS = ("classifier.8", "classifier.7", "classifier.6")  # the last layer: fc6 and fc7 of low rank are two layers each
MAX_DOWNLOAD = 8 << 30  # bytes
TIMEOUT = 60  # seconds without an answer
CHECKPOINT = "model.safetensors"  # in a folder that a training run wrote
FILES = (CHECKPOINT, "pytorch_model.bin")  # what a folder of weights holds, the first of them


@dataclass(frozen=True)
class Weights:
    """Where published weights are, how the images they expect are made, and what is known of them."""

    url: str
    variant: str
    preset: dict[str, Any]
    meta: dict[str, Any]


class AlexNet_Weights(Enum):
    """Published weights, named and used as torchvision's enum::

        weights = AlexNet_Weights.DEFAULT
        net, preprocess = alexnet(weights=weights).eval(), weights.transforms()
        label = weights.meta["categories"][net(preprocess(image)[None]).argmax()]

    ``weights`` may be a member of torchvision's own enum as well.
    """

    IMAGENET1K_V1 = Weights(
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        variant="torchvision",
        preset={"resize_size": 256, "crop_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        meta={
            "num_params": 61_100_840,
            "num_classes": 1000,
            "min_size": (63, 63),
            "categories": imagenet_categories(),
            "recipe": "https://github.com/pytorch/vision/tree/main/references/classification#alexnet-and-vgg",
            "metrics": {"ImageNet-1K": {"acc@1": 56.522, "acc@5": 79.066}},
            "_metrics": {"ImageNet-1K": {"acc@1": 56.522, "acc@5": 79.066}},  # torchvision's name since 0.14
        },
    )
    DEFAULT = IMAGENET1K_V1

    @classmethod
    def verify(cls, obj: Any) -> Any:
        """The member that ``obj`` is or names, with the enum's name before it or not; None stays.

        Raises:
            TypeError: it is something else.
            KeyError: there is no such name.
        """
        if isinstance(obj, str):
            return cls[obj.removeprefix(f"{cls.__name__}.")]
        if obj is not None and not isinstance(obj, cls):
            raise TypeError(f"weights: expected a member of {cls.__name__}, got {type(obj).__name__} {obj!r}")
        return obj

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    @property
    def url(self) -> str:
        return self.value.url

    @property
    def transforms(self) -> Callable[..., ImageClassification]:
        """Called, it makes the module that turns a picture into what the net takes; by keywords with other values."""
        return partial(ImageClassification, **self.value.preset)

    @property
    def meta(self) -> dict[str, Any]:
        return self.value.meta

    def get_state_dict(self, progress: bool = True, check_hash: bool = True) -> dict[str, Tensor]:
        """The tensors, downloaded to torch.hub's cache on first use and checked then by the hash in the file's name.
        ``check_hash`` is there because torchvision's method has it, and changes nothing."""
        return read(self, progress).state


class Checkpoint(NamedTuple):
    """A state_dict, with the variant that it says it belongs to, if it says."""

    name: str
    state: dict[str, Tensor]
    variant: str | None

    @property
    def head(self) -> str:
        """The name of the last layer."""
        return next((name for name in HEADS if f"{name}.weight" in self.state), HEADS[-1])

    @property
    def classes(self) -> int | None:
        """Outputs of the last layer; None where there is no such layer, or its weights are no matrix."""
        head = self.state.get(f"{self.head}.weight")
        return head.shape[0] if head is not None and head.dim() == 2 else None

    def load_into(self, model: nn.Module, without: str | None = None) -> None:
        """Loads into ``model``, all but the module ``without``; raises ValueError with each key that does not fit."""

        def kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {key: t for key, t in state.items() if without is None or not key.startswith(f"{without}.")}

        wanted, given = kept(model.state_dict()), kept(self.state)
        misfits = [f"{key} is missing" for key in wanted if key not in given]
        misfits += [f"{key} is not in the net" for key in given if key not in wanted]
        misfits += [
            f"{key} has shape {tuple(given[key].shape)}, the net's is {tuple(wanted[key].shape)}"
            for key in wanted
            if key in given and given[key].shape != wanted[key].shape
        ]
        if misfits:
            more = f" and {len(misfits) - 6} more" if len(misfits) > 6 else ""
            raise ValueError(f"weights: {self.name} does not fit the net: {'; '.join(misfits[:6])}{more}")
        if broken := [key for key, tensor in given.items() if not tensor.isfinite().all()]:
            raise ValueError(f"weights: {self.name} has numbers that are not finite in {', '.join(broken[:6])}")
        model.load_state_dict(given, strict=without is None)


def read(weights: AlexNet_Weights | str | os.PathLike[str], progress: bool = True) -> Checkpoint:
    """The weights behind a member of an enum (ours or torchvision's), its name, a path or a URL."""
    if isinstance(weights, str) and weights.removeprefix("AlexNet_Weights.") in AlexNet_Weights.__members__:
        weights = AlexNet_Weights.verify(weights)
    if isinstance(weights, AlexNet_Weights):
        state, _ = _read_file(_download(weights.url, progress))
        return Checkpoint(weights.name, state, weights.value.variant)
    if isinstance(weights, Enum) and hasattr(weights, "url"):
        return Checkpoint(weights.name, *_read_file(_download(weights.url, progress)))
    if isinstance(weights, str) and "://" in weights:
        return Checkpoint(weights, *_read_file(_download(weights, progress)))
    if isinstance(weights, (str, os.PathLike)):
        path = Path(weights).expanduser()
        if path.is_dir():
            path = next((path / name for name in FILES if (path / name).exists()), path / CHECKPOINT)
        return Checkpoint(str(path), *_read_file(path))
    raise TypeError(
        f"weights: expected an AlexNet_Weights, its name, a path or a URL, got {type(weights).__name__} {weights!r}"
    )


def _download(url: str, progress: bool) -> Path:
    """A file:// URL's path; otherwise the file in torch.hub's cache, fetched on first use and checked by its hash."""
    try:
        parts = urlparse(url)
    except ValueError as error:
        raise ValueError(f"weights: {url} is no URL: {error}") from None
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"weights: expected an http, https or file URL, got {url}")
    name = Path(parts.path).name
    digits = re.search(r"-([0-9a-f]{8,})\.", name)  # torch.hub's convention: the file's SHA-256 begins so
    if digits is None:  # names such as model.safetensors are many; the URL tells them apart in the cache
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{name}"
    cached = Path(torch.hub.get_dir(), "checkpoints", name)
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            _fetch(url, cached, digits[1] if digits else "", progress)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: what urllib says of odd hosts and ports
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"weights: cannot download {url}: {reason}") from error
    return cached


def _fetch(url: str, path: Path, digits: str, progress: bool) -> None:
    """Writes what is at ``url`` to ``path``, whole or not at all: as many bytes as the server announced,
    ``MAX_DOWNLOAD`` at most, whose SHA-256 begins with ``digits``. torch.hub's function compares no lengths, and keeps
    what a broken connection left. Raises OSError, HTTPException and ValueError.
    """
    hashed, size = hashlib.sha256(), 0
    with (
        urlopen(Request(url, headers={"User-Agent": "torch.hub"}), timeout=TIMEOUT) as reply,
        tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".partial") as file,
    ):
        announced = int(reply.headers.get("Content-Length") or -1)
        if announced > MAX_DOWNLOAD:
            raise OSError(f"{announced} bytes are announced; at most {MAX_DOWNLOAD} are taken")
        total = announced if announced > 0 else None
        with torch.hub.tqdm(total=total, disable=not progress, unit="B", unit_scale=True) as bar:
            while block := reply.read(1 << 20):
                size += len(block)
                if size > MAX_DOWNLOAD:
                    raise OSError(f"more than {MAX_DOWNLOAD} bytes came")
                hashed.update(block)
                file.write(block)
                bar.update(len(block))
        if announced >= 0 and size != announced:
            raise OSError(f"the connection broke: {size} of {announced} bytes came")
        if not hashed.hexdigest().startswith(digits):
            raise OSError(f"its SHA-256 begins with {hashed.hexdigest()[: len(digits)]}, its name says {digits}")
        file.flush()
        os.link(file.name, path.with_name(f"{path.name}.{os.getpid()}"))
    os.replace(path.with_name(f"{path.name}.{os.getpid()}"), path)


# Keys under which training scripts store the state_dict, in the order in which they are looked for.
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "module", "params")
DEEPEST = 8  # how many wrappers may lie in each other: a pickled dict may hold itself
# What DataParallel, torch.compile, FSDP and activation checkpointing add to keys, at whatever depth they wrapped.
INSERTED = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Attributes that a net sits in, before its keys.
HOLDERS = ("model", "net", "network", "backbone", "encoder", "alexnet")


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a file of safetensors or of torch.save, whatever its name, and the variant in its metadata. No other
    pickled object loads. Wrappers around the state_dict and its keys are taken off, with a warning that says so."""
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: no file {path}; expected a file, a folder with {' or '.join(FILES)}, "
            f"or one of {', '.join(AlexNet_Weights.__members__)}"
        )
    if path.suffix == ".safetensors" or _is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
                variant = (file.metadata() or {}).get("variant")
        except (SafetensorError, RuntimeError, MemoryError) as error:  # the last two: it cannot be mapped
            raise ValueError(f"weights: {path} is not a safetensors file: {error}") from error
    else:
        state, variant = _read_pickle(path), None
    state, taken_off = _unwrapped(path, state)
    if taken_off:
        warnings.warn(f"weights: of {path} taken off: {', '.join(taken_off)}", stacklevel=2)
    return state, variant


def _is_safetensors(path: Path) -> bool:
    """Whether the file begins as one: the length of its header, then a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_pickle(path: Path) -> object:
    # Beside tensors, scripts store parsed options and NumPy's numbers: loading these runs nothing.
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in np.sctypeDict.values()}
    harmless = [argparse.Namespace, scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes the unpickler fails in ways of its own: KeyError, IndexError…
        reason = _reason(error)
        raise ValueError(f"weights: {path} is not a file of tensors alone: {reason}") from error


def _reason(error: Exception) -> str:
    """Why torch refused to unpickle a file, without its advice to run what the file holds."""
    text = str(error)
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it refers to {found[1]}"
    if "weights_only" in text or "Weights only" in text:
        found = re.search(r"WeightsUnpickler error: ([^\n]+)", text)
        return found[1] if found else "it holds other objects"
    return text.partition("\n")[0] or type(error).__name__


def _unwrapped(path: Path, held: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The state_dict in what a file holds, its keys as the net has them, and what was taken off."""
    taken_off = []
    while isinstance(held, dict) and not _is_state(held) and len(taken_off) < DEEPEST:
        name = next((name for name in WRAPPERS if isinstance(held.get(name), dict)), None)
        if name is None:
            break
        held = held[name]
        taken_off.append(f"the wrapper {name!r}")
    if not isinstance(held, dict) or not _is_state(held):
        what = f"a dict of {', '.join(map(str, held))}" if isinstance(held, dict) else type(held).__name__
        raise ValueError(f"weights: expected a state_dict in {path}, got {what}")
    state = dict(held)
    for name in INSERTED:
        if any(name in key.split(".") for key in state):
            state = {".".join(part for part in key.split(".") if part != name): t for key, t in state.items()}
            taken_off.append(f"{name!r} in keys")
    while holder := next((h for h in HOLDERS if state and all(key.startswith(f"{h}.") for key in state)), None):
        state = {key.removeprefix(f"{holder}."): t for key, t in state.items()}
        taken_off.append(f"the prefix {holder!r} of keys")
    if len(state) < len(held):
        raise ValueError(f"weights: {path} holds the same keys more than once: {', '.join(held)}")
    return state, taken_off


def _is_state(held: dict) -> bool:
    return all(isinstance(key, str) and isinstance(t, Tensor) for key, t in held.items())
