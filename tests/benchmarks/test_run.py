"""`pytest benchmarks` gives a first look, prints a line as each case ends, and keeps what it has when interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def collected(*arguments: str) -> list[str]:
    done = run(*arguments, "--collect-only", "-q")
    assert done.returncode == 0, done.stdout
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_a_plain_run_takes_some_cases_of_every_kind_and_all_takes_the_rest():
    first, every = collected("benchmarks"), collected("benchmarks", "--all")
    assert len(first) < len(every) / 10
    assert set(first) < set(every)
    files = {case.split("::")[0] for case in every}
    # Of the host's own microseconds, of reading files, of other people's nets, and of what runs on GPUs alone, a first
    # look has none.
    left_out = {f"benchmarks/bench_{name}.py" for name in ("host", "overhead", "data", "fuse", "linear_relu_dropout")}
    assert {case.split("::")[0] for case in first} == files - left_out
    assert {device for device in ("cpu", "cuda") for case in first if device in case} == {"cpu", "cuda"}


@pytest.mark.parametrize("arguments", [["benchmarks/bench_lrn.py"], ["benchmarks", "-k", "lrn and test_lrn"]])
def test_who_names_cases_gets_all_of_them(arguments):
    every = collected("benchmarks", "--all")
    assert collected(*arguments) == [case for case in every if "bench_lrn.py" in case]


# Ctrl-C comes when the first case is over, or when all are and the ceilings are measured again.
INTERRUPTED = """
import os, signal
from benchmarks import machine
measured = []

def ceilings():
    measured.append(True)
    if len(measured) > 1:
        raise KeyboardInterrupt
    return {"copy_gb_s": 1.0, "float32_tflop_s": 1.0, "bfloat16_tflop_s": 1.0}

def pytest_runtest_logfinish(nodeid):
    if os.environ["WHEN"] == "first case":
        raise KeyboardInterrupt

machine.ceilings = ceilings
"""


@pytest.mark.parametrize("when", ["first case", "ceilings"])
def test_an_interrupted_run_shows_what_it_has(tmp_path, when):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    cases = ("benchmarks/bench_overhead.py", "-k", "(lrn or max_pool) and not backward", "--benchmark-only")
    done = run("-p", "interrupted", *cases, "--results", tmp_path, PYTHONPATH=path, WHEN=when, COLUMNS="80")
    assert done.returncode == (2 if when == "first case" else 0), done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("overhead lrn float32 contiguous forward: ")]
    table = lines.index("=" * 30 + " against every peer " + "=" * 30)
    assert lines.index(line) < table
    assert "overhead lrn float32 contiguous forward" in " ".join(lines[table:])
    (written,) = tmp_path.glob("*/results.json")
    results = json.loads(written.read_text())
    assert results["ceilings"]["copy_gb_s"] == 1.0
    assert len(results["rows"]) == (1 if when == "first case" else 2)
