"""Python in README and the docs runs as it stands, block by block, and README's links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = "training.md", "models.md", "graphs.md", "uses.md"
BLOCKS, *OTHERS = (
    re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for text in (README, *((ROOT / "docs" / name).read_text() for name in PAGES))
)


@pytest.mark.parametrize(
    "code", BLOCKS + [code for page in OTHERS for code in page], ids=lambda code: code.splitlines()[-1][:40]
)
def test_code_runs(code, tmp_path, monkeypatch):
    if "sklearn" in code:
        pytest.importorskip("sklearn", reason="the extra demo brings it")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    for path in tmp_path.iterdir():  # weights, a quarter of a gigabyte each
        path.unlink()


def test_the_three_ways_of_use_are_shown():
    assert len(BLOCKS) == 3
    for name in ("LPIPS(", "features(", "optimizer.step()"):
        assert any(name in code for code in BLOCKS)


def test_commands_exist():
    """Each `alexnet-fast` command and `make` target that README shows."""
    from alexnet_fast.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"^\$ alexnet-fast (\w+)", README, re.MULTILINE)) <= commands
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^\$ make (\w+)", README, re.MULTILINE)) <= targets


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()
