"""eval and predict with weights that no run here has written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from alexnet_fast import AlexNet
from alexnet_fast.data.sources import open_data
from alexnet_fast.errors import InputError
from alexnet_fast.models import AlexNet_Weights
from alexnet_fast.train import evaluate_checkpoint, inference, predict
from tests.data.pictures import write_folder

CLASSES = ("cat", "dog", "emu")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """weights.ckpt of a net of three classes, and a set, of which set/val counts."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.manual_seed(0)
    net = AlexNet(3).eval()
    torch.save({"epoch": 1, "state_dict": {f"module.{key}": t for key, t in net.state_dict().items()}},
               folder / "weights.ckpt")  # fmt: skip
    write_folder(folder / "set", train=1, val=2, classes=CLASSES)
    yield folder, net
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore:weights. of")
@pytest.mark.parametrize("held", ["set", "val alone", "classes alone"])
def test_eval(place, tmp_path, capsys, held):
    folder, net = place
    data = tmp_path / "data"
    shutil.copytree(folder / "set" / "val" if held == "classes alone" else folder / "set", data)
    if held == "val alone":
        shutil.rmtree(data / "train")
    options = {"workers": 0, "batch_size": 4}
    assert evaluate_checkpoint(str(folder / "weights.ckpt"), str(data), options, as_json=True) == 0
    record = json.loads(capsys.readouterr().out)
    val = open_data(str(data), held_out_alone=True).val
    preprocess = AlexNet_Weights.DEFAULT.transforms()
    pictures, labels = zip(*[val.read(i) for i in range(len(val))], strict=True)
    with torch.no_grad():
        logits = net(torch.stack([preprocess(picture) for picture in pictures]))
    assert (record["count"], record["step"]) == (6, None)
    assert record["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), rel=0.05)


@pytest.mark.filterwarnings("ignore:weights. of")
def test_predict(place, capsys):
    folder, net = place
    picture = next((folder / "set" / "val").rglob("*.jpg"))
    assert predict([picture], str(folder / "weights.ckpt"), 3, "auto", as_json=True) == 0
    (prediction,) = json.loads(capsys.readouterr().out)
    with torch.no_grad():
        expected = net(AlexNet_Weights.DEFAULT.transforms()(Image.open(picture))[None]).softmax(1)[0]
    found = {row["name"]: row["probability"] for row in prediction["classes"]}
    assert found == pytest.approx({f"class {k}": p for k, p in enumerate(expected.tolist())}, abs=0.02)


def test_published_weights_bring_their_classes(monkeypatch, tmp_path):
    """As torchvision names them, and eval takes folders by their order."""
    net = AlexNet()
    state = net.state_dict()
    monkeypatch.setattr("alexnet_fast.models.weights._download", lambda url, progress: Path(url))
    monkeypatch.setattr("alexnet_fast.models.weights._read_file", lambda path: (state, None))
    found = inference.find("DEFAULT")
    assert found.classes == AlexNet_Weights.DEFAULT.meta["categories"]
    assert (found.config.variant, found.config.image_size, found.step) == ("torchvision", 224, None)
    with pytest.raises(InputError, match="DATA: its 2 classes are not the 1000"):
        evaluate_checkpoint("DEFAULT", str(write_folder(tmp_path / "set")), {}, as_json=True)
    with pytest.raises(InputError, match="DATA: IMAGENET1K_V1 is of no run"):
        evaluate_checkpoint("DEFAULT", None, {}, as_json=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"classifier.6.weight": torch.zeros(2, 4096)}, "does not fit the net: features.0.weight is missing"),
        ({"fc.weight": torch.zeros(2, 2)}, "has no matrix classifier.6.weight, so it is no AlexNet's"),
        ({"classifier.6.weight": torch.tensor(3.0)}, "has no matrix classifier.6.weight"),
        ([], "expected a state_dict"),
    ],
)
def test_other_files_are_one_line(tmp_path, state, message):
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(InputError, match=message):
        inference.find(str(tmp_path / "net.pth"))
    with pytest.raises(InputError, match="none: no such run, checkpoint or file of weights"):
        inference.find(str(tmp_path / "none"))
