"""``make gpu-report``: builds the CUDA kernels on a machine with a GPU, tests them there, and notes what came out.

    python -m benchmarks.gpu_report [STEP …]

Steps, in their order; without arguments all of them run:

``build``     compiles the extension in place, with nvcc
``quick``     a minute and a half of benchmarks.quick: every kernel, layer and net, and no peer that has to be compiled.
              Its rows are lines of quick-<time>.jsonl as they come; those of layers also replace layers.json
``tests``     every test marked ``gpu``, but Triton's; a process a core with pytest-xdist. Each failure is a
              line of tests-failures.jsonl when it happens, with its traceback in tests-failures.txt
``triton``    tests/triton likewise, whose kernels then run on the card instead of in Triton's interpreter, untuned but
              for the tests of tuning
``sanitize``  compute-sanitizer's four tools over one forward and backward pass of every operator
``peers``     whole nets in the hands of torch.compile and JAX, likewise, into peers-<time>.jsonl
``profile``   Nsight Compute, where it is installed, over one call of each kernel: time, traffic,
              instructions, occupancy, registers
``bench-…``   the GPU's cases of benchmarks/: bench-pointwise, bench-conv and bench-stage, each with the batch, -128 or
              -1024; bench-other, bench-net, bench-train. Rows of one commit collect in results.json beside the
              steps' files, and are printed at the end

A step takes eight minutes at most and is broken off beyond. It uses this Python and what is installed in it (torch,
triton, pytest, pytest-benchmark, pybind11, setuptools), and no network. Each writes
``benchmarks/results/<card>/<step>-<time>.json``.

Exit codes: 0 everything that was asked for ran and passed; 1 something failed, or could not run; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from . import machine, profile
from .results import load_lines
from .tables import quick_table, short_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks", "results")
LIMIT = 480  # seconds a step may take
PATIENCE = 20  # seconds for a process to write its report after it was interrupted
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
MOST = 20  # failures that a result lists


@dataclass
class Result:
    """What a step found. ``status`` is passed, failed, or not run."""

    status: str
    summary: str
    details: dict = field(default_factory=dict)


# ---- Processes -------------------------------------------------------------------------------------------------------


def run(command: list[str], limit: float, **environment: str) -> tuple[int | None, str]:
    """Exit status, None if ``limit`` seconds were not enough, and everything written to both outputs. At the limit the
    process is interrupted first, as by Ctrl-C, so that pytest can still report."""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            # A shell starts its background jobs deaf to SIGINT, and their children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        status = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()


def first_line(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def tail(text: str, lines: int = 40) -> list[str]:
    return text.splitlines()[-lines:]


# ---- Where this runs -------------------------------------------------------------------------------------------------


def facts() -> dict:
    """Card, driver and versions."""
    properties = torch.cuda.get_device_properties(0)
    nvcc = os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc") if os.environ.get("CUDA_HOME") else "nvcc"
    release = re.search(r"release ([\d.]+)", run([nvcc, "--version"], 60)[1]) if shutil.which(nvcc) else None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "nvcc": release[1] if release else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": machine.commit(),
    }


# ---- Steps -----------------------------------------------------------------------------------------------------------


def build() -> Result:
    status, log = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], LIMIT, ALEXNET_FAST_CUDA="1")
    if status != 0:
        return Result("failed", outcome(status), {"log": tail(log)})
    question = "import json; from alexnet_fast import _C; print(json.dumps(_C.build_info()))"
    status, answer = run([sys.executable, "-c", question], 60)
    if status != 0:
        return Result("failed", "the extension cannot be imported", {"log": tail(answer)})
    info = json.loads(answer.splitlines()[-1])
    return Result("passed", f"CUDA {info['cuda']}", info)


def outcome(status: int | None, limit: float = LIMIT) -> str:
    return f"broken off after {limit} s" if status is None else f"exit status {status}"


def processes() -> list[str]:
    """pytest's options for as many processes as cores, where pytest-xdist is installed. Few tests are handed out at a
    time, so that they run in the order in which benchmarks/failures.py puts them."""
    if importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(len(os.sched_getaffinity(0))), "--maxschedchunk", "2"]


def run_tests(failures: Path, *arguments: str, **environment: str) -> Result:
    """Tests in parallel. Each failure is a line of ``failures`` when it happens, with its traceback beside it."""
    options = ["-p", "benchmarks.failures", "--tb=short", *processes()]
    result = run_pytest(*options, *arguments, ALEXNET_FAST_FAILURES=str(failures), **environment)
    lines = failures.read_text().splitlines() if failures.exists() else []
    if lines and "failures" not in result.details:  # killed before its report
        result.summary += f", {len(lines)} failed until then"
        result.details["failures"] = [json.loads(line) for line in lines[:MOST]]
    return result


def run_pytest(*arguments: str, **environment: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
        status, log = run(command, LIMIT - PATIENCE, **environment)
        if not report.exists():
            return Result("failed", outcome(status), {"log": tail(log)})
        return junit_result(status, report.read_text(), log)


def junit_result(status: int | None, report: str, log: str) -> Result:
    """From pytest's exit status, its JUnit report and its output. A run that selected no test has not passed."""
    # A test that was interrupted has no name.
    cases = [case for case in ElementTree.fromstring(report).iter("testcase") if case.get("name")]
    found: dict[str, list[tuple[str, str]]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for kind, rows in found.items():
            name = f"{case.get('classname')}::{case.get('name')}"
            rows += [(name, element.get("message") or "") for element in case.findall(kind)]
    failures = found["failure"] + found["error"]
    passed = len(cases) - len({name for name, _ in failures + found["skipped"]})
    summary = f"{passed} passed, {len(failures)} failed, {len(found['skipped'])} skipped"
    if status is None:
        summary += f"; {outcome(status)}"
    details = {
        "passed": passed,
        "failed": len(failures),
        "skipped": Counter(message for _, message in found["skipped"]),
        "failures": [{"test": name, "message": message.split("\n")[0][:300]} for name, message in failures[:MOST]],
    }
    if status != 0 and not failures:
        details["log"] = tail(log)
    return Result("passed" if status == 0 and passed else "failed", summary, details)


def find_tool(name: str) -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.pathsep.join([os.environ.get("PATH", ""), f"{home}/bin", f"{home}/compute-sanitizer"])
    return shutil.which(name, path=path)


def sanitize() -> Result:
    """Only this package's kernels are watched: torch's own hold data that initcheck finds uninitialized."""
    if (sanitizer := find_tool("compute-sanitizer")) is None:
        return Result("not run", "compute-sanitizer is not in PATH, nor in CUDA_HOME")
    tools = {}
    for tool in SANITIZERS:
        command = [sanitizer, "--tool", tool, "--kernel-name", "kernel_substring=alexnet_fast", "--error-exitcode", "9"]
        command += [sys.executable, "-m", "tests.ops.check_all", "cuda", "auto"]
        # One allocation a tensor: in torch's pool of memory an access beyond a tensor would hit the next one's.
        status, log = run(command, LIMIT / len(SANITIZERS) - PATIENCE, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        tools[tool] = sanitized(status, log)
    failed = {tool: result for tool, result in tools.items() if result["status"] != "passed"}
    summary = "; ".join(f"{tool}: {result['summary']}" for tool, result in (failed or tools).items())
    return Result("failed" if failed else "passed", summary, tools)


def sanitized(status: int | None, log: str) -> dict:
    """One tool's result from its exit status and output. A run in which it watched nothing has not passed."""
    said = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    totals = [line for line in said if re.match(r"(ERROR|RACECHECK) SUMMARY: ", line)]
    clean = bool(totals) and re.search(r"SUMMARY: 0 (errors|hazards)", totals[-1])
    checked = re.search(r"(\d+) tensors checked", log)
    if status == 0 and clean and checked:
        return {"status": "passed", "summary": f"{totals[-1].partition(': ')[2]}, {checked[0]}"}
    summary = outcome(status)
    if not clean and len(said) > 1:
        summary = totals[-1].partition(": ")[2] if totals else said[1]
    return {"status": "failed", "summary": summary, "log": said[:MOST] + tail(log)}


def bench(*stems: str, batch: int | None = None) -> Result:
    files = [f"benchmarks/bench_{stem}.py" for stem in stems]
    names = " or ".join(name if batch is None else f"{name}-{batch}" for name in ("cuda", "triton"))
    return run_pytest(*files, "-k", names, "--benchmark-only", "--results", str(RESULTS))


# ---- Times in little time --------------------------------------------------------------------------------------------


def quick(path: Path, limit: float, *arguments: str) -> Result:
    """Rows are on disk when they are measured, so that a crash or the limit leaves those until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    status, log = run([sys.executable, "-m", "benchmarks.quick", str(path), *arguments], limit)
    if not path.exists():
        return Result("failed", outcome(status, limit), {"log": tail(log)})
    found = load_lines(path)
    print(*quick_table(found), sep="\n", flush=True)
    failed = {row["case"]: row["failed"] for row in found["rows"] if "failed" in row}
    left_out = found.get("left_out", {})
    summary = f"{len(found['rows'])} rows, {len(failed)} failed"
    if left_out:
        summary += f", {sum(map(len, left_out.values()))} cases left out"
    if status not in (0, 1):
        summary += f"; {outcome(status, limit)}"
    details = {"rows": path.name, "failed": failed, "left_out": left_out} | ({"log": tail(log)} if status != 0 else {})
    return Result("passed" if status == 0 else "failed", summary, details)


def profiled() -> Result:
    if (ncu := find_tool("ncu")) is None:
        return Result("not run", "ncu, Nsight Compute, is not in PATH, nor in CUDA_HOME")
    status, log = run(profile.command(ncu), LIMIT)
    kernels = profile.kernels_of(log)
    if not kernels:
        errors = [line for line in log.splitlines() if line.startswith("==ERROR==")]
        return Result("failed", errors[0] if errors else outcome(status), {"log": tail(log)})
    print(*profile.table(kernels), sep="\n", flush=True)
    details = {"method": profile.METHOD, "kernels": kernels} | ({} if status == 0 else {"log": tail(log)})
    return Result("passed" if status == 0 else "failed", f"{len(kernels)} kernels", details)


def stamped(folder: Path, step: str) -> Path:
    return folder / f"{step}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.jsonl"


# A step is given the folder of its card.
STEPS: dict[str, Callable[[Path], Result]] = {
    "build": lambda _: build(),
    "quick": lambda folder: quick(stamped(folder, "quick"), 150),
    "tests": lambda folder: run_tests(folder / "tests-failures.jsonl", "tests", "-m", "gpu", "--ignore=tests/triton"),
    "triton": lambda folder: run_tests(folder / "triton-failures.jsonl", "tests/triton", ALEXNET_FAST_TUNE="0"),
    "sanitize": lambda _: sanitize(),
    "peers": lambda folder: quick(stamped(folder, "peers"), LIMIT, "peers", "--budget", str(LIMIT - 90)),
    "profile": lambda _: profiled(),
    "bench-pointwise-128": lambda _: bench("lrn", "max_pool", "epilogue", batch=128),
    "bench-pointwise-1024": lambda _: bench("lrn", "max_pool", "epilogue", batch=1024),
    "bench-conv-128": lambda _: bench("conv_relu", batch=128),
    "bench-conv-1024": lambda _: bench("conv_relu", batch=1024),
    "bench-stage-128": lambda _: bench("conv_stage", batch=128),
    "bench-stage-1024": lambda _: bench("conv_stage", batch=1024),
    "bench-other": lambda _: bench(
        "linear_relu", "linear_relu_dropout", "linear_int8", "lpips_layer", "augment", "sgd", "host"
    ),
    "bench-net": lambda _: bench("alexnet", "fuse"),
    "bench-train": lambda _: bench("train_step"),
}


# ---- Report ----------------------------------------------------------------------------------------------------------


def write(folder: Path, step: str, facts: dict, result: Result, seconds: float) -> Path:
    now = datetime.now(timezone.utc)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{step}-{now:%Y%m%dT%H%M%SZ}.json"
    content = {"step": step, "date": f"{now:%Y-%m-%dT%H:%M:%SZ}", "seconds": round(seconds, 1), "machine": facts}
    path.write_text(json.dumps(content | asdict(result), indent=1, ensure_ascii=False) + "\n")
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description="Builds, tests and checks on a machine with a GPU.")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"{', '.join(STEPS)}; default: all")
    steps = parser.parse_args(arguments).steps or list(STEPS)
    if unknown := [step for step in steps if step not in STEPS]:
        parser.error(f"no step is called {unknown[0]!r}; there are {', '.join(STEPS)}")
    if not torch.cuda.is_available():
        print(f"gpu-report: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    about = facts()
    folder = ROOT / RESULTS / machine.folder({"gpu": about["card"]})
    lines = []
    for step in steps:
        print(f"gpu-report: {step} …", flush=True)
        begin = time.monotonic()
        result = STEPS[step](folder)
        seconds = time.monotonic() - begin
        path = write(folder, step, about, result, seconds)
        lines.append(f"{step:21}{result.status:10}{seconds:5.0f} s  {result.summary}  ({path.relative_to(ROOT)})")
        if step == "build" and result.status != "passed":
            break  # what follows would test an older extension
    measured = folder / "results.json"
    if any(step.startswith("bench-") for step in steps) and measured.exists():
        print(*short_table(json.loads(measured.read_text())), sep="\n")
    print(
        f"{about['card']}, driver {about['driver']}, torch {about['torch']}, commit {about['commit']}", *lines, sep="\n"
    )
    return int(any(line.split()[1] != "passed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
