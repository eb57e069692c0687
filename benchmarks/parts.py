"""Tables of what benchmarks.quick and the step profile measured on a card, for benchmarks/report.py.

Of each device the newest quick-*.jsonl and profile-*.json count, and peers-*.jsonl of quick's commit beside them.
layers.json has the layers. changed.json says which kernels are others than those that were measured: their rows carry
a mark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .results import load_lines, merged
from .tables import LOSES, floor_ms, table

CHANGED = "‡"  # marks rows whose kernel has been rewritten since
NETS = {"alexnet": "inference", "train_step": "training step"}
OWN = {"auto": "ours", "cuda": "own convolutions", "eager": "eager"}
PEERS = ("eager", "compile", "JAX")

Parts = dict[str, Any]


def newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), default=None)


def load_parts(folder: Path) -> dict[str, Parts]:
    """What there is, by device."""
    devices = {}
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        if (path := newest(place, "quick-*.jsonl")) is None:
            continue
        found = load_lines(path)
        if (other := newest(place, "peers-*.jsonl")) and (more := load_lines(other))["commit"] == found["commit"]:
            found["rows"] += more["rows"]
        found["rows"] = merged(found["rows"])
        for name, pattern in (("layers", "layers.json"), ("profile", "profile-*.json"), ("changed", "changed.json")):
            if path := newest(place, pattern):
                found[name] = json.loads(path.read_text())
        devices[place.name] = found
    return devices


def changes(found: Parts) -> list[dict[str, Any]]:
    """What is other than what was measured."""
    changed = found.get("changed", {})
    return changed["changes"] if changed.get("commit") == found["commit"] else []


def concerns(change: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether ``row`` is of what has changed: all that one of its ``rows`` names."""
    named = row | {"what": row.get("case", "").rsplit(", ", 2)[0]}
    named["triton"] = any("triton" in row.get(times, {}) for times in ("us", "cold"))
    return any(all(named.get(name) in values for name, values in each.items()) for each in change["rows"])


def mark(found: Parts, row: dict[str, Any], loses: bool) -> str:
    """The marks that a row carries."""
    new = any(concerns(change, row) for change in changes(found))
    return "".join(f" {sign}" for sign, holds in ((LOSES, loses), (CHANGED, new)) if holds)


def about(found: Parts) -> str:
    machine, ceilings = found["machine"], found["ceilings"]
    versions = ", ".join(f"{name} {value}" for name, value in found["versions"].items())
    driver = machine.get("driver_version", "unknown")
    return (
        f"{machine['gpu']}, driver {driver}; {versions}; commit {found['commit']}, {found['date']}. {found['method']}\n"
        f"Measured ceilings: copy {ceilings['copy_gb_s']:g} GB/s, matrix products "
        f"{ceilings['float32_tflop_s']:g} TFLOP/s in float32 and {ceilings['bfloat16_tflop_s']:g} in bfloat16.\n"
    )


def marks(found: Parts, benches: tuple[str, ...] = ()) -> str:
    """What the marks mean, and what has changed since, of these ``benches`` or of all."""
    lines = [f"{LOSES}: a peer is faster."]
    each = [change for change in changes(found) if not benches or any(concerns(change, {"bench": b}) for b in benches)]
    if each:
        lines += ["", f"{CHANGED}: changed since, and measured on no GPU as it is now:", ""]
        lines += [f"- {change['what']}" for change in each]
    return "\n".join(lines) + "\n"


def ms(us: float | None) -> str:
    return "" if us is None else f"{us / 1e3:.3g}"


def digits(us: float | None) -> str:
    """Three, and all before the point."""
    return "" if us is None else f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def best(us: dict[str, float], suffix: str) -> tuple[str, float] | None:
    """The fastest peer, as plain calls or as graphs, and its time over ours. compile's calls are graphs themselves."""
    named = {name: us.get(name + suffix * (name == "eager")) for name in PEERS}
    peers = {name: time for name, time in named.items() if time}
    if not peers or "auto" + suffix not in us:
        return None
    name = min(peers, key=peers.get)
    return name, peers[name] / us["auto" + suffix]


def shown(side: str) -> str:
    name, *graph = side.split(", ")
    return ", ".join([OWN.get(name, name), *graph])


def nets_of(found: Parts) -> list[dict[str, Any]]:
    """Rows of whole nets, then of training steps."""
    return [row for bench in NETS for row in found["rows"] if row["bench"] == bench and "us" in row]


def nets_table(found: Parts) -> str:
    """Whole nets and training steps."""
    rows = nets_of(found)
    others = [name for name in PEERS[1:] if any(name in row["us"] for row in rows)]
    sides = [side + graph for side in OWN for graph in ("", ", graph")] + others
    head = ["milliseconds", "dtype", *map(shown, sides)]
    head += ["best peer / ours", "in a graph", "floor / ours"]
    lines = []
    for row in rows:
        us, ratios = row["us"], [best(row["us"], suffix) for suffix in ("", ", graph")]
        fastest = min(us[name] for name in ("auto", "auto, graph") if name in us)
        cells = [f"{ratio[1]:.2f} ({ratio[0]})" if ratio else "" for ratio in ratios]
        loses = any(ratio and ratio[1] < 1 for ratio in ratios)
        share = f"{1e5 * floor_ms(row, found['ceilings']) / fastest:.0f}%"
        name = f"{NETS[row['bench']]}, {row['case']}{mark(found, row, loses)}"
        lines.append([name, row["dtype"], *(ms(us.get(side)) for side in sides), *cells, share])
    return table(head, lines)


def speed_data(found: Parts) -> list[list[Any]]:
    """What the picture of nets shows: title, milliseconds by side, floor."""
    return [
        [
            f"{NETS[row['bench']]}, {row['case']}\n{row['dtype']}",
            {shown(side): us / 1e3 for side, us in row["us"].items()},
            floor_ms(row, found["ceilings"]),
        ]
        for row in nets_of(found)
    ]


def kernels_table(found: Parts) -> str:
    """Pointwise kernels against the copy's speed, and torch's and Triton's against them."""
    head = ["microseconds", "dtype", "layout", "pass", "alone", "GB/s", "floor / alone", "cold", "eager / ours"]
    head += ["Triton / ours"]
    lines = []
    for row in found["rows"]:
        if row["bench"] not in ("lrn", "max_pool", "epilogue") or not (row.get("us") or row.get("cold")):
            continue
        us, cold = row.get("us", {}), row.get("cold", {})
        alone, ratios = us.get("cuda"), []
        for side in ("eager", "triton"):
            pairs = [times[side] / times["cuda"] for times in (us, cold) if side in times and "cuda" in times]
            ratios.append(pairs[0] if pairs else None)
        name = f"{row['bench']} {row['case']}{mark(found, row, any(ratio and ratio < 1 for ratio in ratios))}"
        lines.append([name, row["dtype"], row["layout"], row["pass"]])
        floor = 1e3 * floor_ms(row | {"flops": 0}, found["ceilings"])
        rates = [f"{row['bytes'] / alone / 1e3:.0f}", f"{100 * floor / alone:.0f}%"] if alone else ["", ""]
        lines[-1] += [digits(alone), *rates, digits(cold.get("cuda"))]
        lines[-1] += [f"{ratio:.2f}" if ratio else "" for ratio in ratios]
    return table(head, lines)


WAYS = {
    "cuda": "own",
    "cuda_epilogue": "own, then epilogue",
    "cudnn": "cuDNN's convolution alone",
    "cudnn_bias_relu": "cuDNN, bias and ReLU in it",
    "cudnn_epilogue": "cuDNN, then epilogue",
    "triton": "Triton",
    "eager": "eager",
}


def layers_table(found: Parts) -> str:
    """Every way to compute each layer. cuDNN's convolution alone lacks the bias and ReLU of a forward pass."""
    cases: dict[tuple, dict[str, float]] = {}
    names = (
        "operator",
        "dtype",
        "batch",
        "channels",
        "height",
        "width",
        "filters",
        "kernel",
        "stride",
        "groups",
        "lrn",
    )
    for row in found["layers"]["rows"]:
        case = tuple(row[name] for name in names)
        cases.setdefault(case, {})[row["candidate"]] = row["us"]
    ways = [way for way in WAYS if any(way in us for us in cases.values())]
    lines = []
    for (operator, dtype, batch, channels, height, width, filters, kernel, stride, groups, lrn), us in cases.items():
        ours = min((us[way] for way in ("cuda", "cuda_epilogue", "triton") if way in us), default=None)
        partial = operator in ("conv_relu", "conv_stage")
        theirs = min(us[way] for way in us if way.startswith(("cudnn", "eager")) and not (partial and way == "cudnn"))
        shape = f"{channels}x{height}x{width}, {filters} of {kernel}x{kernel}"
        shape += f", stride {stride}" * (stride > 1) + f", {groups} groups" * (groups > 1) + ", LRN" * bool(lrn)
        marked = mark(found, {"bench": operator, "channels": channels, "lrn": lrn}, ours is not None and theirs < ours)
        lines.append([f"{operator} {shape}, batch {batch}{marked}", dtype])
        lines[-1] += [digits(us.get(way)) for way in ways]
        lines[-1].append(f"{theirs / ours:.2f}" if ours else "")
    return table(["microseconds", "dtype", *(WAYS[way] for way in ways), "best of cuDNN and eager / own"], lines)


def memory_table(found: Parts) -> str:
    rows = [row for row in found["rows"] if row.get("peak")]
    lines = [
        [f"{NETS[row['bench']]}, {row['case']}", *(f"{row['peak'][side] / 2**20:.0f}" for side in ("auto", "eager"))]
        for row in rows
    ]
    return table(["MiB beyond those before the call", "ours", "eager"], lines)


def host_table(found: Parts) -> str:
    lines = []
    for row in found["rows"]:
        if row["bench"] == "host":
            ours, eager = (row["us"].get(side) for side in ("auto", "eager"))
            name = f"{row['case']}, {row['pass']}{mark(found, row, bool(ours and eager and eager < ours))}"
            lines.append([name, *map(digits, (ours, eager))])
            lines[-1].append(f"{eager / ours:.2f}" if ours and eager else "")
    return table(["microseconds", "ours", "eager", "eager / ours"], lines)


def profile_table(found: Parts) -> str:
    head = ["kernel", "grid", "block", "µs", "DRAM", "issue", "occupancy", "registers"]
    lines = []
    for kernel in found["profile"]["details"]["kernels"]:
        shares = [f"{kernel[name]:.0f}%" for name in ("dram_percent", "issue_percent", "occupancy_percent")]
        name = f"`{kernel['kernel']}`{mark(found, {'kernel': kernel['kernel'].split('<')[0]}, False)}"
        lines.append([name, kernel["grid"], kernel["block"], digits(kernel["us"]), *shares, str(kernel["registers"])])
    return table(head, lines)


def parts_text(found: Parts) -> list[str]:
    """The sections of docs/performance.md."""
    texts = [about(found), marks(found), "### Nets, in parts\n", nets_table(found)]
    if any(row.get("peak") for row in found["rows"]):
        texts += ["### Peak memory\n", memory_table(found)]
    if any(row["bench"] == "host" for row in found["rows"]):
        texts += ["### Host time of a call\n", host_table(found)]
    texts += ["### Pointwise kernels\n", kernels_table(found)]
    if "layers" in found:
        texts += ["### Layers, every way\n", found["layers"]["about"]["method"] + "\n", layers_table(found)]
    if "profile" in found:
        method = found["profile"]["details"]["method"]
        texts += ["### Profile\n", f"{method} Commit {found['profile']['machine']['commit']}.\n", profile_table(found)]
    return texts
