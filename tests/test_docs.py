"""The documents as a site: mkdocs builds it without a warning, and everything that is public has its place in it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_fast
from alexnet_fast import ops

ROOT = Path(__file__).parents[1]


def test_the_site(tmp_path: Path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a broken link or anchor is a warning
    pages = {page: page.read_text() for page in sorted(tmp_path.rglob("*.html"))}
    assert len(pages) > 15
    anchors = set()
    for page, text in pages.items():
        assert not re.search(r":(class|func|mod|meth):", text), page  # Sphinx's roles
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text), page  # nothing of other servers
        if page.parent.parent.name == "api":
            anchors |= set(re.findall(r'id="([\w.]+)"', text))
    public = [getattr(package, name) for package in (alexnet_fast, ops) for name in package.__all__]
    names = [f"{value.__module__}.{value.__name__}" for value in public if callable(value)]
    assert [name for name in names if name not in anchors] == []


def test_the_drawings(tmp_path: Path):
    """They are what their script draws."""
    script = ROOT / "docs/kernels/draw.py"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in script.parent.glob("*.svg")}
    page = (ROOT / "docs/kernels.md").read_text()
    assert [name for name in drawn if f"(kernels/{name})" not in page] == []
