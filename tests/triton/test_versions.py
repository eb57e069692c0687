"""The kernels under other versions of triton than the one installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])  # an older one, and the newest
def test_another_triton(version, tmp_path):
    """This folder's tests and the compile gates, in a process that finds that version first. ALEXNET_FAST_TEST_CACHE
    names a folder in which it (up to 1 GB) stays for the next time."""
    packages = Path(os.environ.get("ALEXNET_FAST_TEST_CACHE") or tmp_path) / f"triton-{version}"
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    environment = {**os.environ, "PYTHONPATH": str(packages), "TRITON_CACHE_DIR": str(tmp_path / "compiled")}
    found = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == f"{version}\n"
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/triton"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
