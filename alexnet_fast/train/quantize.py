"""The command quantize: a net in 8-bit integers, by ONNX Runtime's static quantization.

Weights are rounded by a scale for each output channel, activations by one for each tensor, which follows from what real
images give there (Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
inference", 2018). The file holds QuantizeLinear and DequantizeLinear nodes; the bytes are those of int8. Weights alone
need no images: ops.linear_int8 multiplies by them, and the result is a run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from alexnet_fast.data import BadImage, Data, Transform
from alexnet_fast.errors import InputError, needs
from alexnet_fast.nn import weight_only_int8
from alexnet_fast.train.config import TrainConfig
from alexnet_fast.train.deployed import load_onnx
from alexnet_fast.train.evaluate import normalized
from alexnet_fast.train.export import ONNX_PACKAGES, export
from alexnet_fast.train.inference import find, model_of
from alexnet_fast.train.outputs import check_out, written
from alexnet_fast.train.shrink import check_folder, opened, write
from alexnet_fast.train.smaller import Measured, Net, compare, net_of, show

CPU = torch.device("cpu")
CALIBRATION_BATCH = 32


def quantize(path: str, out: Path, data: str | None, images: int, overwrite: bool, as_json: bool = False) -> int:
    """Writes the file ``out``, the net that ``path`` names with int8 weights and activations, calibrated on so many
    training images of ``data``, and prints both nets' size, accuracy and speed. Raises :class:`InputError`.
    """
    if images < 1:
        raise InputError(f"--images: expected a positive number, got {images}")
    check_out(out, ".onnx", overwrite)
    needs("quantize", *ONNX_PACKAGES)
    found = find(path, data)
    config, loaded = opened(found, data)
    config = dataclasses.replace(config, precision="fp32")
    pictures = calibration(loaded, config, images)
    net = net_of(found, config)
    with written(out) as file:
        whole = file.with_name("float32.onnx")
        with contextlib.redirect_stdout(io.StringIO()):
            export(path, "onnx", whole, dynamic_batch=True, preprocess=False, softmax=False, overwrite=False)
        _quantize(whole, file, pictures)
        small = Net(_Session(file), file.stat().st_size, net.parameters, config)
        rows = compare({"float32": net, "int8": small}, loaded.val)
    _say(rows, as_json, f"{out}: calibrated on {len(pictures)} images; alexnet-fast predict --weights {out}")
    return 0


def quantize_weights(path: str, out: Path, data: str | None, as_json: bool = False) -> int:
    """Writes the run ``out``, the net that ``path`` names with int8 weights in its linear layers, and prints both nets'
    size, accuracy and speed on ``data``. Raises :class:`InputError`.
    """
    check_folder(out)
    found = find(path, data)
    config, loaded = opened(found, data)
    small = dataclasses.replace(config, out=str(out.absolute()), quantization="int8_weight_only")
    net = weight_only_int8(model_of(found, CPU))
    write(out, small, net, found.classes or loaded.classes, loaded)
    rows = compare({"float32": net_of(found, config), "int8 weights": net_of(find(str(out)), small)}, loaded.val)
    _say(rows, as_json, f"{out}: alexnet-fast eval, predict, features, explain and export take it")
    return 0


def _say(rows: dict[str, Measured], as_json: bool, line: str) -> None:
    if as_json:
        print(json.dumps({name: row._asdict() for name, row in rows.items()}))
        return
    show(rows)
    print(line)


def calibration(data: Data, config: TrainConfig, images: int) -> Tensor:
    """So many training images, from all over the set, as the net takes them."""
    transform, split = Transform(config.transform, config.image_size), data.train
    found = []
    for number in np.linspace(0, len(split) - 1, min(images, len(split))).round().astype(int).tolist():
        with contextlib.suppress(BadImage):
            found.append(torch.from_numpy(transform(split.read(number)[0]).copy()).permute(2, 0, 1))
    if not found:
        raise InputError(f"--data: none of its {len(split)} training images can be calibrated on")
    return normalized(torch.stack(found), config, CPU).contiguous()


def _quantize(whole: Path, out: Path, pictures: Tensor) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        parts = iter(pictures.split(CALIBRATION_BATCH))

        def get_next(self):
            part = next(self.parts, None)
            return None if part is None else {"images": part.numpy()}

    prepared = whole.with_name("prepared.onnx")
    logging.disable(logging.WARNING)
    try:
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(logging.NOTSET)


class _Session(nn.Module):
    """An ONNX file as a module."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.session = load_onnx(file)

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.session.run(None, {"images": images.contiguous().numpy(force=True)})
        return torch.from_numpy(outputs[0]).to(images.device)
