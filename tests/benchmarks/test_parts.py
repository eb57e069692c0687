"""Tables of what the short steps measured come from their files, and say where we lose and what has changed since."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import parts, report

HEADER = {"date": "2026-01-01", "machine": {"gpu": "Card", "driver_version": "1"}, "versions": {"torch": "2"}}
HEADER |= {"commit": "abc", "method": "Measured by a test."}
CEILINGS = {"copy_gb_s": 1000.0, "float32_tflop_s": 10.0, "bfloat16_tflop_s": 100.0}
FORM = {"dtype": "bfloat16", "layout": "channels_last"}
NET = FORM | {"bench": "alexnet", "case": "paper, batch 1", "pass": "forward", "backend": "auto"}
NET |= {"us": {"auto": 2000.0, "auto, graph": 1000.0, "eager": 1500.0, "eager, graph": 1200.0}}
NET |= {"bytes": 5e8, "flops": 0}
LRN = FORM | {"bench": "lrn", "case": "96x55x55, batch 2", "pass": "forward", "backend": "cuda", "bytes": 1e6}
LRN |= {"us": {"cuda": 2.0, "copy": 1.0}, "cold": {"cuda": 4.0, "eager": 3.0, "triton": 8.0}}
LAYER = {"operator": "conv_relu", "dtype": "bfloat16", "batch": 2, "channels": 3, "height": 9, "width": 9, "filters": 8}
LAYER |= {"kernel": 3, "stride": 2, "padding": 0, "groups": 1, "lrn": 0, "pool": 0}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of results as a card leaves them."""
    place = tmp_path / "card"
    place.mkdir()

    def lines(name: str, *rows: dict) -> None:
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    host = {"bench": "host", "case": "lrn", "pass": "forward", "us": {"eager": 10.0, "auto": 20.0}}
    lines("quick-20250101.jsonl", HEADER | {"commit": "old"})
    lines("quick-20260101.jsonl", HEADER, {"ceilings": CEILINGS}, NET, LRN, host)
    lines("peers-20260102.jsonl", HEADER, NET | {"us": {"compile": 1100.0}})
    us = {"cuda": 10.0, "cudnn": 4.0, "cudnn_epilogue": 8.0, "eager": 30.0}
    layers = [LAYER | {"candidate": name, "us": time} for name, time in us.items()]
    (place / "layers.json").write_text(json.dumps({"about": {"method": "By a test."}, "rows": layers}))
    rows = [{"bench": ["lrn"], "pass": ["forward"]}, {"bench": ["conv_relu"], "channels": [3]}]
    changed = {"commit": "abc", "changes": [{"what": "LRN.", "rows": rows}]}
    (place / "changed.json").write_text(json.dumps(changed))
    kernel = {"kernel": "k<8>", "grid": "1x1x1", "block": "8x1x1", "us": 3.25, "registers": 40}
    kernel |= {"dram_percent": 51.2, "issue_percent": 20.0, "occupancy_percent": 30.0}
    profile = {"machine": {"commit": "abc"}, "details": {"method": "Measured by ncu.", "kernels": [kernel]}}
    (place / "profile-20260101.json").write_text(json.dumps(profile))
    return tmp_path


def test_floor_and_peers_stand_beside_each_time(folder):
    text = report.performance_text({}, parts.load_parts(folder))
    assert "Card, driver 1; torch 2; commit abc, 2026-01-01. Measured by a test." in text
    # 0.5 GB at 1000 GB/s are half of the graph's 1 ms.
    net = "| bfloat16 | 2 | 1 |  |  | 1.5 | 1.2 | 1.1 | 0.55 (compile) | 1.10 (compile) | 50% |"
    assert f"| inference, paper, batch 1 † {net}" in text.splitlines()
    lrn = "| bfloat16 | channels_last | forward | 2 | 500 | 50% | 4 | 0.75 | 2.00 |"
    assert f"| lrn 96x55x55, batch 2 † ‡ {lrn}" in text.splitlines()
    # cuDNN's convolution alone is no way to compute the layer.
    assert "| conv_relu 3x9x9, 8 of 3x3, stride 2, batch 2 † ‡ | bfloat16 | 10 | 4 | 8 | 30 | 0.80 |" in text
    assert "| lrn, forward † | 20 | 10 | 0.50 |" in text
    assert "| `k<8>` | 1x1x1 | 8x1x1 | 3.25 | 51% | 20% | 30% | 40 |" in text
    assert "‡: changed since, and measured on no GPU as it is now:\n\n- LRN.\n" in text


def test_readme_has_the_nets_and_what_of_them_has_changed(folder):
    text = report.readme_text({}, parts.load_parts(folder))
    assert "inference, paper" in text
    assert "†: a peer is faster." in text
    assert "‡" not in text


def test_peers_of_another_commit_are_not_compared(folder):
    path = folder / "card" / "peers-20260102.jsonl"
    path.write_text(path.read_text().replace("abc", "def"))
    assert "compile" not in report.readme_text({}, parts.load_parts(folder))


def test_what_has_changed_since_another_measurement_is_no_longer_said(folder):
    path = folder / "card" / "changed.json"
    path.write_text(path.read_text().replace("abc", "def"))
    assert parts.CHANGED not in report.performance_text({}, parts.load_parts(folder))


@pytest.mark.parametrize("device", parts.load_parts(report.RESULTS))
def test_each_change_is_of_a_row_that_is_there(device):
    """A mistyped name would leave rows unmarked."""
    found = parts.load_parts(report.RESULTS)[device]
    rows = [*found["rows"]]
    rows += [{"kernel": kernel["kernel"].split("<")[0]} for kernel in found["profile"]["details"]["kernels"]]
    rows += [{"bench": row["operator"], **{n: row[n] for n in ("channels", "lrn")}} for row in found["layers"]["rows"]]
    for change in parts.changes(found):
        for each in change["rows"]:
            assert any(parts.concerns({"rows": [each]}, row) for row in rows), each
