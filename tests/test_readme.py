"""Python in README and in docs runs as it stands, block by block, and README's links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS, LOOPS, USES = (
    re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for text in (README, *((ROOT / "docs" / name).read_text() for name in ("training.md", "uses.md")))
)


@pytest.mark.parametrize("code", BLOCKS + LOOPS + USES, ids=lambda code: code.splitlines()[-1][:40])
def test_code_runs(code):
    exec(compile(code, "README.md", "exec"), {})


def test_the_three_ways_of_use_are_shown():
    assert len(BLOCKS) == 3
    for name in ("AlexNet(", "fuse(", "ops.conv_stage("):
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
