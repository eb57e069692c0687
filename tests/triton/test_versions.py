"""The kernels under other versions of triton than the one installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The newest and an older one. NumPy 2.4 refuses what the interpreter of 3.6 does: to take arrays of one element for
# scalars.
VERSIONS = {"3.9.0": [], "3.6.0": ["numpy==2.3.5"]}

TRAINING = "tests/triton/test_training.py::test_training_step[alex2012]"


@pytest.mark.parametrize(
    ("version", "which"),
    [
        pytest.param("3.9.0", "training_step", marks=pytest.mark.slow),
        pytest.param("3.9.0", "", marks=pytest.mark.soak),
        pytest.param("3.6.0", "", marks=pytest.mark.soak),
    ],
)
def test_another_triton(version, which, tmp_path):
    """A training step of the net of 2012, which has every stage, and with --soak the compile gates, in a process that
    finds that version first.
    ALEXNET_FAST_TEST_CACHE names a folder in which it (up to 1 GB) stays for the next time."""
    packages = Path(os.environ.get("ALEXNET_FAST_TEST_CACHE") or tmp_path) / f"triton-{version}"
    if not packages.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
        subprocess.run([*pip, f"triton=={version}", *VERSIONS[version]], check=True)
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
        [sys.executable, "-m", "pytest", "-q", "tests/triton/test_machine_code.py", TRAINING, "-k", which],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:]
