"""The page of a run: whole HTML that asks for nothing, with what the run did, and strangers' names as text."""

from __future__ import annotations

import base64
import io
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from alexnet_fast.data import Transform
from alexnet_fast.errors import InputError
from alexnet_fast.train import checkpoint, commands, write_page
from alexnet_fast.train.commands import open_run_data
from alexnet_fast.train.evaluate import normalized
from alexnet_fast.train.outputs import check_out
from tests.data.pictures import picture, write_folder
from tests.train.runs import GIVEN, small_net

CLASSES = "<img src=x onerror=alert(1)>", "a&b\n\"'", "ça"
VOID = {"meta", "img", "br"}
CLOSED = {"html", "head", "title", "style", "body", "h1", "h2", "table", "thead", "tbody", "tr", "th", "td"}
CLOSED |= {"div", "figure", "figcaption", "span", "details", "summary"}
DRAWN = {"labels and answers", "filters of conv1", "loss, accuracy and learning rate over steps"}


class Page(HTMLParser):
    """Texts, pictures by their alternative text, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.pictures: dict[str, Image.Image] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert tag in VOID | CLOSED
        assert not [name for name in given if name.startswith("on") or name in ("href", "srcset")]
        if tag == "img":
            head, _, content = given["src"].partition(";base64,")
            assert head in ("data:image/png", "data:image/jpeg")
            self.pictures[given["alt"]] = Image.open(io.BytesIO(base64.b64decode(content)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.seen.append(data.strip())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    write_folder(root / "set", 4, 3, CLASSES)
    (root / "set" / "val" / "ça" / "broken.jpg").write_text("no picture")
    given = {**GIVEN, "data": str(root / "set"), "out": str(root / "run"), "image_size": 64, "max_bad": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_fast.train.pictures.draw_curves", lambda rows, path: None)
        assert commands.train({**given, "epochs": 1}, None, small_net) == 0
    return root / "run"


def test_the_page_tells_what_the_run_did(run: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    out = write_page(run, tmp_path / "page.html", 4, small_net)
    page = Page(out.read_text(encoding="utf-8"))
    found = checkpoint.load(checkpoint.find(run, "best"))
    net = small_net(found.config)
    net.load_state_dict(found.model)
    transform, split = Transform("crop", 64), open_run_data(found.config).val
    whole = [n for n, path in enumerate(split.paths) if path.name != "broken.jpg"]
    images = torch.stack([torch.from_numpy(transform(split.read(n)[0]).copy()).permute(2, 0, 1) for n in whole])
    labels = torch.tensor([split.labels[n] for n in whole])
    with torch.no_grad():
        logits = net.eval()(normalized(images, found.config, torch.device("cpu")))
    hits = (logits.argmax(1) == labels).sum().item()
    assert f"{hits / 9:.2%} ({hits} of 9)" in page.seen
    assert "1 held-out files that could not be used" in page.seen
    losses = F.cross_entropy(logits, labels, reduction="none")
    for place in losses.topk(4).indices.tolist():
        name = split.paths[whole[place]].name
        assert f"{name}, loss {losses[place]:.2f}" in page.seen
    worst = split.paths[whole[losses.argmax()]].name
    assert page.pictures[worst].size == (64, 64)
    assert {"labels and answers", "filters of conv1", "loss, accuracy and learning rate over steps"} < set(
        page.pictures
    )
    for name in (CLASSES[0], "a&b\\n\"'", "ça"):
        assert any(seen.startswith(name) for seen in page.seen)


def test_it_stands_in_the_runs_folder_and_pictures_may_be_left_out(run: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    monkeypatch.setattr("alexnet_fast.train.page.draw_curves", lambda rows, file: picture(9, 9).save(file, "PNG"))
    monkeypatch.setattr("alexnet_fast.train.page.draw_confusion", lambda c, n, file: picture(9, 9).save(file, "PNG"))
    assert write_page(run, None, 0, small_net) == run / "report.html"
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert set(page.pictures) == DRAWN
    assert np.asarray(page.pictures["filters of conv1"]).std() > 0


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    with pytest.raises(InputError, match="no curves there"):
        write_page(tmp_path, None, 4)
    with pytest.raises(InputError, match="--out: expected a file, got the folder"):
        write_page(run, tmp_path, 4)
    with pytest.raises(InputError, match="damaged checkpoint"):
        write_page(run, tmp_path / "page.html", 4)  # the tensors are not AlexNet's
    assert not list(tmp_path.iterdir())


def test_no_file_takes_the_place_of_a_device_or_a_pipe(tmp_path: Path):
    """As root, --out /dev/null would else replace the device."""
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    pipe = tmp_path / "pipe.html"
    os.mkfifo(pipe)
    for refused in (lambda: write_page(tmp_path, pipe, 0), lambda: check_out(pipe, ".html", True)):
        with pytest.raises(InputError, match=f"--out: expected a file, got the device or pipe {pipe}"):
            refused()
    assert pipe.is_fifo()


def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_out(tmp_path / "x.npz", ".npz", False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write wherever modes forbid it
    with pytest.raises(InputError, match=f"--out: cannot write {tmp_path}: {tmp_path} is read-only, or closed"):
        check_out(tmp_path / "x.npz", ".npz", False)
