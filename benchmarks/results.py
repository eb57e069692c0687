"""The file of one machine's results: medians and quartiles, small enough to be committed."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median, quantiles
from typing import Any

KEY = ("bench", "case", "dtype", "layout", "pass", "backend")


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile], to four digits."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return [float(f"{value:.4g}") for value in (low, median(values), high)]


def timed(times: dict[str, list[float]]) -> dict[str, Any]:
    """Of each side its milliseconds, and of each peer the ratio of its median to ours, with the quartiles of the ratios
    of single rounds, in which both met the same state of the machine. ``times`` in seconds, ours first."""
    ours = times["ours"]
    ratios = {}
    for name, theirs in times.items():
        if name != "ours":
            low, _, high = quartiles([b / a for a, b in zip(ours, theirs, strict=True)])
            ratios[name] = [low, float(f"{median(theirs) / median(ours):.4g}"), high]
    return {"ms": {name: quartiles([1e3 * t for t in side]) for name, side in times.items()}, "ratio": ratios}


def key(row: dict[str, Any]) -> tuple:
    return tuple(row[name] for name in KEY)


def write(path: Path, header: dict[str, Any], rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """Adds ``rows`` to the file, in place of those of the same case; rows of another commit or machine are dropped."""
    kept = []
    if path.exists():
        before = json.loads(path.read_text())
        if all(before[name] == header[name] for name in ("commit", "machine", "versions")):
            kept, missing = before["rows"], {**before["missing"], **missing}
            header = {**header, "ceilings": before["ceilings"]}  # floors of one file have one base
    merged = {key(row): row for row in [*kept, *rows]}
    parts = {**header, "missing": missing}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in parts.items()]
    body = ",\n".join(json.dumps(row) for row in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + "\n".join(lines) + f'\n"rows": [\n{body}\n]\n}}\n')


def load_lines(path: Path) -> dict[str, Any]:
    """A file of :mod:`benchmarks.quick`: what was measured on what, ``rows``, and, where the run came to its end,
    ``left_out``. A line that was broken off counts for nothing."""
    found: dict[str, Any] = {"rows": []}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if "bench" in line:
            found["rows"].append(line)
        else:
            found |= line
    return found


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each case, with the sides of all that are of it."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        case = tuple(row.get(name) for name in KEY)
        before = found.get(case, {})
        both = {part: before.get(part, {}) | row.get(part, {}) for part in ("us", "failed", "peak", "missing")}
        found[case] = before | row | {part: value for part, value in both.items() if value}
    return [*found.values()]


def write_layers(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """layers.json: of each layer and way to compute it one row, from which ``auto``'s table is made."""
    head = {"date": about["date"], "device": about["machine"].get("gpu", about["machine"]["processor"])}
    head |= {name: about[name] for name in ("versions", "commit", "method")}
    lines = []
    for row in rows:
        if "layer" in row:
            named = {"operator": row["bench"], "dtype": row["dtype"], **row["layer"]}
            lines += [json.dumps(named | {"candidate": side, "us": us}) for side, us in row["us"].items()]
    body = ",\n".join(lines)
    path.write_text(f'{{"about": {json.dumps(head, indent=1)},\n"rows": [\n{body}\n]}}\n')
