"""python -m benchmarks.report: tables and pictures from the files in benchmarks/results, and from nothing else.

Writes what stands between the markers in README.md and docs/performance.md, and docs/performance/DEVICE-*.png. Each
picture carries the SHA-256 of the data that it shows, so that a test can tell whether it is of the committed results.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import parts
from .tables import LOSES, best_peer, floor_ms, name_of, split_batch, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- from benchmarks/results: begin -->", "<!-- from benchmarks/results: end -->"
NONE = "No results are committed yet; `make bench` measures this machine.\n"
NETS = ("alexnet", "train_step")
CALLS = "overhead"  # what a call costs before any work
HOST = "host"  # a tiny net's calls, less the work in them
FEED = "data"  # images/s of the loader
FUSE = "fuse"  # other people's nets
OTHERS = (*NETS, CALLS, HOST, FEED, FUSE)  # what is no operator

Results = dict[str, Any]


def load(folder: Path = RESULTS) -> dict[str, Results]:
    """Results by device, in the order of their names."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/results.json"))}


# ---- Tables ---------------------------------------------------------------------------------------------------------


def _time(row: Results, side: str) -> str:
    if side not in row["ms"]:
        return ""
    middle = row["ms"][side][1]
    return f"{middle:.3g}" if middle < 1000 else f"{middle:.0f}"


def _floor(row: Results, ceilings: dict[str, float]) -> str:
    floor = floor_ms(row, ceilings)
    return f"{100 * floor / row['ms']['ours'][1]:.0f}%" if floor else ""


def _mark(row: Results) -> str:
    return f" {LOSES}" if row["ratio"] and best_peer(row)[1] < 1 else ""


def _peers(rows: list[Results]) -> list[str]:
    return list(dict.fromkeys(side for row in rows for side in row["ms"] if side != "ours"))


def nets_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] in NETS]
    peers = _peers(rows)
    head = ["milliseconds", "dtype", "ours", *peers, "best peer / ours", "floor / ours"]
    lines = []
    for row in rows:
        what = {"alexnet": "inference", "train_step": "training step"}[row["bench"]]
        name, ratio = best_peer(row)
        times = [_time(row, side) for side in ("ours", *peers)]
        ratio_cell = f"{ratio:.2f} ({name})"
        lines.append(
            [f"{what}, {row['case']}{_mark(row)}", row["dtype"], *times, ratio_cell, _floor(row, results["ceilings"])]
        )
    return table(head, lines)


def operators_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] not in OTHERS]
    peers = [name for name in _peers(rows) if name != "eager"]
    head = ["operator", "dtype", "layout", "pass", "ours, ms", "eager / ours [quartiles]"]
    head += [f"{name} / ours" for name in peers] + ["floor / ours"]
    lines = []
    for row in rows:
        low, middle, high = row["ratio"]["eager"]
        others = [f"{row['ratio'][name][1]:.2f}" if name in row["ratio"] else "" for name in peers]
        lines.append(
            [
                *(f"{name_of(row)}{_mark(row)}", row["dtype"], row["layout"], row["pass"], _time(row, "ours")),
                *(f"{middle:.2f} [{low:.2f} {high:.2f}]", *others, _floor(row, results["ceilings"])),
            ]
        )
    return table(head, lines)


def memory_table(results: Results) -> str:
    rows = [row for row in results["rows"] if "saved" in row or "peak" in row]
    sides = ("ours", "eager", "lpips")  # in whatever layout

    def sizes(row: Results, kind: str) -> dict[str, str]:
        return {name.split()[0]: f"{size / 1e6:.1f}" for name, size in row.get(kind, {}).items()}

    columns = [(kind, side) for kind in ("saved", "peak") for side in sides]
    columns = [(kind, side) for kind, side in columns if any(side in sizes(row, kind) for row in rows)]
    head = ["MB", "dtype", "layout", *(f"{kind}: {side}" for kind, side in columns)]
    lines = []
    for row in rows:
        cells = [sizes(row, kind).get(side, "") for kind, side in columns]
        lines.append([name_of(row), row["dtype"], row["layout"], *cells])
    return table(head, lines)


def calls_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] == CALLS]
    head = ["microseconds", "function", "more than its operator", "PyTorch's functions"]
    lines = []
    for row in rows:
        ours, eager = (f"{1e3 * row['ms'][side][1]:.1f}" for side in ("ours", "eager"))
        above = f"{row['above_operator_us']:.1f}" if "above_operator_us" in row else ""
        name = f"`{row['case']}`{row['pass'].removeprefix('forward').replace('+', ' and ')}"
        lines.append([name, ours, above, eager])
    return table(head, lines)


def host_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] == HOST]
    head = ["microseconds", "ours", "nn.Sequential", "ours / nn.Sequential", "convolutions and products"]
    lines = []
    for row in rows:
        ours, eager = (row["host_us"][side] for side in ("ours", "eager"))
        name = f"{name_of(row)}, {row['pass']}"
        lines.append([name, f"{ours:.0f}", f"{eager:.0f}", f"{ours / eager:.2f}", f"{row['bare_us']:.0f}"])
    return table(head, lines)


def fuse_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] == FUSE]
    peers = _peers(rows)
    lines = []
    for row in rows:
        ratios = ["{1:.2f} [{0:.2f} {2:.2f}]".format(*row["ratio"][name]) for name in peers]
        lines.append([f"{row['case']}{_mark(row)}", row["dtype"], *(_time(row, s) for s in ("ours", *peers)), *ratios])
    ratios = [f"{name} / fused [quartiles]" for name in peers]
    return table(["milliseconds", "dtype", "fused", *peers, *ratios], lines)


def feed_table(results: Results) -> str:
    rows = [row for row in results["rows"] if row["bench"] == FEED]
    peers = _peers(rows)
    lines = []
    for row in rows:
        rates = [f"{1e3 * row['images'] / row['ms'][side][1]:.0f}" for side in ("ours", *peers)]
        lines.append([row["case"], *rates, *(f"{row['ratio'][name][1]:.2f}" for name in peers)])
    return table(["images/s", "prepared shards", *peers, *(f"{name} / ours" for name in peers)], lines)


def about(results: Results) -> str:
    machine, ceilings = results["machine"], results["ceilings"]
    versions = ", ".join(f"{name} {value}" for name, value in results["versions"].items())
    text = f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
    text += f", {machine['kernels']} kernels, {machine['memory']}; {versions}; commit {results['commit']}.\n"
    text += f"Measured ceilings: copy {ceilings['copy_gb_s']:g} GB/s, matrix products "
    text += f"{ceilings['float32_tflop_s']:g} TFLOP/s in float32 and {ceilings['bfloat16_tflop_s']:g} in bfloat16.\n"
    for name, reason in results["missing"].items():
        text += f"Left out: {name}: {reason}.\n"
    return text


def performance_text(devices: dict[str, Results], measured: dict[str, parts.Parts] | None = None) -> str:
    """What docs/performance.md has between its markers. ``measured``: by the steps that take little time."""
    texts = []
    for device, results in devices.items():
        shown = picture_data(results)
        pictures = [f"![{PICTURES[kind]} on {device}](performance/{device}-{kind}.png)\n" for kind in shown]
        texts += [f"## {device}\n", about(results), *pictures]
        for title, make, measured_here in TABLES:
            if any(map(measured_here, results["rows"])):  # a file may be of some benchmarks alone
                texts += [f"### {title}\n", make(results)]
    for device, found in (measured or {}).items():
        if device not in devices:
            texts += [f"## {device}\n", f"![{PICTURES['speed']} on {device}](performance/{device}-speed.png)\n"]
        texts += parts.parts_text(found)
    return "\n".join(texts) or NONE


def readme_text(devices: dict[str, Results], measured: dict[str, parts.Parts] | None = None) -> str:
    """README's tables: whole nets alone."""
    texts = []
    for device, results in devices.items():
        if not any(row["bench"] in NETS for row in results["rows"]):
            continue
        texts += [about(results), nets_table(results)]
        texts += [f"{LOSES}: a peer is faster.\n", f"![Speed on {device}](docs/performance/{device}-speed.png)\n"]
    for found in (measured or {}).values():
        texts += [parts.about(found), parts.nets_table(found), parts.marks(found, tuple(parts.NETS))]
    return "\n".join(texts) or NONE


TABLES = (
    ("Nets", nets_table, lambda row: row["bench"] in NETS),
    ("Operators", operators_table, lambda row: row["bench"] not in OTHERS),
    ("Other people's nets, fused", fuse_table, lambda row: row["bench"] == FUSE),
    ("Memory", memory_table, lambda row: "saved" in row or "peak" in row),
    ("Training batches from disk", feed_table, lambda row: row["bench"] == FEED),
    ("Calls on a tiny tensor", calls_table, lambda row: row["bench"] == CALLS),
    ("Host time of a tiny net", host_table, lambda row: row["bench"] == HOST),
)


def between(page: str, text: str) -> str:
    """``page`` with ``text`` between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


# ---- Pictures -------------------------------------------------------------------------------------------------------

PICTURES = {
    "speed": "Time of whole nets",
    "operators": "Speed-up of operators",
    "roofline": "Roofline",
    "memory": "Memory",
}


def picture_data(results: Results) -> dict[str, Any]:
    """What each picture shows; of those that would show nothing there are none."""
    rows, ceilings = results["rows"], results["ceilings"]
    nets = [row for row in rows if row["bench"] in NETS]
    single = [row for row in rows if row["bench"] not in OTHERS]
    data = {
        "speed": [
            [f"{name_of(r)}\n{r['dtype']}", {k: v[1] for k, v in r["ms"].items()}, floor_ms(r, ceilings)] for r in nets
        ],
        "operators": [
            [
                *split_batch(f"{name_of(r)}, {r['dtype']} {r['layout']} {r['pass']}"),
                r["ratio"]["eager"][1],
                r["ms"]["eager"][1] / floor if (floor := floor_ms(r, ceilings)) else None,
            ]
            for r in single
        ],
        "roofline": {
            "ceilings": ceilings,
            "points": [
                [r["bench"], r["dtype"], r["flops"] / r["bytes"], r["flops"] / r["ms"]["ours"][1] / 1e9]
                for r in rows
                if r.get("flops") and r.get("bytes")
            ],
        },
        "memory": [
            [f"{name_of(r)}, {r['dtype']} {r['layout']}", kind, [size / 1e6 for size in r[kind].values()]]
            for r in rows
            for kind in ("saved", "peak")
            if kind in r
        ],
    }
    return {kind: each for kind, each in data.items() if (each["points"] if kind == "roofline" else each)}


def pictures_of(devices: dict[str, Results]) -> dict[str, dict[str, Any]]:
    """The data of each device's pictures."""
    quick = {device: {"speed": parts.speed_data(found)} for device, found in parts.load_parts(RESULTS).items()}
    return quick | {device: picture_data(results) for device, results in devices.items()}


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def draw(pictures: dict[str, Any], folder: Path, device: str) -> None:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for kind, data in pictures.items():
        figure = Figure(layout="constrained")
        DRAW[kind](figure, data)
        figure.suptitle(f"{PICTURES[kind]}: {device}")
        figure.savefig(folder / f"{device}-{kind}.png", dpi=90, metadata={"Software": None, "Data": digest(data)})


def _draw_speed(figure, data) -> None:
    columns = 3
    rows = max(1, -(-len(data) // columns))
    figure.set_size_inches(12, 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, (title, times, floor) in zip(panels, data, strict=False):
        colors = ["tab:orange" if side.startswith("ours") else "tab:blue" for side in times]
        bars = panel.barh(list(times), list(times.values()), color=colors)
        panel.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        panel.axvline(floor, color="black", linestyle="--", linewidth=1, label="floor")
        panel.set_xlim(0, 1.2 * max(times.values()))
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.set_title(f"{title}, ms", fontsize=8)
    for panel in list(panels)[len(data) :]:
        panel.set_axis_off()


def _draw_operators(figure, data) -> None:
    """A panel for each batch; what has none goes with the largest."""
    batches = sorted({batch for _, batch, _, _ in data if batch}) or [0]
    names = list(dict.fromkeys(name for name, *_ in data))
    figure.set_size_inches(6 + 4 * len(batches), 1 + 0.17 * len(names))
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, shown in zip(panels, batches, strict=True):
        for name, batch, ratio, floor in data:
            if (batch or batches[-1]) == shown:
                at = names.index(name)
                panel.barh(at, ratio, color="tab:orange" if ratio >= 1 else "tab:red")
                if floor:
                    panel.plot([floor, floor], [at - 0.4, at + 0.4], color="black", linewidth=1)
        panel.set_yticks(range(len(names)), names)
        panel.axvline(1, color="grey", linewidth=0.5)
        panel.set(xscale="log", xlabel="PyTorch eager's time over ours; black: over the floor")
        panel.set_title(f"batch {shown}" if shown else "", fontsize=8)
        panel.margins(y=0.005)
        panel.tick_params(labelsize=6)
    panels[0].invert_yaxis()


def _draw_roofline(figure, data) -> None:
    figure.set_size_inches(8, 5)
    panel = figure.subplots()
    bandwidth = data["ceilings"]["copy_gb_s"] / 1e3
    for dtype, color in (("float32", "tab:blue"), ("bfloat16", "tab:orange")):
        rate = data["ceilings"][f"{dtype}_tflop_s"]
        knee = rate / bandwidth
        panel.plot([knee / 100, knee, 100 * knee], [rate / 100, rate, rate], color=color, label=f"{dtype} ceiling")
        for bench, marker in (("conv_relu", "o"), ("conv_stage", "s"), ("alexnet", "^"), ("train_step", "v")):
            points = [(x, y) for name, kind, x, y in data["points"] if (name, kind) == (bench, dtype)]
            if points:
                panel.scatter(*zip(*points, strict=True), marker=marker, color=color, s=16, label=f"{bench}, {dtype}")
    panel.set(xscale="log", yscale="log", xlabel="FLOP per byte that has to move", ylabel="TFLOP/s")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def _draw_memory(figure, data) -> None:
    figure.set_size_inches(10, 1 + 0.2 * len(data))
    panel = figure.subplots()
    for offset, side, color in ((-0.2, 0, "tab:orange"), (0.2, 1, "tab:blue")):
        sizes = [sizes[side] for _, _, sizes in data]
        panel.barh(
            [at + offset for at in range(len(data))], sizes, height=0.4, color=color, label=("ours", "eager")[side]
        )
    panel.set_yticks(range(len(data)), [f"{name}, {kind}" for name, kind, _ in data])
    panel.set(xscale="log", xlabel="MB")
    panel.margins(y=0.005)
    panel.invert_yaxis()
    panel.tick_params(labelsize=6)
    panel.legend(fontsize=7)


DRAW = {"speed": _draw_speed, "operators": _draw_operators, "roofline": _draw_roofline, "memory": _draw_memory}


def pages(devices: dict[str, Results], root: Path = ROOT) -> dict[Path, str]:
    """Each rendered page as it has to be."""
    measured = parts.load_parts(RESULTS)
    texts = {
        root / "README.md": readme_text(devices, measured),
        root / "docs" / "performance.md": performance_text(devices, measured),
    }
    return {path: between(path.read_text(), text) for path, text in texts.items()}


def main() -> None:
    devices = load()
    for path, text in pages(devices).items():
        path.write_text(text)
    for device, pictures in pictures_of(devices).items():
        draw(pictures, ROOT / "docs" / "performance", device)


if __name__ == "__main__":
    main()
