"""python -m benchmarks.quick FILE: what a card shows of every kernel, layer and net in a minute and a half.

    python -m benchmarks.quick FILE [--budget SECONDS] [SECTION …]

The sections, in their order; ``peers``, which takes minutes, runs only where it is named:

``ceilings``   a large copy and matrix products
``pointwise``  each pointwise kernel alone: a CUDA graph of calls on so many tensors that none is in the L2 when its
               turn comes, beside a copy of as many bytes
``layers``     the convolutions and stages of both nets, by every implementation, cold
``nets``       inference of whole nets, as a plain call and as replays of a CUDA graph, cold, and the peak of memory
``training``   training steps, likewise
``host``       what a call keeps the host busy, of each public function and of nets
``gradients``  the convolutions' gradients, by every implementation, cold
``small``      layers as before, of one image, and linear layers of one and of eight
``sm90``       layers and gradients by Hopper's kernels, on compute capability 9.0
``triton``     Triton's kernels, which have to be compiled first
``peers``      torch.compile and JAX, where they are installed

The cases are those of the files bench_*.py. FILE is written as they come, one JSON object a line: first what is
measured on what, then the rows, then what was left out when the budget was spent. Times in ``us`` are medians of
microseconds. A side that fails or gives another result than its peer is named under ``failed``.

Exit codes: 0 something was measured and no side failed; 1 otherwise; 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from alexnet_fast import tuning
from alexnet_fast.ops.linear_relu import MOST_ROWS
from tests.ops.samples import Sample, linear_relu_dropout

from . import (
    bench_conv_relu,
    bench_conv_stage,
    bench_epilogue,
    bench_lrn,
    bench_max_pool,
    bench_overhead,
    machine,
    peers,
)
from .bench_linear_int8 import LAYERS
from .cases import FORMS
from .gpu import Clock
from .quick_rows import (
    GRADIENTS,
    Place,
    Row,
    function_calls,
    gradient_row,
    host_row,
    layer_row,
    linear_row,
    net_calls,
    net_row,
    pointwise_rows,
    said,
    tiny_net_calls,
    training_row,
    triton_rows,
)
from .results import merged, write_layers
from .timing import GEOMETRY, short

BUDGET = 75  # seconds; starting, and the case in which they end, take the rest of a minute and a half
VARIANTS = ("torchvision", "paper")
METHOD = (
    "Medians of one run. Kernels alone: a CUDA graph of calls on different tensors, together larger than the L2 cache. "
    "Layers, nets and steps: CUDA events around one call, the L2 cache overwritten before it, sides alternating, after "
    "3 calls; cudnn.benchmark on, Triton untuned. Host: up to the return of a call."
)


def in_order(sample: Sample) -> tuple[bool, str]:
    """torchvision's layers, then those of 2012."""
    return sample.reason.startswith("2012"), sample.reason


def convolution_of(stage: Sample) -> Sample:
    """A stage without what follows its convolution and ReLU."""
    geometry = {name: value for name, value in stage.arguments.items() if name in GEOMETRY}
    return replace(stage, stem="conv_relu", reason=stage.reason.split(",")[0], arguments=geometry)


POINTWISE = [*bench_lrn.SAMPLES, *bench_max_pool.SAMPLES, *bench_epilogue.SAMPLES]
HOST = [*bench_overhead.SAMPLES, linear_relu_dropout("", (1, 8), (8, 8), training=False)]
STAGES = sorted(bench_conv_stage.SAMPLES, key=in_order)
CONVOLUTIONS = sorted([*bench_conv_relu.SAMPLES, *map(convolution_of, STAGES)], key=in_order)


# ---- Sections --------------------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[], Iterator[Row]]]


def ceilings(place: Place) -> Iterator[Case]:
    yield "ceilings", lambda: iter([{"ceilings": machine.ceilings()}])


def pointwise(place: Place) -> Iterator[Case]:
    for batch in place.batches:
        for dtype, layout in reversed(FORMS):
            for sample in POINTWISE:
                name = f"{sample}, batch {batch}, {short(dtype)} {layout}"
                yield name, partial(pointwise_rows, place, sample, batch, dtype, layout)


def layers(place: Place, batches: tuple[int, ...] = ()) -> Iterator[Case]:
    for batch in batches or place.batches:
        for sample in [*CONVOLUTIONS, *STAGES]:
            yield f"{sample}, batch {batch}", partial(layer_row, place, sample, batch)


def gradients(place: Place, only: str = "", batches: tuple[int, ...] = ()) -> Iterator[Case]:
    for batch in batches or place.batches:
        for sample in CONVOLUTIONS:
            for bench in GRADIENTS:
                if bench == "conv_backward_weight" or sample.input[1] > 3:  # nobody asks for the images' gradient
                    name = f"{bench} {sample.reason}, batch {batch}"
                    yield name, partial(gradient_row, place, sample, batch, bench, only)


def nets(place: Place) -> Iterator[Case]:
    for variant in VARIANTS:
        for batch in place.net_batches:
            yield f"{variant}, batch {batch}", partial(net_row, place, variant, batch)


def training(place: Place) -> Iterator[Case]:
    for batch in place.batches:
        for variant in VARIANTS:
            yield f"{variant}, batch {batch}", partial(training_row, place, variant, batch)


def host(place: Place) -> Iterator[Case]:
    for sample in HOST:
        yield sample.stem, partial(host_row, place, sample.stem, "forward", partial(function_calls, place, sample))
    yield "net", partial(host_row, place, f"{VARIANTS[0]} net, batch 1", "forward", partial(net_calls, place))
    for learns, what in ((False, "forward"), (True, "forward+backward")):
        yield f"tiny net, {what}", partial(host_row, place, "tiny net", what, partial(tiny_net_calls, place, learns))


def small(place: Place) -> Iterator[Case]:
    yield from layers(place, (1,))
    for name in LAYERS:
        for rows in (1, MOST_ROWS):
            yield f"{name}, {rows} rows", partial(linear_row, place, name, rows)


def sm90(place: Place) -> Iterator[Case]:
    """Last but for what is compiled: a kernel that no card has run may take the process with it."""
    if tuning.capability(torch.device(place.device)) != (9, 0):
        return
    for batch in place.batches:
        for sample in CONVOLUTIONS:
            yield f"{sample}, batch {batch}", partial(layer_row, place, sample, batch, "cuda_sm90")
        for sample in STAGES:
            names = ["cuda_sm90_epilogue"] + ["cuda_sm90"] * (sample.arguments.get("lrn") is None)
            for name in names:
                yield f"{sample}, batch {batch}", partial(layer_row, place, sample, batch, name)
    yield from gradients(place, "cuda_sm90")


def triton(place: Place) -> Iterator[Case]:
    batch = min(place.batches)
    for sample in POINTWISE:
        yield f"{sample}, batch {batch}", partial(triton_rows, place, sample, batch)
    for sample in [*CONVOLUTIONS, *STAGES]:
        yield f"{sample}, batch {batch}", partial(layer_row, place, sample, batch, "triton")
    yield from gradients(place, "triton", (batch,))


def made_by_peers(plain: torch.nn.Sequential, x: Tensor) -> dict[str, peers.Peer]:
    return {"compile": peers.compiled(plain, x), "JAX": peers.jax_compiled(plain, x)}


def with_peers(place: Place) -> Iterator[Case]:
    for batch in reversed(place.net_batches):
        for variant in VARIANTS:
            yield f"{variant}, batch {batch}", partial(net_row, place, variant, batch, made_by_peers)
    for variant in VARIANTS:
        batch = min(place.batches)
        yield f"{variant}, batch {batch}, training", partial(training_row, place, variant, batch, compiled=True)


SECTIONS: dict[str, Callable[[Place], Iterator[Case]]] = {
    "ceilings": ceilings,
    "pointwise": pointwise,
    "layers": layers,
    "nets": nets,
    "training": training,
    "host": host,
    "gradients": gradients,
    "small": small,
    "sm90": sm90,
    "triton": triton,
    "peers": with_peers,
}
QUICK = [name for name in SECTIONS if name != "peers"]


def header() -> Row:
    versions = machine.versions()
    if torch.backends.cudnn.is_available():
        versions["cudnn"] = str(torch.backends.cudnn.version())
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    about = {"date": date, "machine": machine.facts(), "versions": versions, "commit": machine.commit()}
    return about | {"method": METHOD}


def measure(path: Path, place: Place, sections: list[str], budget: float) -> Row:
    """Writes the rows of ``sections`` to ``path`` as they come; returns the last line: what the budget left out, by
    section, and how many cases failed."""
    begin, about, rows = time.monotonic(), header(), []
    left_out: dict[str, list[str]] = {}
    with path.open("w") as file:

        def note(line: Row) -> None:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

        note(about)
        for section in sections:
            for name, run in SECTIONS[section](place):
                if time.monotonic() - begin > budget:
                    left_out.setdefault(section, []).append(name)
                    continue
                try:
                    for row in run():
                        rows.append(row)
                        note(row)
                except Exception as error:
                    rows.append({"bench": section, "case": name, "failed": {"": said(error)}})
                    note(rows[-1])
        last = {"left_out": left_out, "seconds": round(time.monotonic() - begin, 1)}
        note(last)
    if whole(sections, left_out, rows):
        write_layers(path.with_name("layers.json"), about, rows)
    return last | {"failed": sum("failed" in row for row in rows), "rows": len(rows)}


def whole(sections: list[str], left_out: dict[str, list[str]], rows: list[Row]) -> bool:
    """Whether all layers were measured, some side of each: what is less does not replace an earlier layers.json."""
    needed = {"layers", "gradients"}
    broken = any(row["bench"] in needed for row in rows if "bench" in row)
    measured = all(row.get("us") for row in merged(rows) if "layer" in row)
    return needed <= {*sections} - {*left_out} and not broken and measured


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quick", description="Times kernels, layers and nets.")
    parser.add_argument("file", type=Path, help="the JSON lines to write")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"{', '.join(SECTIONS)}; default: without peers")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds; default {BUDGET}")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.sections if name not in SECTIONS]:
        parser.error(f"no section is called {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    if not torch.cuda.is_available():
        print(f"quick: torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    torch.backends.cudnn.benchmark = True
    os.environ.setdefault("ALEXNET_FAST_TUNE", "0")  # Triton would time its configurations for minutes
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX would take the memory of all others
    last = measure(given.file, Place(Clock()), given.sections or QUICK, given.budget)
    return int(bool(last["failed"]) or not last["rows"])


if __name__ == "__main__":
    sys.exit(main())
