"""The real torchvision and its AlexNet, and int8 quantization, in an environment of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_fast
from alexnet_fast import _C
from tests.test_build import SECOND_TORCH

ROOT = Path(__file__).parents[1]
PACKAGES = (f"torch=={SECOND_TORCH}", "torchvision==0.29.1", "torchao==0.18.0", "safetensors", "typer", "rich")


@pytest.mark.slow
def test_with_torchvision_and_torchao(tmp_path):
    """tests/ecosystem.py says what. ALEXNET_FAST_TEST_CACHE names a folder in which the environment (about 5 GB) stays
    for the next time."""
    cache = Path(os.environ.get("ALEXNET_FAST_TEST_CACHE") or tmp_path)
    python = cache / f"torch-{SECOND_TORCH}" / "bin" / "python"  # test_build's, with more in it
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    shutil.copytree(Path(alexnet_fast.__file__).parent, tmp_path / "alexnet_fast", dirs_exist_ok=True)
    if not (tmp_path / "alexnet_fast" / Path(_C.__file__).name).exists():  # of a clone that takes the installed one
        shutil.copy(_C.__file__, tmp_path / "alexnet_fast")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "ecosystem.py", tmp_path / "tests")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [python, "-m", "tests.ecosystem"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torch {SECOND_TORCH}")
