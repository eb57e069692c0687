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
