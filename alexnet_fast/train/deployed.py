"""Nets in files of other tools: what such a file says of itself, and those of ONNX as classifiers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import torch
from torch import Tensor

from alexnet_fast.data.records import Range, conform, parse_json
from alexnet_fast.errors import InputError, needs
from alexnet_fast.train.config import Channels, Deviation, Side

RECORD = "alexnet_fast"  # the key of the record in ONNX's and AOTInductor's metadata; a file in torch.export's archive


class Record(TypedDict):
    """What a file says about its net: the names of its classes by number, and how a picture becomes its input.

    The input is float32 (N, 3, image_size, image_size), RGB in 0..1, less ``mean``, by ``std``; with ``preprocess`` it
    is uint8, and the net in the file does the rest. The output is (N, len(classes)): logits, or probabilities with
    ``softmax``. ``transform`` says how the square is cut (:mod:`alexnet_fast.data.transforms`), ``exif`` whether
    pictures are turned upright before.
    """

    format: Literal[1]
    variant: str
    classes: Annotated[list[str], Range(1)]
    image_size: Side
    transform: Literal["crop", "resized-crop", "shift"]
    exif: bool
    mean: Channels
    std: tuple[Deviation, Deviation, Deviation]
    preprocess: bool
    softmax: bool


def scaled(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 RGB (N, 3, H, W) as a net takes it; ``mean`` and ``std`` (3, 1, 1) for values in 0..1."""
    return (pixels.float() / 255 - mean) / std


def load_onnx(path: Path) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # fatal alone: errors are raised as well
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def open_onnx(path: Path) -> tuple[Record, Callable[[Tensor], Tensor]]:
    """An ONNX file that the command export wrote: its record, and a function that gives the probabilities (N, classes)
    of uint8 images (N, 3, image_size, image_size).

    Raises :class:`InputError` for a file that is missing, damaged or of others, and without onnxruntime.
    """
    needs(f"weights: {path}", "onnxruntime")
    if not path.is_file():
        raise InputError(f"weights: no file {path}")
    try:
        session = load_onnx(path)
    except Exception as error:  # of classes of its own
        raise InputError(f"weights: {path} is no ONNX file that onnxruntime reads: {error}") from None
    text = session.get_modelmeta().custom_metadata_map.get(RECORD)
    if text is None:
        raise InputError(f"weights: {path} was not written by alexnet-fast export: its metadata lacks {RECORD}")
    try:
        record = conform(parse_json(text.encode(), RECORD), Record, RECORD)
        (images,), (output,) = session.get_inputs(), session.get_outputs()
        side, kind = record["image_size"], "tensor(uint8)" if record["preprocess"] else "tensor(float)"
        found = images.type, *images.shape[1:], *output.shape[1:]
        if found != (kind, 3, side, side, len(record["classes"])):
            raise ValueError(f"takes {images.type} {images.shape}, gives {output.shape}")
    except ValueError as error:
        raise InputError(f"weights: {path}: damaged: {error}") from None

    def probabilities(pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(record[name]).view(3, 1, 1) for name in ("mean", "std"))
        x = pixels if record["preprocess"] else scaled(pixels, mean, std)
        parts = x.split(1) if images.shape[0] == 1 else [x]
        outputs = [torch.from_numpy(session.run(None, {images.name: part.numpy()})[0]) for part in parts]
        return torch.cat(outputs) if record["softmax"] else torch.cat(outputs).softmax(1)

    return record, probabilities
