"""Trained weights: published ones, files, folders and URLs, read without running anything that they hold."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from enum import Enum
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import Request, url2pathname, urlopen

import torch
from torch import Tensor, nn

from alexnet_fast.models.variants import IMAGENET_MEAN, IMAGENET_STD

HEAD = "classifier.6"  # the last layer, in every variant
MAX_DOWNLOAD = 8 << 30  # bytes
TIMEOUT = 60  # seconds without an answer
CHECKPOINT = "model.safetensors"  # in a folder that a training run wrote


@dataclass(frozen=True)
class Weights:
    """Where published weights are, how the images they expect are made, and what is known of them."""

    url: str
    variant: str
    transforms: dict[str, Any]
    meta: dict[str, Any]


class AlexNet_Weights(Enum):
    """Published weights, named as torchvision names them."""

    IMAGENET1K_V1 = Weights(
        url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        variant="torchvision",
        transforms={"resize_size": 256, "crop_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
        meta={
            "num_params": 61_100_840,
            "num_classes": 1000,
            "min_size": (63, 63),
            "metrics": {"ImageNet-1K": {"acc@1": 56.522, "acc@5": 79.066}},
        },
    )
    DEFAULT = IMAGENET1K_V1

    @property
    def url(self) -> str:
        return self.value.url

    @property
    def transforms(self) -> dict[str, Any]:
        """Shorter side to ``resize_size``, centre crop of ``crop_size``, scaled to 0..1, minus ``mean``, by ``std``."""
        return self.value.transforms

    @property
    def meta(self) -> dict[str, Any]:
        return self.value.meta


class Checkpoint(NamedTuple):
    """A state_dict, with the variant that it says it belongs to, if it says."""

    name: str
    state: dict[str, Tensor]
    variant: str | None

    @property
    def classes(self) -> int | None:
        """Outputs of the last layer; None where there is none, or none of a matrix of weights."""
        head = self.state.get(f"{HEAD}.weight")
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
    if isinstance(weights, str) and weights in AlexNet_Weights.__members__:
        weights = AlexNet_Weights[weights]
    if isinstance(weights, AlexNet_Weights):
        state, _ = _read_file(_download(weights.url, progress))
        return Checkpoint(weights.name, state, weights.value.variant)
    if isinstance(weights, Enum) and hasattr(weights, "url"):
        return Checkpoint(weights.name, *_read_file(_download(weights.url, progress)))
    if isinstance(weights, str) and "://" in weights:
        return Checkpoint(weights, *_read_file(_download(weights, progress)))
    if isinstance(weights, (str, os.PathLike)):
        path = Path(weights)
        return Checkpoint(str(path), *_read_file(path / CHECKPOINT if path.is_dir() else path))
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


def _read_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a .safetensors, .pth or .pt file, and the variant in its metadata. No other pickled object loads."""
    if not path.is_file():
        raise FileNotFoundError(
            f"weights: no file {path}; expected a file, a folder with {CHECKPOINT}, "
            f"or one of {', '.join(AlexNet_Weights.__members__)}"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
                return state, (file.metadata() or {}).get("variant")
        except (SafetensorError, RuntimeError, MemoryError) as error:  # the last two: it cannot be mapped
            raise ValueError(f"weights: {path} is not a safetensors file: {error}") from error
    if path.suffix not in (".pth", ".pt"):
        raise ValueError(f"weights: expected a .safetensors, .pth or .pt file, got {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on damaged bytes the unpickler fails in ways of its own: KeyError, IndexError…
        reason = _reason(error)
        raise ValueError(f"weights: {path} is not a file of tensors alone: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        held = f"a dict of {', '.join(map(str, state))}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"weights: expected a state_dict in {path}, got {held}")
    return state, None


def _reason(error: Exception) -> str:
    """Why torch refused to unpickle a file, without its advice to run what the file holds."""
    text = str(error)
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it refers to {found[1]}"
    if "weights_only" in text or "Weights only" in text:
        found = re.search(r"WeightsUnpickler error: ([^\n]+)", text)
        return found[1] if found else "it holds other objects"
    return text.partition("\n")[0] or type(error).__name__
