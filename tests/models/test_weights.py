"""alexnet(weights=…): every source, transfer learning, and each way in which weights can be wrong."""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import os
import pickle
import socket
import subprocess
import sys
from enum import Enum
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from alexnet_fast import AlexNet, alexnet
from alexnet_fast.models import AlexNet_Weights
from alexnet_fast.models.weights import read


@pytest.fixture(scope="module")
def trained() -> AlexNet:
    torch.manual_seed(5)
    return AlexNet(4)


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    """The same weights as net.pth, net.safetensors and model.safetensors; paper.safetensors names its variant."""
    path = tmp_path_factory.mktemp("weights")
    state = trained.state_dict()
    torch.save(state, path / "net.pth")
    save_file(state, path / "net.safetensors")
    (path / "model.safetensors").symlink_to(path / "net.safetensors")
    save_file(AlexNet(4, variant="paper").state_dict(), path / "paper.safetensors", metadata={"variant": "paper"})
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def same(model: AlexNet, other: AlexNet, without: str = " ") -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(t, u) for (key, t), u in pairs if not key.startswith(without))


# ---------------------------------------------------------------------------------------------------------- sources


@pytest.mark.parametrize("name", ["net.pth", "net.safetensors", ""])
def test_path(trained, folder, name):
    """A file, or a folder with model.safetensors; the number of classes is the file's."""
    assert same(alexnet(weights=folder / name), trained)
    assert same(alexnet(weights=str(folder / name), num_classes=4), trained)


def test_file_url(trained, folder):
    assert same(alexnet(weights=(folder / "net.safetensors").as_uri()), trained)


@pytest.fixture
def server(tmp_path):
    """A site whose every file is the state_dict of ``TINY``; counts requests."""
    torch.save(TINY, tmp_path / "tiny.pth")
    data, requests = (tmp_path / "tiny.pth").read_bytes(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(404 if "missing" in self.path else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests, hashlib.sha256(data).hexdigest()[:8]
    server.shutdown()
    server.server_close()


TINY = {"weight": torch.arange(3.0)}


def test_url_is_fetched_once(server, cache):
    base, requests, _ = server
    for _ in range(2):
        checkpoint = read(f"{base}/a/net.pth?download=1", progress=False)
        assert torch.equal(checkpoint.state["weight"], TINY["weight"])
    assert len(requests) == 1
    read(f"{base}/b/net.pth", progress=False)
    assert len(requests) == 2, "another URL with the same file name is another file"


def test_hash_in_the_name_is_checked(server, cache):
    base, _, digits = server
    assert torch.equal(read(f"{base}/net-{digits}.pth", progress=False).state["weight"], TINY["weight"])
    with pytest.raises(OSError, match=r"cannot download .*: its SHA-256 begins with [0-9a-f]{8}, its name says 0{8}"):
        read(f"{base}/net-00000000.pth", progress=False)
    assert [file.name for file in cache.iterdir()] == [f"net-{digits}.pth"]


@pytest.fixture
def answering():
    """answering(reply): the address of a server that sends these bytes to whoever connects, then hangs up."""
    listening = socket.create_server(("127.0.0.1", 0))
    replies: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(replies[-1])

    Thread(target=serve, daemon=True).start()

    def run(reply: bytes) -> str:
        replies.append(reply)
        return f"http://127.0.0.1:{listening.getsockname()[1]}/net.pth"

    yield run
    listening.close()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789", "10 of 1000 bytes came"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n0", "99999999999999 bytes are announced"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n0", "many"),
        (b"garbage\r\n\r\n", "garbage"),
        (b"", "closed connection without response"),
    ],
)
def test_a_broken_or_odd_download_is_one_line_and_leaves_nothing(answering, cache, reply: bytes, said: str):
    with pytest.raises(OSError, match=r"weights: cannot download http://127") as caught:
        alexnet(weights=answering(reply), progress=False)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("url", ["http://host:port/a.pth", "http://[::1/a.pth", "http:///a.pth", "https://a b/c.pth"])
def test_an_address_that_is_none(cache, url: str):
    with pytest.raises((OSError, ValueError), match="weights: "):
        alexnet(weights=url, progress=False)


def test_missing_url(server, cache):
    with pytest.raises(OSError, match=r"weights: cannot download http://.*missing\.pth: HTTP Error 404"):
        alexnet(weights=f"{server[0]}/missing.pth", progress=False)


class Theirs(Enum):
    """An enum made as torchvision's are: members with a URL."""

    IMAGENET1K_V1 = "imagenet"

    @property
    def url(self) -> str:
        return AlexNet_Weights.IMAGENET1K_V1.url


@pytest.mark.parametrize("weights", [*AlexNet_Weights, "IMAGENET1K_V1", "DEFAULT", Theirs.IMAGENET1K_V1])
def test_published_weights(cache, monkeypatch, weights):
    """Their URL, file name and hash are torchvision's, so its cached download serves; no download here."""
    asked = []

    def download(url, to, digits, progress):
        asked.append((url, to.name, digits))
        torch.save({"classifier.6.weight": torch.zeros(1000, 4096)}, to)

    monkeypatch.setattr("alexnet_fast.models.weights._fetch", download)
    with pytest.raises(ValueError, match=r"weights: IMAGENET1K_V1 does not fit the net: .*is missing"):
        alexnet(weights=weights)
    url = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
    assert asked == [(url, "alexnet-owt-7be5be79.pth", "7be5be79")]


def test_what_is_known_of_the_published_weights():
    weights = AlexNet_Weights.DEFAULT
    assert weights is AlexNet_Weights.IMAGENET1K_V1
    assert weights.meta["metrics"]["ImageNet-1K"] == {"acc@1": 56.522, "acc@5": 79.066}
    assert weights.meta["num_params"] == sum(p.numel() for p in AlexNet().parameters())
    assert weights.meta["min_size"] == (AlexNet(1).variant.min_image_size,) * 2
    assert weights.transforms().crop_size == [AlexNet(1).variant.image_size]
    assert weights.transforms().mean == list(AlexNet(1).variant.mean)


def test_the_enum_is_used_as_torchvisions(cache):
    weights = AlexNet_Weights.DEFAULT
    assert repr(weights) == "AlexNet_Weights.IMAGENET1K_V1"
    assert copy.deepcopy(weights) is pickle.loads(pickle.dumps(weights)) is weights
    categories = weights.meta["categories"]
    assert (len(categories), categories[0], categories[-1]) == (1000, "tench", "toilet tissue")
    verify = AlexNet_Weights.verify
    assert verify(None) is None
    assert verify("DEFAULT") is verify("AlexNet_Weights.IMAGENET1K_V1") is verify(weights) is weights
    with pytest.raises(KeyError):
        verify("IMAGENET1K_V9")
    with pytest.raises(TypeError, match="weights: expected a member of AlexNet_Weights, got int 3"):
        verify(3)
    cache.mkdir()
    torch.save(TINY, cache / "alexnet-owt-7be5be79.pth")
    assert torch.equal(weights.get_state_dict(progress=False, check_hash=True)["weight"], TINY["weight"])


@pytest.mark.parametrize("kind", ["picture", "grey", "uint8", "float", "batch"])
def test_preprocessing(kind):
    """The centre of an image whose every row, and column, is one colour: resized, its middle is what it was."""
    preprocess = AlexNet_Weights.DEFAULT.transforms()
    ramp = np.linspace(0, 255, 600).round().astype(np.uint8)
    image = np.stack([np.broadcast_to(ramp, (300, 600))] * 3, 2)  # 300 x 600: 256 x 512, of which columns 144 to 368
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    given = {
        "picture": Image.fromarray(image),
        "grey": Image.fromarray(image[:, :, 0]),
        "uint8": tensor,
        "float": tensor / 255,
        "batch": tensor.expand(2, 3, 300, 600),
    }[kind]
    y = preprocess(given)
    assert y.shape == ((2, 3, 224, 224) if kind == "batch" else (3, 224, 224))
    columns = (torch.arange(144, 368) + 0.5) / 512
    for channel, (mean, std) in enumerate(zip(preprocess.mean, preprocess.std, strict=True)):
        got = y[..., channel, :, :] * std + mean
        torch.testing.assert_close(got, columns.expand_as(got), rtol=0, atol=1.5 / 255)
    with pytest.raises(TypeError, match="img: expected a PIL image or a Tensor, got list"):
        preprocess([])


def test_pretrained_as_before_weights(trained, cache, monkeypatch):
    """Also as a positional argument; a warning says what it means now."""
    loaded = []
    monkeypatch.setattr("alexnet_fast.models.alexnet.read", lambda weights, progress: loaded.append(weights) or 1 / 0)
    for call in (lambda: alexnet(pretrained=True), lambda: alexnet(True)):
        with pytest.warns(UserWarning, match="pretrained: deprecated"), pytest.raises(ZeroDivisionError):
            call()
    assert loaded == [AlexNet_Weights.DEFAULT] * 2
    for given in ({"pretrained": False}, {"weights": False}):
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="read as weights=None"):
            assert same(alexnet(num_classes=4, **given), trained)


def test_the_module_is_a_module():
    """The module has the function's name, as in torchvision, and can be called as the function."""
    import alexnet_fast.models.alexnet as page
    from alexnet_fast import models

    assert isinstance(page, ModuleType)
    assert page.AlexNet is AlexNet
    assert models.alexnet is page
    assert type(models.alexnet(num_classes=1)) is AlexNet


# ---- torchvision's registry ----------------------------------------------------------------------------------------

TORCHVISION = """
import enum, sys, types
class WeightsEnum(enum.Enum): pass
class AlexNet_Weights(WeightsEnum):
    DEFAULT = 1
BUILDERS = {}
_api = types.SimpleNamespace(register_model=lambda name: lambda build: BUILDERS.setdefault(name, build))
def list_models(): return sorted(BUILDERS)
"""
REGISTERED = """
import inspect
from torchvision import models
assert {"alexnet_fast", "alexnet_fast_paper"} <= set(models.list_models())
for name in ("alexnet_fast", "alexnet_fast_paper"):
    weights = inspect.signature(models.BUILDERS[name]).parameters["weights"].annotation
    assert weights.__args__[0] is models.AlexNet_Weights
net = models.BUILDERS["alexnet_fast_paper"](num_classes=2)
assert type(net).__module__ == "alexnet_fast.models.alexnet" and net.variant.name == "paper"
"""


@pytest.mark.parametrize("imports", ["alexnet_fast, torchvision.models", "torchvision.models, alexnet_fast"])
def test_registered_with_torchvision(tmp_path, imports):
    """With a stand-in for torchvision that has the parts that count, whichever of the two is imported first."""
    (tmp_path / "torchvision" / "models").mkdir(parents=True)
    (tmp_path / "torchvision" / "__init__.py").touch()
    (tmp_path / "torchvision" / "models" / "__init__.py").write_text(TORCHVISION)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", f"import {imports}\n{REGISTERED}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What scripts write beside weights; none of it does anything when it is loaded.
BESIDE = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "best": np.float64(0.5), "optimizer": {"state": {}}}
# How they call the file, what they put around the state_dict and into its keys, and what is said to be taken off.
KEYS = {
    "as it is": lambda key: key,
    "data parallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled, parallel": lambda key: f"module._orig_mod.{key}",
    "parallel features": lambda key: key.replace("features.", "features.module."),
    "lightning": lambda key: f"model.{key}",
    "sharded": lambda key: f"_fsdp_wrapped_module.{key}",
}


@pytest.mark.parametrize("name", ["net.pth.tar", "net.bin", "net.ckpt", "net"])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model", "model_state_dict", "net"])
def test_wrappers(tmp_path, name, wrapper):
    torch.save({wrapper: TINY, **BESIDE} if wrapper else TINY, tmp_path / name)
    said = pytest.warns(UserWarning, match=f"taken off: the wrapper '{wrapper}'$")
    with said if wrapper else contextlib.nullcontext():
        assert torch.equal(read(tmp_path / name).state["weight"], TINY["weight"])


@pytest.mark.parametrize("form", KEYS)
def test_prefixes(trained, tmp_path, form):
    keys = list(trained.state_dict())
    state = {KEYS[form](key): torch.tensor(i) for i, key in enumerate(keys)}
    torch.save({"epoch": 1, "state_dict": {"model": state}}, tmp_path / "net.ckpt")
    with pytest.warns(UserWarning, match="taken off: the wrapper 'state_dict', the wrapper 'model'"):
        found = read(tmp_path / "net.ckpt").state
    assert list(found.items()) == list(zip(keys, range(len(keys)), strict=True))


def test_safetensors_under_any_name(tmp_path):
    save_file(TINY, tmp_path / "weights")
    assert torch.equal(read(tmp_path / "weights").state["weight"], TINY["weight"])


def test_home_and_hugging_faces_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(TINY, tmp_path / "pytorch_model.bin")
    for weights in ("~/pytorch_model.bin", "~", Path("~")):
        assert torch.equal(read(weights).state["weight"], TINY["weight"])


# ------------------------------------------------------------------------------------------------ transfer learning


def test_replaces_the_head_on_request(trained, folder):
    torch.manual_seed(0)
    model = alexnet(weights=folder, num_classes=7, replace_head=True)
    assert model.classifier[6].weight.shape == (7, 4096)
    features_and_rest = {key: t for key, t in trained.state_dict().items() if not key.startswith("classifier.6.")}
    assert all(torch.equal(model.state_dict()[key], t) for key, t in features_and_rest.items())


def test_a_replaced_head_is_new_even_of_the_same_size(trained, folder):
    model = alexnet(weights=folder, replace_head=True)
    assert same(model, trained, without="classifier.6.")
    assert not same(model, trained)


def test_other_classes_are_an_error_otherwise(folder):
    with pytest.raises(ValueError, match=r"num_classes: .* has 4 outputs, got 7; replace_head=True"):
        alexnet(weights=folder, num_classes=7)


def test_freeze_features(folder):
    model = alexnet(weights=folder, freeze_features=True)
    assert not any(p.requires_grad for p in model.features.parameters())
    assert all(p.requires_grad for p in model.classifier.parameters())


def test_without_weights(trained):
    torch.manual_seed(5)
    assert same(alexnet(num_classes=4, dropout=0.1), trained)
    assert alexnet(dropout=0.1).classifier[0].p == 0.1
    with pytest.raises(ValueError, match="replace_head: without weights"):
        alexnet(replace_head=True)
    with pytest.raises(ValueError, match="num_classes: expected a positive int, got 0"):
        alexnet(num_classes=0)


def test_variant_that_the_file_names(folder):
    path = folder / "paper.safetensors"
    assert alexnet(weights=path).variant.name == "paper"
    with pytest.raises(ValueError, match=r"variant: .* is for 'paper', got 'caffe'"):
        alexnet(weights=path, variant="caffe")


# ------------------------------------------------------------------------------------------------------ bad weights


class Mischief:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_no_code_from_a_pickle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, save in (
        ("a.pth", torch.save),
        ("b.pt", lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))),
    ):
        save({"features.0.weight": Mischief()}, tmp_path / name)
        with pytest.raises(ValueError, match=f"weights: .*{name} is not a file of tensors alone") as caught:
            alexnet(weights=tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's advice
        assert "it refers to" in str(caught.value)
    assert not Path("touched").exists()


def test_damaged_files(folder, tmp_path):
    for name in ("net.pth", "net.safetensors"):
        data = (folder / name).read_bytes()
        for damaged in (data[: len(data) // 2], b"", b"hello"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"weights: .*{name} is not a"):
                alexnet(weights=tmp_path / name)


@pytest.mark.parametrize("head", [torch.ones(()), torch.ones(4), None])
def test_a_last_layer_of_another_shape_is_a_misfit(trained, tmp_path, head):
    state = {**trained.state_dict(), "classifier.6.weight": head}
    torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"does not fit the net: .*classifier\.6\.weight (has shape|is missing)"):
        alexnet(weights=tmp_path / "net.pth", num_classes=1000)
    assert alexnet(weights=tmp_path / "net.pth", num_classes=7, replace_head=True).classifier[6].out_features == 7


def test_numbers_that_are_not_finite_are_refused(trained, tmp_path):
    save_file({**trained.state_dict(), "features.3.bias": torch.full((192,), torch.nan)}, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"has numbers that are not finite in features\.3\.bias"):
        alexnet(weights=tmp_path / "net.safetensors")


def test_misfits_are_all_named(trained, tmp_path):
    state = trained.state_dict()
    del state["features.3.bias"]
    state["extra"] = torch.zeros(1)
    state["features.0.weight"] = torch.zeros(96, 3, 11, 11)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message follows
        alexnet(weights=tmp_path / "net.safetensors")
    assert str(error.value) == (
        f"weights: {tmp_path}/net.safetensors does not fit the net: "
        "features.3.bias is missing; extra is not in the net; "
        "features.0.weight has shape (96, 3, 11, 11), the net's is (64, 3, 11, 11)"
    )


def test_a_long_list_of_misfits_is_cut(folder):
    with pytest.raises(ValueError, match=r"does not fit the net: ([^;]+; ){5}[^;]+ and 16 more$"):
        alexnet(weights=folder / "net.pth", variant="caffe")


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("IMAGENET1K_V2", FileNotFoundError, "weights: no file IMAGENET1K_V2; expected .* IMAGENET1K_V1, DEFAULT"),
        ("ftp://host/net.pth", ValueError, "weights: expected an http, https or file URL"),
        (3, TypeError, "weights: expected an AlexNet_Weights, its name, a path or a URL, got int 3"),
    ],
)
def test_bad_sources(weights, error, message):
    with pytest.raises(error, match=message):
        alexnet(weights=weights)


def test_bad_files(tmp_path, trained):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        alexnet(weights=tmp_path)
    (tmp_path / "net.h5").touch()
    with pytest.raises(ValueError, match=r"weights: .*net\.h5 is not a file of tensors alone"):
        alexnet(weights=tmp_path / "net.h5")
    for held, described in (({"epoch": 3, "optimizer": {}}, "a dict of epoch, optimizer"), ([3], "list")):
        torch.save(held, tmp_path / "run.pth")
        with pytest.raises(ValueError, match=rf"weights: expected a state_dict in .*run\.pth, got {described}$"):
            alexnet(weights=tmp_path / "run.pth")
    held = {"epoch": 3}
    held["model"] = held
    torch.save(held, tmp_path / "run.pth")
    with pytest.raises(ValueError, match=r"got a dict of epoch, model$"):
        alexnet(weights=tmp_path / "run.pth")
    torch.save({"a.weight": torch.zeros(1), "module.a.weight": torch.zeros(1)}, tmp_path / "run.pth")
    with pytest.raises(ValueError, match="holds the same keys more than once"):
        alexnet(weights=tmp_path / "run.pth")


def test_published_weights_are_torchvisions(cache):
    cache.mkdir()
    torch.save({}, cache / "alexnet-owt-7be5be79.pth")
    with pytest.raises(ValueError, match="variant: IMAGENET1K_V1 is for 'torchvision', got 'owt'"):
        alexnet(weights="DEFAULT", variant="owt")
