"""Each test of tuning has a cache folder of its own, and begins with nothing chosen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alexnet_fast import tuning


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test's cache folder."""
    monkeypatch.setenv("ALEXNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_told", set())
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is of compute capability 9.0."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
