"""Configurations are timed once for a problem, and by one process: the winners are on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

# A driver that times nothing and launches nothing: the wider a configuration's tile, the less time it is said to take.
SCRIPT = """
import json, sys
import torch, triton
from triton.runtime.jit import JITFunction
from alexnet_fast.geometry import Geometry
from alexnet_fast.triton_kernels import conv_relu
from tests.triton.machine_code import Elsewhere

timed, launched = [], []
class Driver(Elsewhere):
    def get_benchmarker(self):
        def time(call, quantiles):
            call()
            timed.append(launched.pop()["BLOCK_N"])
            return [1 / timed[-1]] * 3
        return time

triton.runtime.driver.set_active(Driver(90))
JITFunction.run = lambda self, *args, grid, warmup, **constants: launched.append(constants)
for pixels in map(int, sys.argv[1:]):
    x = torch.empty(1, 16, pixels, 1, device="meta", memory_format=torch.channels_last)
    conv_relu.forward(x, torch.empty(16, 16, 1, 1, device="meta"), None, Geometry([1, 1], [0, 0], [1, 1], 1))
print(json.dumps([timed, [(c["BLOCK_M"], c["BLOCK_N"]) for c in launched]]))
"""


def run(cache: Path, *pixels: int, **environment: str) -> tuple[list[int], list[list[int]]]:
    """The widths that were timed, and the tiles that were launched."""
    env = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "ALEXNET_FAST_TUNE": "1",
        **environment,
    }
    command = [sys.executable, "-c", SCRIPT, *map(str, pixels)]
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def test_a_problem_is_timed_once_and_by_one_process(tmp_path):
    timed, launched = run(tmp_path, 8, 9, 8)
    assert sorted(timed) == [64] * 6 + [128] * 4
    assert launched == [[128, 128]] * 3
    assert run(tmp_path, 9, 8) == [[], [[128, 128]] * 2]


def test_untuned_the_first_configuration_runs(tmp_path):
    assert run(tmp_path, 8, ALEXNET_FAST_TUNE="0") == [[], [[128, 64]]]
    assert not list(tmp_path.iterdir())
