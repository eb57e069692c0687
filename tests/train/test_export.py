"""The command export: what its files give in other runtimes, what they say of themselves, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from alexnet_fast import AlexNet
from alexnet_fast.errors import InputError, RunError
from alexnet_fast.train import deployed, export, predict
from alexnet_fast.train.config import resolve
from alexnet_fast.train.evaluate import normalized
from alexnet_fast.train.inference import Found

CPU = torch.device("cpu")
CLASSES = ["cat", "dog", "emu"]


@pytest.fixture
def found(monkeypatch) -> dict[str, tuple[Found, nn.Module]]:
    """What the command finds by each variant's name: nets with one small linear layer, the others being most bytes."""
    given = {"data": ".", "out": "", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "exif": False}
    sides = {"torchvision": 70, "alex2012": 224}
    known, nets = {}, {}
    for variant, side in sides.items():
        config = resolve({**given, "variant": variant, "image_size": side}, len(CLASSES))
        known[variant] = Found(variant, config, CLASSES, None, lambda net: {})
        nets[variant] = AlexNet(len(CLASSES), variant=variant).eval()
        nets[variant].classifier = nn.Linear(9216, len(CLASSES))
    monkeypatch.setattr(export, "find", known.__getitem__)
    monkeypatch.setattr(export, "model_of", lambda one, device: nets[one.name])
    return {name: (one, nets[name]) for name, one in known.items()}


def openvino(path: Path, images: torch.Tensor) -> torch.Tensor:
    core = pytest.importorskip("openvino", reason="the extra dev brings it").Core()
    model = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(model(images.numpy())[0])


@pytest.mark.parametrize(("variant", "all_options"), [("torchvision", False), ("alex2012", True)])
def test_onnx(found, tmp_path, capsys, variant, all_options):
    """Both runtimes give the net's numbers, of three images at a time where any number was asked for."""
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra dev brings it")
    out = tmp_path / "model.onnx"
    one, net = found[variant]
    assert export.export(variant, "onnx", out, all_options, all_options, all_options, False) == 0
    assert "largest difference from the net" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]

    record, probabilities = deployed.open_onnx(out)
    assert (record["classes"], record["mean"], record["softmax"]) == (CLASSES, one.config.mean, all_options)
    side = one.config.image_size
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        images = normalized(pixels, one.config, CPU).contiguous()
        logits = net(images)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(probabilities(pixels), logits.softmax(1), **close)
    whole, expected = (pixels, logits.softmax(1)) if all_options else (images, logits)
    parts = [whole] if all_options else whole.split(1)
    torch.testing.assert_close(torch.cat([openvino(out, part) for part in parts]), expected, **close)

    picture = tmp_path / "picture.png"
    Image.effect_noise((100, 90), 80).convert("RGB").save(picture)
    assert predict([picture], str(out), 2, "auto", as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)[0]["classes"]
    assert rows[0]["name"] in CLASSES
    assert rows[0]["probability"] >= rows[1]["probability"]


def test_torch_export(found, tmp_path):
    out, files = tmp_path / "model.pt2", {"alexnet_fast.json": ""}
    assert export.export("torchvision", "pt2", out, True, False, True, False) == 0
    program, (one, net) = torch.export.load(out, extra_files=files), found["torchvision"]
    assert json.loads(files["alexnet_fast.json"])["classes"] == CLASSES
    assert "alexnet_fast" not in str(program.graph)  # it runs where this package is not installed
    images = normalized(torch.full((1, 3, 70, 70), 9, dtype=torch.uint8), one.config, CPU)
    torch.testing.assert_close(program.module()(images), net(images).softmax(1))


@pytest.mark.slow  # the C++ compiler takes a minute
def test_aotinductor(found, tmp_path):
    from torch._inductor import aoti_load_package

    out = tmp_path / "model.pt2"
    assert export.export("torchvision", "aoti", out, True, True, True, False) == 0
    package, (one, net) = aoti_load_package(str(out)), found["torchvision"]
    assert json.loads(package.get_metadata()["alexnet_fast"])["classes"] == CLASSES
    pixels = torch.randint(0, 256, (3, 3, 70, 70), dtype=torch.uint8)
    expected = net(normalized(pixels, one.config, CPU)).softmax(1)
    torch.testing.assert_close(package(pixels), expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_gives_other_numbers_is_not_kept(found, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "scaled", lambda pixels, mean, std: pixels.float() / 255 - mean)
    with pytest.raises(RunError, match=r"model\.pt2 was not written: largest difference from the net"):
        export.export("torchvision", "pt2", tmp_path / "model.pt2", False, True, False, False)
    assert list(tmp_path.iterdir()) == []


def test_what_export_refuses(found, tmp_path, monkeypatch):
    out = tmp_path / "model.onnx"
    for kind, path, said in (
        ("tflite", out, "--format: expected one of onnx, pt2, aoti, got 'tflite'"),
        ("pt2", out, r"--out: expected a file that ends in \.pt2"),
        ("onnx", tmp_path / "none" / "model.onnx", "--out: there is no folder"),
    ):
        with pytest.raises(InputError, match=said):
            export.export("torchvision", kind, path, False, False, False, False)
    monkeypatch.setattr(export, "ONNX_BYTES", 1000)
    with pytest.raises(InputError, match="--format onnx: a file holds 2 GB"):
        export.export("torchvision", "onnx", out, False, False, False, False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--format onnx: needs onnxscript: pip install onnxscript"):
        export.export("torchvision", "onnx", out, False, False, False, False)
    assert not out.exists()
    out.write_text("precious")
    with pytest.raises(InputError, match=r"--out: .* is there already \(--overwrite replaces it\)"):
        export.export("torchvision", "onnx", out, False, False, False, False)
    assert out.read_text() == "precious"


def foreign_onnx(path: Path, record: str | None = None) -> Path:
    """A file of somebody's, float32 (1, 3, 8, 8) to the same, with ``record`` where this package's would be."""
    onnx = pytest.importorskip("onnx", reason="the extra bench brings it")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 8, 8]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "relu", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    if record is not None:
        onnx.helper.set_model_props(model, {"alexnet_fast": record})
    onnx.save(model, path)
    return path


def test_files_that_are_no_export(tmp_path):
    pytest.importorskip("onnxruntime", reason="the extra bench brings it")
    record = {"format": 1, "variant": "paper", "classes": ["a"], "image_size": 8, "transform": "crop", "exif": True}
    record |= {"mean": [0, 0, 0], "std": [1, 1, 1], "preprocess": False, "softmax": False}
    file = tmp_path / "other.onnx"
    for said, text in (
        ("was not written by alexnet-fast export", None),
        ("damaged: alexnet_fast: not JSON", "{"),
        ("damaged: alexnet_fast: without", '{"format": 1}'),
        (r"damaged: takes tensor\(float\) \[1, 3, 8, 8\], gives \[1, 3, 8, 8\]", json.dumps(record)),
    ):
        with pytest.raises(InputError, match=said):
            predict([], str(foreign_onnx(file, text)), 5, "auto", as_json=False)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(InputError, match="is no ONNX file that onnxruntime reads"):
        deployed.open_onnx(file)
    with pytest.raises(InputError, match="no file"):
        deployed.open_onnx(tmp_path / "none.onnx")
