"""The table by which ``auto`` chooses convolutions without measuring: ``python -m benchmarks.choices`` writes
alexnet_fast/choices.json from results/*/layers.json.

Of each measured shape it keeps the fastest candidate and the fastest of the library's. A candidate that was not
measured there has a time all the same, if

- it is a stage by two of our kernels, and its convolution was measured: that, and the pass behind it, which is what
  the stage by cuDNN and a pass takes beyond cuDNN's convolution;
- or it was measured for a shape nearby: its share of the library's time there. The nearest such shape counts.

What is inferred so has to win clearly: by the factor in ``MARGINS``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alexnet_fast import tuning
from alexnet_fast.tuning import LIBRARY, comparable, distance, near, work_of_row

RESULTS = Path(__file__).with_name("results")
NOT_CANDIDATES = {
    "conv_relu": ("cudnn", "eager"),  # a floor without bias and ReLU; torch's own passes
    "conv_stage": ("eager",),
}
MARGINS = {"measured": 1.0, "parts": 1.05, "nearby": 1.5}
Shape = dict[str, Any]
Times = dict[str, tuple[float, str]]  # microseconds, and how they were found


def key(shape: Shape, **other: Any) -> tuple:
    return tuple({**shape, **other}.items())


def measured(path: Path) -> dict[tuple, dict[str, float]]:
    """By shape, in the file's order: the microseconds of all that was measured."""
    shapes: dict[tuple, dict[str, float]] = {}
    for row in json.loads(path.read_text())["rows"]:
        shape = {name: value for name, value in row.items() if name not in ("candidate", "us")}
        shapes.setdefault(key(shape), {})[row["candidate"]] = row["us"]
    return shapes


def candidates(shape: Shape, us: dict[str, float]) -> Times:
    left_out = NOT_CANDIDATES.get(shape["operator"], ())
    if shape["groups"] > 1:
        left_out += ("cudnn_bias_relu",)  # up to 17 times as long as the convolution alone
    return {name: (time, "measured") for name, time in us.items() if name not in left_out}


def with_parts(shapes: dict[tuple, dict[str, float]], times: dict[tuple, Times]) -> None:
    """Adds to stages what the sum of two passes says."""
    for name, found in times.items():
        shape = dict(name)
        convolution = key(shape, operator="conv_relu", lrn=0, pool=0)
        if shape["operator"] == "conv_stage" and "cuda" in times.get(convolution, {}):
            behind = found["cudnn_epilogue"][0] - shapes[convolution]["cudnn"]
            time, how = times[convolution]["cuda"]
            if behind > 0:
                found.setdefault("cuda_epilogue", (time + behind, "parts" if how == "measured" else how))


def with_nearby(times: dict[tuple, Times]) -> None:
    """Adds to convolutions what the nearest shape says that has both the candidate and the library's."""
    works = {name: work_of_row(dict(name)) for name in times}
    for name, found in times.items():
        library = LIBRARY[works[name].operator]
        for candidate in ("cuda", "triton"):
            if candidate in found:
                continue
            others = [
                other
                for other, there in times.items()
                if comparable(works[other], works[name])
                and near(works[other], works[name])
                and {candidate, library} <= {c for c, (_, how) in there.items() if how == "measured"}
            ]
            if others:
                there = times[min(others, key=lambda other: distance(works[other], works[name]))]
                share = there[candidate][0] / there[library][0]
                found[candidate] = (share * found[library][0], "nearby")


def all_times(path: Path) -> dict[tuple, Times]:
    """By shape: every candidate's time, measured or inferred."""
    shapes = measured(path)
    times = {name: candidates(dict(name), us) for name, us in shapes.items()}
    with_nearby(times)
    with_parts(shapes, times)
    return times


def cost(found: Times, candidate: str) -> float:
    time, how = found[candidate]
    return time * MARGINS[how]


def rows_of(path: Path) -> list[dict[str, Any]]:
    device = json.loads(path.read_text())["about"]["device"]
    rows = []
    for name, found in all_times(path).items():
        best = min(found, key=lambda candidate: cost(found, candidate))
        library = min((c for c in found if c.startswith("cudnn")), key=lambda candidate: cost(found, candidate))
        how = {"candidate": best, "by": found[best][1], "library": library}
        rows.append({"device": device, **dict(name), **how})
    return rows


def text(results: Path = RESULTS) -> str:
    """The table as the package holds it: a row a line."""
    rows = [json.dumps(row) for path in sorted(results.glob("*/layers.json")) for row in rows_of(path)]
    about = json.dumps("Made by python -m benchmarks.choices from benchmarks/results/*/layers.json.")
    return f'{{"about": {about}, "rows": [\n' + ",\n".join(rows) + "\n]}\n"


if __name__ == "__main__":
    tuning.TABLE.write_text(text())
