"""The examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys, monkeypatch):
    if "sklearn" in path.read_text():
        pytest.importorskip("sklearn", reason="the extra demo is not installed")
    monkeypatch.setattr("sys.argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    for accuracy in re.findall(r"([\d.]+)%", printed):
        assert float(accuracy) > 80
