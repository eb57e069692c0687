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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(built)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # a broken link or anchor is a warning
    return built


def test_the_reference_has_all_that_is_public(site: Path):
    anchors = set()
    for page in site.rglob("api/*/index.html"):
        anchors |= set(re.findall(r'id="([\w.]+)"', page.read_text()))
    public = [getattr(package, name) for package in (alexnet_fast, ops) for name in package.__all__]
    names = [f"{value.__module__}.{value.__name__}" for value in public if callable(value)]
    assert [name for name in names if name not in anchors] == []


def test_pages_are_whole(site: Path):
    """Nothing of Sphinx's roles is left over, and nothing is asked of other servers."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        assert not re.search(r":(class|func|mod|meth):", text), page
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="https?:', text), page
