"""shrink and quantize: what stays computes what it did, and the result is a run, or a file, like any other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from alexnet_fast import AlexNet, alexnet, features
from alexnet_fast.errors import InputError
from alexnet_fast.models.features import layer_names
from alexnet_fast.train import commands, evaluate_checkpoint, predict
from alexnet_fast.train.config import resolve
from alexnet_fast.train.explain import explain
from alexnet_fast.train.export import export
from alexnet_fast.train.extract import extract
from alexnet_fast.train.inference import find, model_of
from alexnet_fast.train.model import build_model, scaled, widths_of
from alexnet_fast.train.page import write_page
from alexnet_fast.train.quantize import quantize, quantize_weights
from alexnet_fast.train.shrink import RESULT, fill, shrink, smaller
from alexnet_fast.train.smaller import Measured, markdown
from tests.data.pictures import write_folder
from tests.train import runs

WIDTHS = (8, 12, 16, 12, 8, 40, 24)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two would wait for each other over every small operator of a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A trained run of a narrow net, for which config.json's field is enough."""
    out = tmp_path_factory.mktemp("shrink") / "run"
    assert commands.train({**runs.options(out, {"lr": 0.02, "epochs": 1}), "widths": WIDTHS}) == 0
    return out


def logits(net: nn.Module, side: int) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0)))


# ------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("variant", ["torchvision", "paper", "caffenet", "keras"])
def test_channels_that_nobody_hears_can_go(variant):
    """Half of each layer gives zeros that the next one does not read; the other half stays, tower by tower."""
    torch.manual_seed(0)
    widths, kept, channels = WIDTHS, torch.arange(3), 3
    net = AlexNet(5, variant=variant, widths=widths)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer, width, parts in zip(layers, [*widths, 5], [*net.variant.parts, 1], strict=True):
            weight, groups = nn.init.normal_(layer.weight, std=0.1), getattr(layer, "groups", 1)
            heard = torch.zeros(channels, weight.shape[1] * groups // channels)
            heard[kept] = 1
            in_groups = weight.unflatten(0, (groups, -1))
            in_groups *= heard.view(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
            if layer is layers[-1]:
                break
            order = torch.rand(parts, width // parts).argsort(1)[:, : width // parts // 2]
            kept, channels = (order + torch.arange(parts)[:, None] * (width // parts)).flatten().sort().values, width
            silent = torch.ones(width, dtype=torch.bool).index_fill(0, kept, False)
            weight[silent], layer.bias[silent] = 0, 0
    half = widths_of(net.variant, 0.5, 1)[:5] + [width // 2 for width in widths[5:]]
    side = net.variant.image_size
    small = fill(AlexNet(5, variant=variant, widths=half), smaller(net, half, None, side))
    expected = logits(net, side)
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits(small, side), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.4 * sum(p.numel() for p in net.parameters())


def test_what_small_images_cannot_tell_apart_takes_no_rank():
    """At 64 pixels fc6 sees each channel's one pixel 36 times: its rank is that of 8 channels, without loss."""
    torch.manual_seed(0)
    net = AlexNet(5, widths=WIDTHS)
    layers = smaller(net, list(WIDTHS), 1 - 1e-9, 64)
    (down, up), _ = layers[5]
    assert (down.shape, up.shape) == ((8, 288), (40, 8))
    assert isinstance(layers[6][0], torch.Tensor)  # at full rank it would not be smaller
    low = fill(AlexNet(5, widths=WIDTHS, ranks=(8, 0)), layers)
    torch.testing.assert_close(logits(low, 64), logits(net, 64), rtol=1e-4, atol=1e-5)
    again = smaller(low, list(WIDTHS), None, 64)  # multiplied out
    torch.testing.assert_close(
        logits(fill(AlexNet(5, widths=WIDTHS), again), 64), logits(net, 64), rtol=1e-4, atol=1e-5
    )


def test_low_rank_is_the_nearest():
    net = AlexNet(5, widths=WIDTHS)
    (down, up), _ = smaller(net, list(WIDTHS), 5.0, 224)[5]
    exact = net.classifier[1].weight.detach()
    left, values, right = torch.linalg.svd(exact)
    torch.testing.assert_close(up @ down, left[:, :5] * values[:5] @ right[:5], rtol=1e-3, atol=1e-5)


def test_what_is_left_of_a_filter_keeps_its_norm():
    net = AlexNet(5, widths=WIDTHS)
    olds = [m.weight.detach() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for (new, _), old in zip(smaller(net, [width // 2 for width in WIDTHS], None, 224), olds, strict=True):
        norms = [weight.flatten(1).norm(dim=1) for weight in (new, old)]
        assert torch.isclose(norms[0][:, None], norms[1]).any(1).all()


def test_layers_of_low_rank_keep_their_names():
    net = AlexNet(5, widths=WIDTHS, ranks=(4, 3)).eval()
    seen = features(net, ["fc6", "relu6", "fc7", "fc8"])(torch.randn(1, 3, 224, 224))
    assert [tensor.shape[1] for tensor in seen.values()] == [40, 40, 24, 5]
    assert net.fully_convolutional()(torch.randn(1, 3, 224, 256)).shape == (1, 5, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": WIDTHS[:3]}, "widths: expected one for each of conv1"),
        ({"widths": (8, 13, 16, 12, 8, 4, 4), "variant": "paper"}, "widths: conv2: expected a positive multiple of 2"),
        ({"ranks": (1, 4097)}, "ranks: fc7 takes 4096 to 4096, so 0 … 4096, got 4097"),
        ({"ranks": (1, 1), "variant": "paper-no-talk"}, "ranks: the linear layers of paper-no-talk are split"),
    ],
)
def test_bad_widths_and_ranks(arguments, message):
    with pytest.raises(ValueError, match=message):
        AlexNet(5, **arguments)


# ------------------------------------------------------------------------------------------------------ the commands


def test_the_result_is_a_run(run, tmp_path, capsys):
    out = tmp_path / "small"
    assert shrink(str(run), out, svd=6.0, prune=0.5, width=0.75, finetune=1, lr=0.01) == 0
    assert "smaller" in capsys.readouterr().out
    record = json.loads((out / RESULT).read_text())
    assert record["after"]["parameters"] < record["before"]["parameters"] / 2
    assert record["after"]["bytes"] == 4 * record["after"]["parameters"]
    assert record["before"]["top1"] == max(row.get("val_top1", 0) for row in runs.rows(run))
    found = find(str(out))
    assert (found.config.widths, found.config.ranks, found.config.epochs) == ((3, 4, 6, 4, 3, 30, 18), (6, 6), 1)
    assert found.step == 12
    assert evaluate_checkpoint(str(out), None, {}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == record["after"]["top1"]
    picture = next((write_folder(tmp_path / "set", 1, 1) / "val").rglob("*.jpg"))
    assert predict([picture], str(out), 1, "auto", as_json=True) == 0
    whole = tmp_path / "again"  # and may be made smaller once more, or go on from its weights
    assert shrink(str(out), whole, width=0.5) == 0
    assert commands.train({}, str(whole)) == 0
    given = {"weights": str(whole), "max_steps": 1, "out": str(tmp_path / "on"), "data": found.config.data, "epochs": 1}
    assert commands.train(given) == 0
    assert find(str(tmp_path / "on")).config.widths == (2, 2, 3, 2, 2, 15, 9)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".unfinished")] == []


SHRINKS = {
    "rank": ({"svd": 41.0}, r"--svd: fc6 takes 288 to 40, so its rank is 40 at most, got 41"),
    "half a rank": ({"svd": 2.5}, "--svd: expected a rank"),
    "no rank": ({"svd": 0.0}, "--svd: expected a rank"),
    "all channels": ({"prune": 1.0}, "--prune: expected a share"),
    "wider": ({"width": 2.0}, "--width: expected a factor above 0"),
    "nothing": ({}, "expected --svd, --prune or --width"),
    "epochs": ({"width": 0.5, "finetune": -1}, "--finetune: expected a number"),
    "lr alone": ({"width": 0.5, "lr": 0.1}, "--lr: is for --finetune"),
    "other data": ({"width": 0.5, "data": "SET"}, "--data: its 2 classes are not the 10"),
}


@pytest.mark.parametrize("case", SHRINKS)
def test_shrink_refuses(run, tmp_path, case):
    given, message = SHRINKS[case]
    if "data" in given:
        given = {**given, "data": str(write_folder(tmp_path / "set", 1, 1))}
    with pytest.raises(InputError, match=message):
        shrink(str(run), tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_outputs_are_not_overwritten(run, tmp_path):
    with pytest.raises(InputError, match=r"--out: .* is there already"):
        shrink(str(run), run, width=0.5)
    (tmp_path / "model.onnx").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        quantize(str(run), tmp_path / "model.onnx", None, 8, False)
    with pytest.raises(InputError, match="--images: expected a positive number, got 0"):
        quantize(str(run), tmp_path / "other.onnx", None, 0, False)
    assert (tmp_path / "model.onnx").read_text() == "precious"


def test_towers_stay_whole(tmp_path, run):
    data = write_folder(tmp_path / "set", 2, 1)
    given = {
        "data": str(data),
        "variant": "paper-no-talk",
        "widths": (8, 8, 8, 8, 8, 8, 8),
        "out": str(tmp_path / "run"),
    }
    assert commands.train({**given, "image_size": 64, "max_steps": 1, "batch_size": 4, "workers": 0}) == 0
    with pytest.raises(InputError, match="paper-no-talk are split over towers"):
        shrink(str(tmp_path / "run"), tmp_path / "out", width=0.5)


@pytest.mark.filterwarnings("ignore")  # of the exporter's own parts
def test_quantize(run, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="the extra dev brings it")
    pytest.importorskip("onnxruntime", reason="the extra export brings it")
    out = tmp_path / "model.onnx"
    assert quantize(str(run), out, None, 50, False) == 0
    assert "calibrated on 50 images" in capsys.readouterr().out
    graph = onnx.load(out).graph
    tensors = {t.name: t for t in graph.initializer}
    weights = [t for t in tensors.values() if len(t.dims) > 1 and t.data_type == onnx.TensorProto.INT8]
    assert sorted(t.dims[0] for t in weights) == sorted([*WIDTHS, 10])
    assert not [
        n for n, t in tensors.items() if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 and max(t.dims) > 36
    ]
    scales = {node.input[0]: tensors[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert all(list(scales[t.name].dims) == [t.dims[0]] for t in weights)  # one for each output channel
    picture = next((write_folder(tmp_path / "set", 1, 1) / "val").rglob("*.jpg"))
    told = []
    for net in (str(run), str(out)):
        assert predict([picture], net, 10, "auto", as_json=True) == 0
        (found,) = json.loads(capsys.readouterr().out)
        told.append({c["name"]: c["probability"] for c in found["classes"]})
    assert told[0].keys() == told[1].keys()
    assert told[1] == pytest.approx(told[0], abs=0.1)
    assert list(tmp_path.glob(".unfinished*")) == []


def test_int8_weights_are_a_run(run, tmp_path, capsys):
    """It evaluates and predicts as others do, with a quarter of the linear layers' bytes; it trains no more."""
    out = tmp_path / "int8"
    assert quantize_weights(str(run), out, None, as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    linear = sum(m.weight.numel() for m in AlexNet(10, widths=WIDTHS).modules() if isinstance(m, nn.Linear))
    scales = 4 * (sum(WIDTHS[5:]) + 10)
    assert rows["int8 weights"]["bytes"] == rows["float32"]["bytes"] - 3 * linear + scales
    assert rows["int8 weights"]["top1"] == pytest.approx(rows["float32"]["top1"], abs=0.1)
    assert evaluate_checkpoint(str(out), None, {}, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == rows["int8 weights"]["top1"]
    for refused in (
        lambda: commands.train({}, str(out)),
        lambda: shrink(str(out), tmp_path / "x", width=0.5),
        lambda: quantize_weights(str(out), tmp_path / "x", None),
    ):
        with pytest.raises(InputError, match="int8"):
            refused()
    with pytest.raises(InputError, match=r"--out: .* is there already"):
        quantize_weights(str(run), out, None)
    assert not (tmp_path / "x").exists()


SMALLER = {
    "int8": lambda run, out: quantize_weights(str(run), out, None, as_json=True),
    "shrunk": lambda run, out: shrink(str(run), out, svd=6.0, prune=0.5, width=0.75),
}


@pytest.fixture(scope="module", params=SMALLER)
def small(request, run, tmp_path_factory) -> Path:
    """A run that quantize or shrink wrote."""
    out = tmp_path_factory.mktemp("smaller") / request.param
    assert SMALLER[request.param](run, out) == 0
    return out


def chances(pictures: list[Path], net: Path, capsys) -> list[dict[str, float]]:
    """Of each picture the classes' probabilities, as predict says them."""
    assert predict(pictures, str(net), 10, "auto", as_json=True) == 0
    rows = json.loads(capsys.readouterr().out)
    return [{c["name"]: c["probability"] for c in row["classes"]} for row in rows]


@pytest.mark.parametrize("kind", ["onnx", "pt2", pytest.param("aoti", marks=pytest.mark.soak)])
@pytest.mark.filterwarnings("ignore")  # of the exporter's own parts
def test_a_smaller_run_is_exported(small, tmp_path, capsys, kind):
    """With the net's numbers, for any number of images, in few more bytes than the net's own."""
    for name in ("onnxscript", "onnxruntime") if kind == "onnx" else ():
        pytest.importorskip(name, reason="the extra dev brings it")
    out = tmp_path / ("model.onnx" if kind == "onnx" else "model.pt2")
    assert export(str(small), kind, out, dynamic_batch=True, preprocess=False, softmax=False, overwrite=False) == 0
    assert "largest difference from the net" in capsys.readouterr().out
    own = sum(p.nbytes for p in model_of(find(str(small)), torch.device("cpu")).parameters())
    assert kind == "aoti" or out.stat().st_size < own + 300_000
    if kind == "onnx":
        pictures = sorted((write_folder(tmp_path / "set", 2, 1) / "val").rglob("*.jpg"))
        for told, expected in zip(chances(pictures, out, capsys), chances(pictures, small, capsys), strict=True):
            assert told == pytest.approx(expected, abs=1e-4)


def test_a_smaller_run_shows_what_it_sees(small, tmp_path, capsys):
    """features writes what predict speaks of, and explain draws each of its three pictures."""
    pytest.importorskip("matplotlib", reason="the extra dev brings it")
    pictures = sorted((write_folder(tmp_path / "set", 2, 1) / "val").rglob("*.jpg"))
    assert extract(pictures, str(small), ["relu7", "fc8"], tmp_path / "seen.npz", 32, False, "auto") == 0
    capsys.readouterr()
    seen = np.load(tmp_path / "seen.npz")
    assert (seen["relu7"] >= 0).all()
    for logits, told in zip(torch.tensor(seen["fc8"]), chances(pictures, small, capsys), strict=True):
        assert sorted(logits.softmax(0).tolist()) == pytest.approx(sorted(told.values()), abs=1e-5)
    common = {"name": None, "layer": "relu5", "strongest": None, "filters": False, "overwrite": False}
    for place, (given, own) in enumerate([(pictures, {}), (pictures, {"strongest": "relu3"}), ([], {"filters": True})]):
        out = tmp_path / f"{place}.png"
        assert explain(given, str(small), **{**common, **own}, out=out, backend="auto") == 0
        assert min(Image.open(out).size) > 50


@pytest.mark.parametrize("ranks", [(6, 0), (0, 5), (6, 5)], ids=str)
def test_low_rank_weights_are_a_start(tmp_path, ranks):
    """All of them for as many classes, in Python and by train --weights; for others all but the last layer, fc8."""
    net = AlexNet(10, widths=WIDTHS, ranks=ranks)
    state, fc8 = net.state_dict(), layer_names(net)["fc8"]
    save_file(state, tmp_path / "net.safetensors", metadata={"variant": "torchvision"})
    given = {"weights": str(tmp_path / "net.safetensors"), "widths": WIDTHS, "ranks": ranks}
    config = {"data": ".", "out": "", "num_classes": 10}
    for made in (alexnet(**given), build_model(resolve({**config, **given}, 10))):
        assert all(torch.equal(tensor, state[key]) for key, tensor in made.state_dict().items())
    for made in (
        alexnet(**given, num_classes=3, replace_head=True),
        build_model(resolve({**config, **given, "num_classes": 3}, 3)),
    ):
        new = {key: tensor for key, tensor in made.state_dict().items() if not key.startswith(fc8)}
        assert len(new) == len(state) - 2
        assert all(torch.equal(tensor, state[key]) for key, tensor in new.items())
        assert made.get_submodule(fc8).out_features == 3


def test_int8_weights_are_no_start(run, tmp_path, capsys):
    """What a run of int8 weights cannot be is said in a line: a start for training, or a page of curves."""
    out = tmp_path / "int8"
    assert quantize_weights(str(run), out, None, as_json=True) == 0
    given = {"weights": str(out), "out": str(tmp_path / "x"), "data": find(str(run)).config.data, "epochs": 1}
    with pytest.raises(InputError, match=r"^--weights: .*: its linear layers are int8"):
        commands.train(given)
    with pytest.raises(InputError, match="no curves there"):
        write_page(out, None, 3)
    assert not (tmp_path / "x").exists()


def test_train_width():
    """A factor on the variant's widths, part by part; what it cannot be is said."""
    assert scaled({"variant": "paper"}, 0.1)["widths"] == (10, 26, 38, 38, 26, 410, 410)
    assert scaled({"recipe": "paper"}, 1.5)["widths"][:2] == (144, 384)
    for given, width in (({}, 0.0), ({}, 9.0), ({}, float("nan")), ({"widths": WIDTHS}, 0.5)):
        with pytest.raises(InputError, match="--width: "):
            scaled(given, width)


def test_the_documents_table_is_what_was_measured():
    """At least 20 times smaller than the net it was made of, for a point of accuracy at most."""
    docs = Path(__file__).parents[2] / "docs"
    page, record = (docs / "uses.md").read_text(), json.loads((docs / "smaller.json").read_text())
    rows = {name: Measured(**row) for name, row in record["nets"].items()}
    first, *others = rows.values()
    assert all(first.bytes >= 20 * row.bytes and first.top1 - row.top1 <= 0.01 for row in others)
    assert f"{markdown(rows)}\n{record['machine']}.\n" in page
    weights = record["weight_only"]
    rows = {name: Measured(**row) for name, row in weights["nets"].items()}
    before, after = rows.values()
    assert before.bytes > 3.5 * after.bytes
    assert abs(before.top1 - after.top1) < 0.005
    assert f"{markdown(rows)}\n{weights['machine']}.\n" in page
