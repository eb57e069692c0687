"""``make gpu-report`` as far as it goes without a GPU: its processes, what it reads out of reports, what it writes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, machine, profile
from benchmarks.gpu_report import (
    SANITIZERS,
    Result,
    junit_result,
    main,
    run,
    run_pytest,
    run_tests,
    sanitize,
    sanitized,
)

CLEAN = {
    "memcheck": "========= COMPUTE-SANITIZER\n12 tensors checked\n========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= COMPUTE-SANITIZER\n12 tensors checked\n"
    "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}
INVALID_WRITE = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at void alexnet_fast::cuda::relu_nhwc<float, (int)4>(…)+0x1a0
12 tensors checked
========= ERROR SUMMARY: 1 error
"""
REFUSED = """\
========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the documentation
========= Error: Target application terminated before first instrumented API call
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Path:
    """A machine with a card, and the folder its results go to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    facts = {"card": "NVIDIA Example 100", "driver": "580.1", "torch": "2.13.0", "commit": "abc"}
    monkeypatch.setattr(gpu_report, "facts", lambda: facts)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    return tmp_path / "benchmarks" / "results" / "nvidia-example-100"


# ---- Report ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main([]) == 2
    assert capsys.readouterr() == ("", f"gpu-report: torch {torch.__version__} sees no CUDA device\n")


def test_results_are_written(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_report, "STEPS", {"build": lambda _: Result("passed", "CUDA 13.0", {"cuda": "13.0"})})
    assert main(["build"]) == 0
    (path,) = gpu.iterdir()
    assert re.fullmatch(r"build-\d{8}T\d{6}Z\.json", path.name)
    content = json.loads(path.read_text())
    assert content["machine"]["card"] == "NVIDIA Example 100"
    assert (content["step"], content["status"], content["summary"]) == ("build", "passed", "CUDA 13.0")
    assert content["details"] == {"cuda": "13.0"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", content["date"])
    *_, card, last = capsys.readouterr().out.splitlines()
    assert card == "NVIDIA Example 100, driver 580.1, torch 2.13.0, commit abc"
    assert "CUDA 13.0" in last


def test_benchmarks_end_with_a_short_table(gpu, monkeypatch, capsys):
    row = {"bench": "lrn", "case": "after conv1", "dtype": "float32", "layout": "contiguous", "pass": "forward"}
    row |= {"backend": "cuda", "bytes": 2e9, "flops": 0, "ms": {"ours": [1, 1, 1]}, "ratio": {"eager": [7, 8, 9]}}
    results = {"ceilings": {"copy_gb_s": 4000, "float32_tflop_s": 50}, "rows": [row]}

    def measure(_: Path) -> Result:
        gpu.mkdir(parents=True)
        (gpu / "results.json").write_text(json.dumps(results))
        return Result("passed", "1 passed, 0 failed, 0 skipped")

    monkeypatch.setattr(gpu_report, "STEPS", {"bench-pointwise": measure})
    assert main([]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert " ".join(line.split()) == (
        "lrn after conv1, cuda float32 contiguous forward 1.0000 ms 8.00x eager floor 50%"
    )


# Writes the cases of each selection, and collects them all in one process: to import torch takes longer.
COLLECT = """
import json, sys, pytest

class Cases:
    def pytest_collection_finish(self, session):
        found.append([item.nodeid for item in session.items])

found, (path, selections) = [], sys.argv[1:]
for selection in json.loads(selections):
    assert pytest.main(["--collect-only", "-q", "--benchmark-only", *selection], [Cases()]) == 0
open(path, "w").write(json.dumps(found))
"""


def test_each_gpu_case_is_of_one_benchmark_step(tmp_path, monkeypatch):
    """Collected without a GPU they are skipped, not absent. Those of the CPU alone are in no step."""
    selections: list[list[str]] = []
    monkeypatch.setattr(
        gpu_report, "run_pytest", lambda *given: selections.append([*given[: given.index("--benchmark-only")]])
    )
    steps = [step for step in gpu_report.STEPS if step.startswith("bench-")]
    for step in steps:
        gpu_report.STEPS[step](Path())
    selections.append(["benchmarks", "-k", "cuda or triton"])
    path = tmp_path / "cases.json"
    status, log = run([sys.executable, "-c", COLLECT, str(path), json.dumps(selections)], 120)
    assert status == 0, log
    *found, every = json.loads(path.read_text())
    assert [step for step, cases in zip(steps, found, strict=True) if not cases] == []
    assert sorted(case for cases in found for case in cases) == sorted(every)


@pytest.mark.parametrize(
    ("statuses", "steps", "written", "code"),
    [
        ({"build": "passed", "tests": "passed"}, [], ["build", "tests"], 0),
        ({"build": "failed", "tests": "passed"}, [], ["build"], 1),
        ({"build": "passed", "tests": "failed", "sanitize": "passed"}, [], ["build", "sanitize", "tests"], 1),
        ({"build": "failed", "tests": "passed"}, ["tests"], ["tests"], 0),
        ({"sanitize": "not run"}, ["sanitize"], ["sanitize"], 1),
    ],
)
def test_steps(statuses, steps, written, code, gpu, monkeypatch):
    """Nothing is tested after a failed build; any other step goes on, and the exit code tells."""
    monkeypatch.setattr(
        gpu_report, "STEPS", {step: lambda _, s=status: Result(s, "") for step, status in statuses.items()}
    )
    assert main(steps) == code
    assert sorted(path.name.partition("-")[0] for path in gpu.iterdir()) == written


def test_an_unknown_step_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["test"])
    assert "no step is called 'test'; there are build, quick, tests, triton, sanitize" in capsys.readouterr().err


def test_commit(monkeypatch, tmp_path):
    """Of the checkout, or as a copy without one is told."""
    if (machine.ROOT / ".git").exists() and shutil.which("git"):
        assert re.fullmatch(r"[0-9a-f]{10}\+?", machine.commit())
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("ALEXNET_FAST_COMMIT", "abc")
    assert machine.commit() == "abc"


# ---- Processes -------------------------------------------------------------------------------------------------------

SLOW = "import time\ntry:\n  time.sleep(60)\nexcept KeyboardInterrupt:\n  print('interrupted', flush=True)\n  {then}"


def test_run():
    assert run([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"], 60) == (1, "out\nerr\n")


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"], ids=["ends", "does not end"])
def test_a_process_beyond_its_limit(then, monkeypatch):
    """It may write its report, and is killed if it does not come to an end."""
    monkeypatch.setattr(gpu_report, "PATIENCE", 1)
    assert run([sys.executable, "-c", SLOW.format(then=then)], 1) == (None, "interrupted\n")


# ---- Tests -----------------------------------------------------------------------------------------------------------

SUITE = """
import os, signal, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.skip(reason="no second device")
def test_skips(): pass
def test_is_interrupted(): os.kill(os.getpid(), signal.SIGINT)
def test_never_runs(): pass
"""


def test_pytest_is_read(tmp_path):
    """Interrupted, as at the limit: what came out until then counts."""
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    result = run_pytest(str(suite), "--rootdir", str(tmp_path))
    assert result.status == "failed"
    assert result.summary == "1 passed, 1 failed, 1 skipped"
    assert result.details["skipped"] == {"no second device": 1}
    (failure,) = result.details["failures"]
    assert failure["test"].endswith("test_suite::test_fails")
    assert "one is not two" in failure["message"]


BROKEN_OFF = """
import os, signal, time, pytest
def test_fails(): assert 1 == 2, "one is not two"
def test_is_killed():
    time.sleep(3)
    os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("parallel", [False, True], ids=["one process", "two"])
def test_failures_of_a_killed_run_are_named(parallel, tmp_path, monkeypatch):
    """pytest dies without a word, as at the end of a lease: what failed until then is on disk."""
    if parallel:
        pytest.importorskip("xdist")
    monkeypatch.setattr(gpu_report, "processes", lambda: ["-n", "2"] if parallel else [])
    suite = tmp_path / "test_suite.py"
    suite.write_text(BROKEN_OFF)
    result = run_tests(tmp_path / "failures.jsonl", str(suite), "--rootdir", str(tmp_path))
    assert result.status == "failed"
    assert result.summary.endswith("1 failed until then")
    (row,) = map(json.loads, (tmp_path / "failures.jsonl").read_text().splitlines())
    assert (row["test"], row["when"]) == ("test_suite.py::test_fails", "call")
    assert row["message"].startswith("AssertionError: one is not two")
    assert result.details["failures"] == [row]
    assert "test_suite.py:3: in test_fails" in (tmp_path / "failures.txt").read_text()


ORDER = """
import pytest
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", ["a", "b"])
def test_dtypes(dtype, size): pass
def test_last(): pass
"""


def test_one_case_of_every_kind_comes_first(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(ORDER)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "benchmarks.failures", str(suite)]
    _, log = run([*command, "--rootdir", str(tmp_path)], 60)
    names = [line.partition("::")[2] for line in log.splitlines() if "::" in line]
    assert names == [*(f"test_dtypes[{kind}-1]" for kind in "ab"), "test_last", "test_dtypes[a-2]", "test_dtypes[b-2]"]


@pytest.mark.parametrize(
    ("status", "inside", "expected"),
    [
        (0, '<testcase name="a"/>', ("passed", "1 passed, 0 failed, 0 skipped")),
        (None, '<testcase name="a"/>', ("failed", "1 passed, 0 failed, 0 skipped; broken off after 480 s")),
        (5, "", ("failed", "0 passed, 0 failed, 0 skipped")),
        (0, '<testcase name="a"><skipped message="no GPU"/></testcase>', ("failed", "0 passed, 0 failed, 1 skipped")),
        (2, '<testcase name="a"><error message="collection"/></testcase>', ("failed", "0 passed, 1 failed, 0 skipped")),
        (1, '<testcase name="a"><failure/><error/></testcase>', ("failed", "0 passed, 2 failed, 0 skipped")),
    ],
    ids=["passed", "broken off", "none selected", "all skipped", "not collected", "teardown fails too"],
)
def test_whether_a_run_has_passed(status, inside, expected):
    result = junit_result(status, f"<testsuites><testsuite>{inside}</testsuite></testsuites>", "log")
    assert (result.status, result.summary) == expected


# ---- Sanitizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", CLEAN)
def test_a_clean_report(tool):
    assert sanitized(0, CLEAN[tool])["status"] == "passed"


@pytest.mark.parametrize(
    ("status", "log", "summary"),
    [
        (9, INVALID_WRITE, "1 error"),
        (0, INVALID_WRITE, "1 error"),
        (0, CLEAN["racecheck"].replace("0 hazards displayed (0", "2 hazards displayed (2"), "2 hazards displayed (2"),
        (255, REFUSED, "Error: Device not supported"),
        (1, CLEAN["memcheck"], "exit status 1"),
        (None, "", "broken off after"),
        (0, CLEAN["memcheck"].replace("12 tensors checked", ""), "exit status 0"),
    ],
)
def test_a_report_with_errors(status, log, summary):
    """An error, a device that the tool refuses, a program that fails by itself or checks nothing."""
    result = sanitized(status, log)
    assert result["status"] == "failed"
    assert result["summary"].startswith(summary)


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """Puts a shell script into CUDA_HOME."""

    def install(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return install


@pytest.fixture
def sanitizer(tool, tmp_path):
    """Puts a compute-sanitizer into CUDA_HOME that answers with these texts, by tool."""

    def install(answers: dict[str, str]) -> None:
        for name, answer in answers.items():
            (tmp_path / name).write_text(answer)
        tool("compute-sanitizer", f'[ "$1" = --tool ] && cat "{tmp_path}/$2"')

    return install


def test_sanitizers(sanitizer):
    memory, races = CLEAN["memcheck"], CLEAN["racecheck"]
    sanitizer({"memcheck": memory, "racecheck": races, "synccheck": memory, "initcheck": memory})
    result = sanitize()
    assert result.status == "passed"
    assert list(result.details) == list(SANITIZERS)


def test_one_sanitizer_finds_something(sanitizer):
    memory, races = CLEAN["memcheck"], CLEAN["racecheck"]
    sanitizer({"memcheck": INVALID_WRITE, "racecheck": races, "synccheck": memory, "initcheck": memory})
    result = sanitize()
    assert (result.status, result.summary) == ("failed", "memcheck: 1 error")
    assert "relu_nhwc" in "\n".join(result.details["memcheck"]["log"])


def test_without_a_sanitizer(sanitizer):
    result = sanitize()
    assert result.status == "not run"
    assert "compute-sanitizer is not in PATH" in result.summary


# ---- Times in little time --------------------------------------------------------------------------------------------

ROW = {"bench": "lrn", "case": "c, batch 128", "dtype": "bfloat16", "layout": "channels_last", "pass": "forward"}


@pytest.mark.parametrize(
    ("rest", "code", "status", "summary"),
    [
        ({"left_out": {}}, 0, "passed", "1 rows, 0 failed"),
        ({"left_out": {"triton": ["a", "b"]}}, 0, "passed", "1 rows, 0 failed, 2 cases left out"),
        ({"bench": "nets", "case": "n", "failed": {"": "why"}}, 1, "failed", "2 rows, 1 failed"),
        ({}, -11, "failed", "1 rows, 0 failed; exit status -11"),
        ({}, None, "failed", "1 rows, 0 failed; broken off after 150 s"),
    ],
    ids=["passed", "budget spent", "a case failed", "crashed", "broken off"],
)
def test_rows_on_disk_count_however_the_run_ended(rest, code, status, summary, monkeypatch, tmp_path, capsys):
    path = tmp_path / "card" / "quick.jsonl"

    def measure(command, limit):
        assert command[1:4] == ["-m", "benchmarks.quick", str(path)]
        lines = [{"commit": "abc"}, ROW | {"us": {"cuda": 2.0, "copy": 1.0}}, rest]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return code, "log"

    monkeypatch.setattr(gpu_report, "run", measure)
    result = gpu_report.quick(path, 150)
    assert (result.status, result.summary) == (status, summary)
    assert "2 50%" in capsys.readouterr().out


def test_a_run_without_a_row_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "run", lambda command, limit: (1, "no module named benchmarks"))
    result = gpu_report.quick(tmp_path / "quick.jsonl", 150)
    assert (result.status, result.details) == ("failed", {"log": ["no module named benchmarks"]})


NAMES = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size"]
VALUES = ["0", "42", "python3.11", "card", "NAME", "1", "7", "(8, 32, 1)", "(1512, 1, 1)", "0", "9.0"]
POOL = (
    "void alexnet_fast::cuda::pool_fwd_strips<__nv_bfloat16, (int)8, (bool)0, alexnet_fast::cuda::Plain<__nv_bfloat16>>"
)
TILE = "void alexnet_fast::cuda::(anonymous namespace)::conv_relu_fwd<alexnet_fast::cuda::ConvTile<(int)128, (int)64>>"


def ncu_log() -> str:
    """As ncu --csv --page raw prints: its own lines, the watched program's, names, units, kernels."""
    names = [*NAMES, "Device", "CC", *profile.METRICS.values()]
    units = [""] * 11 + ["ns", "%", "%", "%", "register/thread"]
    rows = [names, units]
    for kernel, numbers in (
        (POOL, ["33,570", "53.47", "39.87", "21.79", "111"]),
        (TILE, ["4,900", "1.6", "0.2", "49.2", "30"]),
    ):
        rows.append([kernel + "(alexnet_fast::PoolParams, T1)" if v == "NAME" else v for v in VALUES] + numbers)
    return "\n".join(
        ["==PROF== Connected to process 42", "12 tensors", *(",".join(f'"{v}"' for v in row) for row in rows)]
    )


def test_a_profile_is_a_table(tool, tmp_path, capsys):
    (tmp_path / "log").write_text(ncu_log())
    tool("ncu", f'cat "{tmp_path}/log"')
    result = gpu_report.profiled()
    assert (result.status, result.summary) == ("passed", "2 kernels")
    pool, tile = result.details["kernels"]
    assert pool == {
        **{"kernel": "pool_fwd_strips<bf16, 8, 0, Plain<bf16>>", "grid": "1512x1x1", "block": "8x32x1", "us": 33.57},
        **{"dram_percent": 53.47, "issue_percent": 39.87, "occupancy_percent": 21.79, "registers": 111},
    }
    assert tile["kernel"] == "conv_relu_fwd<ConvTile<128, 64>>"
    assert "pool_fwd_strips" in capsys.readouterr().out
    shipped = machine.ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/profile-20261127.json"
    assert json.loads(shipped.read_text())["details"]["kernels"][0].keys() == pool.keys()


def test_a_profile_of_many_kernels_fits_a_screen():
    (pool, _) = profile.kernels_of(ncu_log())
    lines = profile.table([pool | {"us": float(number)} for number in range(100)])
    assert len(lines) <= 60
    assert lines[-1] == "and 44 that take less"


def test_what_keeps_ncu_from_measuring_is_said(tool):
    assert gpu_report.profiled().status == "not run"
    tool("ncu", "echo '==PROF== Connected'; echo '==ERROR== ERR_NVGPUCTRPERM: no permission'; exit 1")
    assert gpu_report.profiled().summary == "==ERROR== ERR_NVGPUCTRPERM: no permission"
