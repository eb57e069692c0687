"""Several runs in one picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from alexnet_fast import cli
from alexnet_fast.errors import InputError
from alexnet_fast.terminal import shown
from alexnet_fast.train import compare
from alexnet_fast.train.pictures import draw_confusion, draw_runs
from tests.train.runs import train


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    for name, lr in (("one", 0.01), ("other", 0.001)):
        assert train(root / name, epochs=1, lr=lr) == 0
    return [root / "one", root / "other"]


def colours(path: Path) -> set[tuple[int, ...]]:
    return {colour for _, colour in Image.open(path).convert("RGB").getcolors(1 << 20)}


def test_each_run_has_its_line(folders: list[Path], tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    blue, orange = (31, 119, 180), (255, 127, 14)  # matplotlib's first two
    compare(folders, ["one", "other"], tmp_path / "both.png")
    assert {blue, orange} <= colours(tmp_path / "both.png")
    compare(folders[:1], ["one"], tmp_path / "one.png")
    assert orange not in colours(tmp_path / "one.png")


def test_the_command_names_them(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = {}
    monkeypatch.setattr("alexnet_fast.train.report.draw_runs", lambda runs, path: drawn.update({path: list(runs)}))
    words = ["alexnet-fast", "curves", *map(str, folders), "--out", str(tmp_path / "x.png")]
    for more, names in (([], ["one", "other"]), (["--names", "fused,plain"], ["fused", "plain"])):
        monkeypatch.setattr("sys.argv", words + more)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert drawn == {tmp_path / "x.png": names}


@pytest.mark.parametrize("name", ["\udce9", "_old", "$x$", r"$\frac{$", "\x1b[31mred", "猫"], ids=ascii)
def test_names_are_drawn_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """No letter of a name breaks the picture off, is taken for a formula, hides the run or is warned of."""
    pytest.importorskip("matplotlib", reason="the extra demo is not installed")
    from matplotlib.axes import Axes

    legends = []
    legend = Axes.legend
    monkeypatch.setattr(Axes, "legend", lambda self, *args, **kw: legends.append(legend(self, *args, **kw)))
    rows = [{"step": step, "loss": 1.0, "val_loss": 1.0, "val_top1": 0.5} for step in (1, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_runs({name: rows, "other": rows}, tmp_path / "x.png")
        draw_confusion(torch.eye(2), [name, "other"], tmp_path / "y.png")
    assert len(legends) == 3
    for drawn in legends:
        text, other = (text.get_text() for text in drawn.get_texts())
        assert (text.replace("\\$", "$"), other) == (shown(name), "other")
        assert "$" not in text.replace("\\$", "")


def test_what_has_no_curves_is_refused(folders: list[Path], tmp_path: Path):
    with pytest.raises(InputError, match="no curves there"):
        compare([*folders, tmp_path], ["a", "b", "c"], tmp_path / "x.png")
    with pytest.raises(InputError, match="--names: expected a name of its own"):
        compare(folders, ["a", "a"], tmp_path / "x.png")
