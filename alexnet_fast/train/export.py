"""The command export: a trained net as one file for other tools, with what they have to know of its images inside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from alexnet_fast import backends
from alexnet_fast.errors import InputError, RunError, needs
from alexnet_fast.train.deployed import RECORD, Record, load_onnx, scaled
from alexnet_fast.train.evaluate import normalized
from alexnet_fast.train.inference import Found, find, model_of, names_of
from alexnet_fast.train.outputs import check_out, written

TOLERANCE = 1e-4  # of the largest output: other runtimes add in other orders, and fc6 alone adds 9,216 products
ONNX_BYTES = 2_000_000_000  # a protobuf message has at most 2 GiB
ONNX_PACKAGES = "onnxscript", "onnxruntime"
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
CPU = torch.device("cpu")


class Deployed(nn.Module):
    """A net as it is exported: with the end of its preprocessing before it and softmax behind it, on request."""

    def __init__(self, net: nn.Module, record: Record) -> None:
        super().__init__()
        self.net, self.preprocess, self.softmax = net, record["preprocess"], record["softmax"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(record[name]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        output = self.net(scaled(images, self.mean, self.std) if self.preprocess else images)
        return output.softmax(1) if self.softmax else output


def record_of(found: Found, preprocess: bool, softmax: bool) -> Record:
    copied = {
        name: getattr(found.config, name) for name in ("variant", "image_size", "transform", "exif", "mean", "std")
    }
    return {"format": 1, "classes": names_of(found), **copied, "preprocess": preprocess, "softmax": softmax}


def export(
    weights: str, kind: str, out: Path | None, dynamic_batch: bool, preprocess: bool, softmax: bool, overwrite: bool
) -> int:
    """Writes the net that ``weights`` names as a file of ``kind``, onnx, pt2 or aoti, for one image at a time or, with
    ``dynamic_batch``, any number of them, after comparing what the file gives with the net.

    Raises :class:`InputError` for what cannot be used, and :class:`RunError` where the difference is too large.
    """
    if kind not in SUFFIXES:
        raise InputError(f"--format: expected one of {', '.join(SUFFIXES)}, got {kind!r}")
    out = out or Path("model" + SUFFIXES[kind])
    check_out(out, SUFFIXES[kind], overwrite)
    if kind == "onnx":
        needs("--format onnx", *ONNX_PACKAGES)
    found = find(weights)
    config, record = dataclasses.replace(found.config, precision="fp32"), record_of(found, preprocess, softmax)
    net = model_of(found, CPU).to(memory_format=torch.contiguous_format)
    size = sum(parameter.nbytes for parameter in net.parameters())
    if kind == "onnx" and size > ONNX_BYTES:
        raise InputError(f"--format onnx: a file holds 2 GB, and the weights of {found.name} are {size / 1e9:.1f} GB")
    shape = 3, config.image_size, config.image_size
    pixels = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = pixels if preprocess else normalized(pixels, config, CPU).contiguous()
    with backends.backend("auto"), torch.no_grad(), _quiet(), written(out) as file:
        expected = net(normalized(pixels, config, CPU))
        expected = expected.softmax(1) if softmax else expected
        WRITERS[kind](Deployed(net, record).eval(), images[: 2 if dynamic_batch else 1], file, json.dumps(record))
        run = LOADERS[kind](file)
        parts = [slice(0, 3), slice(0, 1)] if dynamic_batch else [slice(n, n + 1) for n in range(3)]
        differences = torch.cat([run(images[part]) - expected[part] for part in parts])
        largest, difference = (tensor.abs().max().item() for tensor in (expected, differences))
        said = f"largest difference from the net {difference:.2g}, of outputs up to {largest:.3g}"
        if not difference <= TOLERANCE * largest:  # NaN too
            raise RunError(f"{out} was not written: {said}")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {said}")
    return 0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own parts, and tell of what they are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _free(images: Tensor) -> dict[str, dict[int, str]] | None:
    """What may change of ``images``: of an example of two images their number."""
    return {"images": {0: torch.export.Dim("batch")}} if len(images) > 1 else None


def _write_onnx(net: Deployed, images: Tensor, file: Path, record: str) -> None:
    names = {"input_names": ["images"], "output_names": ["probabilities" if net.softmax else "logits"]}
    program = torch.onnx.export(net, (images,), dynamo=True, verbose=False, dynamic_shapes=_free(images), **names)
    program.model.metadata_props[RECORD] = record
    program.save(file, external_data=False)


def _write_pt2(net: Deployed, images: Tensor, file: Path, record: str) -> None:
    program = torch.export.export(net, (images,), dynamic_shapes=_free(images))
    torch.export.save(program, file, extra_files={f"{RECORD}.json": record})


def _write_aoti(net: Deployed, images: Tensor, file: Path, record: str) -> None:
    import torch._inductor

    program = torch.export.export(net, (images,), dynamic_shapes=_free(images))
    options = {"aot_inductor.metadata": {RECORD: record}}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    except RuntimeError as error:
        raise RunError(
            f"--format aoti: torch could not compile the net, for which it needs a C++ compiler: {error}"
        ) from error


def _load_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    session = load_onnx(file)
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2, "aoti": _write_aoti}
LOADERS: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "onnx": _load_onnx,
    "pt2": lambda file: torch.export.load(file).module(),
    "aoti": lambda file: torch._inductor.aoti_load_package(str(file)),
}
