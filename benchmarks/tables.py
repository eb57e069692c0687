"""Rows as lines of text: what a run prints, and the cells of the documents' tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .results import merged

LOSES = "†"  # marks rows where a peer is faster


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def floor_ms(row: dict[str, Any], ceilings: dict[str, float]) -> float | None:
    """The least time in which the measured ceilings allow the row's bytes and FLOPs: the larger of the two."""
    if not row.get("bytes"):
        return None
    return 1e3 * max(
        row["bytes"] / (ceilings["copy_gb_s"] * 1e9), row["flops"] / (ceilings[f"{row['dtype']}_tflop_s"] * 1e12)
    )


def best_peer(row: dict[str, Any]) -> tuple[str, float]:
    """The strongest peer and the ratio of its median to ours: under 1 it is faster."""
    return min(((name, ratio[1]) for name, ratio in row["ratio"].items()), key=lambda pair: pair[1])


def name_of(row: dict[str, Any]) -> str:
    on = f", {row['backend']}" if row["backend"] in ("cuda", "triton") else ""
    return f"{row['bench']} {row['case']}{on}"


def case_line(row: dict[str, Any]) -> str:
    """A case as it ends: ours, and what the strongest peer takes of that."""
    name, ratio = best_peer(row) if row["ratio"] else ("", 0.0)
    peer = f"; {name} {ratio:.2f}x" if name else ""
    return f"{name_of(row)} {row['dtype']} {row['layout']} {row['pass']}: {row['ms']['ours'][1]:.3f} ms{peer}"


def comparison(results: dict[str, Any]) -> list[str]:
    """The lines that a run prints: every row, its sides' medians and quartiles, and the floor's share."""
    machine, ceilings = results["machine"], results["ceilings"]
    about = [f"{name} {value}" for name, value in results["versions"].items()]
    lines = [
        f"{machine.get('gpu') or machine['processor']}, {machine['threads']} threads, {machine['kernels']} kernels, "
        f"{machine['memory']}; {', '.join(about)}; commit {results['commit']}",
        ", ".join(f"{name} {value:g}" for name, value in ceilings.items()),
        *(f"left out: {name}: {reason}" for name, reason in results["missing"].items()),
        f"Median [quartiles] in ms; ratio to ours; after a pause; floor as a share of ours. {LOSES}: a peer is faster.",
    ]
    for row in results["rows"]:
        lines.append(
            f"{name_of(row)} {row['dtype']} {row['layout']} {row['pass']}"
            + (f" {LOSES}" if row["ratio"] and best_peer(row)[1] < 1 else "")
        )
        for side, (low, middle, high) in row["ms"].items():
            ratio = f"{row['ratio'][side][1]:6.2f}x" if side in row["ratio"] else " " * 7
            line = f"    {side:20} {middle:9.3f} [{low:9.3f} {high:9.3f}] {ratio}"
            if (rested := row.get("rested", {}).get(side, middle)) != middle:
                line += f"  from rest {rested:.3f}"
            if side == "ours" and (floor := floor_ms(row, ceilings)):
                line += f"  floor {floor:.3f} ms, {100 * floor / middle:.0f}%"
            lines.append(line)
        if "above_operator_us" in row:
            lines.append(f"    the function takes {row['above_operator_us']:.1f} µs more than its operator")
        if "host_us" in row:
            sides = ", ".join(f"{side} {us:.0f}" for side, us in row["host_us"].items())
            lines.append(f"    host time, µs: {sides}; convolutions and products {row['bare_us']:.0f}")
        for kind in ("saved", "peak"):
            if kind in row:
                sizes = ", ".join(f"{side} {size / 1e6:.1f}" for side, size in row[kind].items())
                lines.append(f"    {kind} MB: {sizes}")
    return lines


def short_table(results: dict[str, Any]) -> list[str]:
    """A line a row: milliseconds, the strongest peer's time over ours, the floor's share; on GPUs cold times."""
    lines = []
    for row in results["rows"]:
        name, ratio = best_peer(row) if row["ratio"] else ("no peer", float("nan"))
        floor, ours = floor_ms(row, results["ceilings"]), row["ms"]["ours"][1]
        share = f"{100 * floor / ours:.0f}%" if floor else ""
        what = f"{name_of(row)} {row['dtype']} {row['layout']} {row['pass']}"
        lines.append(f"{what:90} {ours:9.4f} ms {ratio:6.2f}x {name:20} floor {share}")
    return lines


# ---- benchmarks.quick ------------------------------------------------------------------------------------------------

PASSES = ("forward", "forward, training", "backward")
LIBRARY = ("cudnn", "cudnn_bias_relu", "cudnn_epilogue")


def split_batch(name: str) -> tuple[str, int]:
    """A row's name without its batch, and the batch; 0 where there is none."""
    found = re.search(r", batch (\d+)", name)
    return (name.replace(found[0], "", 1), int(found[1])) if found else (name, 0)


def own_side(us: dict[str, float]) -> str:
    """This package's own kernels among the sides of a layer, or its choice among those of a net; '' if neither."""
    return next((name for name in ("cuda", "cpu", "auto") if name in us), "")


def library_side(us: dict[str, float]) -> str:
    """cuDNN's fastest way with all that the layer computes; of a gradient, cuDNN's."""
    whole = {name: us[name] for name in LIBRARY[1:] if name in us} or {n: us[n] for n in LIBRARY[:1] if n in us}
    return min(whole, key=whole.get) if whole else ""


def cells(rows: list[dict[str, Any]], batches: list[int], passes: tuple[str, ...], text) -> dict[str, list[str]]:
    """``text`` of each row, by name, in columns of batch and pass."""
    columns = [(batch, what) for batch in batches for what in passes]
    lines: dict[str, list[str]] = {}
    for row in rows:
        name, batch = split_batch(row["case"])
        line = lines.setdefault(name, [""] * len(columns))
        if (batch, row["pass"]) in columns:
            line[columns.index((batch, row["pass"]))] = text(row)
    return lines


def heads(batches: list[int], passes: tuple[str, ...]) -> str:
    names = ", ".join(what.replace("forward, ", "") for what in passes)
    return "; ".join(f"{names} at {batch}" for batch in batches)


def against_copy(row: dict[str, Any]) -> str:
    us = row["us"]
    own = us.get(own_side(us))
    return f"{own:.4g} {100 * us['copy'] / own:.0f}%" if own and "copy" in us else ""


def against_library(row: dict[str, Any]) -> str:
    us = row["us"]
    return "/".join(f"{us[side]:.4g}" if side else "-" for side in (own_side(us), library_side(us)))


def against_eager(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {us:.4g}" for name, us in row["us"].items())


def ours_and_eager(row: dict[str, Any]) -> str:
    return "/".join(f"{row['us'][side]:.4g}" if side in row["us"] else "-" for side in ("auto", "eager"))


def quick_table(found: dict[str, Any]) -> list[str]:
    """The lines that a run of benchmarks.quick prints: at most 60, whatever failed."""
    measured = [row for row in found["rows"] if "us" in row and "case" in row]
    failed = [row for row in found["rows"] if "failed" in row]
    rows = merged(measured)
    batches = sorted({batch for row in rows if (batch := split_batch(row["case"])[1]) > 1})[:2]
    about = found.get("machine", {})
    lines = [f"{about.get('gpu', about.get('processor', ''))}, commit {found.get('commit', 'unknown')}"]
    lines[0] += "".join(f", {name} {value:g}" for name, value in found.get("ceilings", {}).items())

    def block(head: str, named: dict[str, list[str]]) -> None:
        if named:
            lines.append(head)
            lines.extend(f"{name[:52]:52}" + "".join(f"{cell:>13}" for cell in line) for name, line in named.items())

    def of(*benches: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["bench"] in benches]

    alone = [
        row
        | {"case": f"{row['bench']} {row['case']} {row['dtype'][:5]} {'NHWC' if 'last' in row['layout'] else 'NCHW'}"}
        for row in of("lrn", "max_pool", "epilogue")
    ]
    block(
        f"kernels alone, µs and a copy's share: {heads(batches, PASSES)}", cells(alone, batches, PASSES, against_copy)
    )
    gradients = {"conv_backward_input": "dx", "conv_backward_weight": "dw", "conv_relu": "forward"}
    convolutions = [row | {"pass": gradients[row["bench"]]} for row in of(*gradients)]
    passes = ("forward", "dx", "dw")
    columns = cells(convolutions, batches, passes, against_library)
    block(f"convolutions, own/cuDNN, µs: {heads(batches, passes)}", columns)
    stages = cells(of("conv_stage"), batches, ("forward",), against_library)
    block(f"stages, own/cuDNN, µs: {', '.join(map(str, batches))}", stages)
    for bench, title in (("alexnet", "inference"), ("train_step", "training step")):
        lines += [f"{title} {row['case']}, µs: {against_eager(row)}" for row in of(bench)]
    hosts = [f"{row['case']}{row['pass'].removeprefix('forward')} {ours_and_eager(row)}" for row in of("host")]
    lines += ["host, ours/eager, µs: " + ", ".join(hosts[at : at + 5]) for at in range(0, len(hosts), 5)]
    if failed:
        names = [f"{row['case']} {side}: {why}" for row in failed for side, why in row["failed"].items()]
        lines += [f"failed: {len(names)}", *(f"  {name[:150]}" for name in names[:2])]
    if left_out := found.get("left_out"):
        lines.append("left out: " + ", ".join(f"{len(names)} of {section}" for section, names in left_out.items()))
    return lines
