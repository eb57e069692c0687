"""Nsight Compute over one call of each CUDA kernel of this package, for the step ``profile`` of benchmarks.gpu_report.

``python -m benchmarks.profile`` is the process that it watches.
"""

from __future__ import annotations

import csv
import re
import sys
from typing import Any

METRICS = {
    "us": "gpu__time_duration.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
METHOD = (
    "Measured by Nsight Compute: one call of each kernel, bfloat16 images in channels_last, batch 128, caches flushed. "
    "DRAM: its throughput; issue: instructions a cycle; occupancy: warps that are there; all of what is possible."
)
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
MOST = 56  # lines of the table

Kernel = dict[str, Any]


def command(ncu: str) -> list[str]:
    """Other libraries' kernels are left out: their names do not hold this package's namespace."""
    watched = ["--kernel-name-base", "demangled", "--kernel-name", "regex:alexnet_fast"]
    form = ["--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS.values())]
    return [ncu, *watched, *form, sys.executable, "-m", "benchmarks.profile"]


def kernels_of(log: str) -> list[Kernel]:
    """The rows of what ncu printed. Its raw page has a line of names, one of units, and one a kernel."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    units, *rows = csv.DictReader(lines) if len(lines) > 1 else [{}]
    kernels = []
    for row in rows:
        values = {name: float(row[metric].replace(",", "") or "nan") for name, metric in METRICS.items()}
        values["us"] *= MICROSECONDS[units[METRICS["us"]]]
        values = {name: float(f"{value:.4g}") for name, value in values.items()}
        values["registers"] = int(values["registers"])
        sides = {name: "x".join(re.findall(r"\d+", row[f"{name.title()} Size"])) for name in ("grid", "block")}
        kernels.append({"kernel": short_name(row["Kernel Name"]), **sides, **values})
    return kernels


def short_name(demangled: str) -> str:
    """Without its result, namespaces, arguments, and the types of its template's numbers."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\b\w+::|\((?:int|bool|unsigned int)\)", "", demangled)
    name = name.removeprefix("void ").replace("__nv_bfloat16", "bf16")
    return re.sub(r"\(.*$", "", name)


def table(kernels: list[Kernel]) -> list[str]:
    """A line a kernel; of more than fit on a screen, those that take longest."""
    kept = sorted(kernels, key=lambda kernel: -kernel["us"])[:MOST]
    lines = [f"{'kernel':90}{'µs':>9}{'DRAM %':>8}{'issue %':>9}{'warps %':>9}{'registers':>11}"]
    for kernel in [kernel for kernel in kernels if kernel in kept]:
        shares = f"{kernel['dram_percent']:8.0f}{kernel['issue_percent']:9.0f}{kernel['occupancy_percent']:9.0f}"
        lines.append(f"{kernel['kernel'][:89]:90}{kernel['us']:9.2f}{shares}{kernel['registers']:11}")
    if left := len(kernels) - len(kept):
        lines.append(f"and {left} that take less")
    return lines


def main() -> None:
    import torch

    from .gpu import Clock
    from .quick_rows import Place

    place = Place(Clock(), batches=(128,))
    one_call_of_each(place)
    torch.cuda.synchronize()


def one_call_of_each(place) -> None:
    import torch
    import torch.nn.functional as F

    from . import quick, quick_rows

    batch = min(place.batches)
    for sample in quick.POINTWISE:
        data = place.data(sample, batch)
        quick_rows.operators(sample, data, quick_rows.gradient_of_output(sample, data), place.own)
    for sample in [*quick.CONVOLUTIONS, *quick.STAGES]:
        data, rest = place.data(sample, batch), place.rest(sample)
        x, weight = data["input"], data["weight"]
        with torch.inference_mode():
            quick_rows.CANDIDATES[sample.stem]["cuda"](x, weight, data["bias"], *rest)
            if sample.stem == "conv_relu":
                dy = torch.randn_like(F.conv2d(x, weight, None, *rest))
                for gradient in quick_rows.GRADIENTS.values():
                    gradient["cuda"](dy, x, weight, *rest)


if __name__ == "__main__":
    main()
