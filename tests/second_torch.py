"""Another version of torch than the one installed, and the packages that this one is compared with."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import alexnet_fast
from alexnet_fast import _C

ROOT = Path(__file__).parents[1]
TORCH = "2.14.1"
PEERS = "torchvision==0.29.1", "torchao==0.18.0", "lpips==0.1.4", "grad-cam==1.5.7", "captum==0.9.0"
NEEDS = "pillow", "rich", "safetensors", "typer"  # what the package depends on
GIGABYTES = 10  # of the environment, and of the archives while it is made


@pytest.fixture(scope="session")
def second_torch(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """second_torch(module): ``python -m module`` with this package and these tests, under torch 2.14.1.

    Its environment is made once in a run of the tests, whatever the number of processes, and goes with their other
    folders; ALEXNET_FAST_TEST_CACHE names a folder in which it stays for the next run.
    """
    run = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a process of pytest-xdist: beside the folders of all of them
        run = run.parent
    folder = Path(os.environ.get("ALEXNET_FAST_TEST_CACHE") or run) / f"torch-{TORCH}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "made"
        if not made.exists() or made.read_text() != str((PEERS, NEEDS)):
            if (free := shutil.disk_usage(folder).free / 1e9) < GIGABYTES:
                pytest.skip(f"a second torch takes {GIGABYTES} GB for a while, and {folder} has {free:.1f}")
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "pip", "install", "--quiet", "--no-cache-dir", "--no-compile"]
            subprocess.run([*pip, f"torch=={TORCH}", *PEERS, *NEEDS], check=True)
            made.write_text(str((PEERS, NEEDS)))

    copies = tmp_path_factory.mktemp("copies")
    shutil.copytree(Path(alexnet_fast.__file__).parent, copies / "alexnet_fast")
    if not (copies / "alexnet_fast" / Path(_C.__file__).name).exists():  # of a clone that takes the installed one
        shutil.copy(_C.__file__, copies / "alexnet_fast")
    (copies / "tests").symlink_to(ROOT / "tests")

    def run_module(module: str) -> subprocess.CompletedProcess[str]:
        command = [folder / "bin" / "python", "-m", module]
        return subprocess.run(command, cwd=copies, capture_output=True, text=True, check=False)

    return run_module
