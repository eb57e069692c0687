"""Rows as lines of text: what a run prints, and the cells of the documents' tables."""

from __future__ import annotations

from typing import Any

LOSES = "†"  # marks rows where a peer is faster


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
