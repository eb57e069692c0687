"""Tables and pictures come from the results' files alone, and those in the repository are of the committed files."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from benchmarks import machine, report, results, tables, timing

DEVICES = report.load()
CEILINGS = {"copy_gb_s": 10.0, "float32_tflop_s": 0.1, "bfloat16_tflop_s": 0.2}


def row(bench: str, case: str, ours: float, peer: float, **more) -> dict:
    times = {"ours": [ours / 1e3] * 5, "eager": [peer / 1e3] * 5}
    labels = {"bench": bench, "case": case, "dtype": "float32", "layout": "contiguous", "pass": "forward"}
    labels["backend"] = more.pop("backend", "cpu")
    return labels | results.timed(times) | more


@pytest.fixture
def measured() -> dict:
    rows = [
        row("lrn", "after conv1", 1.0, 12.0, bytes=5_000_000, flops=0),
        row("conv_relu", "conv3", 4.0, 3.0, bytes=1000, flops=200_000_000, saved={"ours": 3e6, "eager": 9e6}),
        row("overhead", "lrn", 0.01, 0.02, above_operator_us=4.5),
        row("host", "8 channels", 1.0, 0.6, bare_us=480.0, host_us={"ours": 520.0, "eager": 130.0}),
        row("fuse", "vgg11, batch 8", 2.0, 1.9),
        row("data", "512 photographs", 100.0, 400.0, images=512),
        row("alexnet", "paper, batch 32", 5.0, 20.0, bytes=10_000_000, flops=100_000_000),
    ]
    about = {"processor": "P", "cores": 2, "threads": 2, "kernels": "avx2", "memory": "freed memory is kept"}
    header = {"machine": about, "versions": {"torch": "2"}, "commit": "abc", "ceilings": CEILINGS}
    return {**header, "missing": {"OpenVINO": "not installed"}, "rows": rows}


@pytest.mark.parametrize("page", report.pages(DEVICES), ids=lambda path: path.name)
def test_pages_are_those_of_the_results(page):
    assert page.read_text() == report.pages(DEVICES)[page]


@pytest.mark.parametrize(("device", "pictures"), report.pictures_of(DEVICES).items())
def test_pictures_are_those_of_the_results(device, pictures):
    for kind, data in pictures.items():
        with Image.open(report.ROOT / "docs" / "performance" / f"{device}-{kind}.png") as picture:
            assert picture.text["Data"] == report.digest(data), kind


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_small_and_of_a_commit(device):
    assert (report.RESULTS / device / "results.json").stat().st_size < 200_000
    assert not DEVICES[device]["commit"].endswith("+")


def test_the_floor_is_the_slower_of_bytes_and_flops(measured):
    lrn, conv, *_ = measured["rows"]
    assert tables.floor_ms(lrn, CEILINGS) == pytest.approx(0.5)  # 5 MB at 10 GB/s
    assert tables.floor_ms(conv, CEILINGS) == pytest.approx(2.0)  # 0.2 GFLOP at 0.1 TFLOP/s


def test_rows_where_a_peer_is_faster_stay_and_are_marked(measured):
    operators = report.operators_table(measured).splitlines()[2:]
    assert [tables.LOSES in line for line in operators] == [False, True]
    assert "| 12.00 [12.00 12.00] | 50% |" in operators[0]
    assert "| 0.75 [0.75 0.75] | 50% |" in operators[1]
    assert tables.LOSES not in report.nets_table(measured)
    printed = [line for line in tables.comparison(measured) if tables.LOSES in line]
    slower = ("conv_relu conv3", "host 8 channels", "fuse vgg11, batch 8")
    assert printed[1:] == [f"{name} float32 contiguous forward †" for name in slower]  # the first explains the mark


def test_what_is_left_out_is_said(measured):
    for text in (report.performance_text({"p": measured}), report.readme_text({"p": measured})):
        assert "Left out: OpenVINO: not installed." in text
        assert "P, 2 cores, 2 threads" in text
    text = report.performance_text({"p": measured})
    assert "| `lrn` | 10.0 | 4.5 | 20.0 |" in text
    assert "| host 8 channels, forward | 520 | 130 | 4.00 | 480 |" in text
    assert "| vgg11, batch 8 † | float32 | 2 | 1.9 | 0.95 [0.95 0.95] |" in text
    assert "| 512 photographs | 5120 | 1280 | 4.00 |" in text


def test_a_file_of_some_benchmarks_has_no_empty_tables(measured):
    measured["rows"] = [row for row in measured["rows"] if row["bench"] == "host"]
    text = report.performance_text({"p": measured})
    assert [line for line in text.splitlines() if line.startswith("###")] == ["### Host time of a tiny net"]
    assert ".png" not in text
    assert report.readme_text({"p": measured}) == report.NONE
    assert report.picture_data(measured) == {}


def test_a_page_keeps_what_is_outside_its_markers():
    page = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    once = report.between(page, "new\n")
    assert once == f"a\n{report.BEGIN}\n\nnew\n\n{report.END}\nb\n"
    assert report.between(once, "new\n") == once


def test_pictures_carry_their_data(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra demo brings it")
    report.draw(report.picture_data(measured), tmp_path, "p")
    for kind, data in report.picture_data(measured).items():
        with Image.open(tmp_path / f"p-{kind}.png") as picture:
            assert picture.text["Data"] == report.digest(data)
    measured["rows"][0]["ms"]["ours"][1] = 2.0
    assert report.digest(report.picture_data(measured)) != report.digest(report.picture_data({**measured, "rows": []}))


def test_a_row_of_each_batch_has_a_place_in_the_picture():
    assert report.split_batch("lrn after conv1, 96x55x55, batch 32, float32") == (
        "lrn after conv1, 96x55x55, float32",
        32,
    )
    assert report.split_batch("sgd 61 million parameters") == ("sgd 61 million parameters", 0)


class Clock:
    """Stands for pytest-benchmark's fixture as interleave() uses it, with a clock that each call of a side advances."""

    disabled, time = False, 0.0

    def pedantic(self, target, setup, rounds):
        for _ in range(rounds):
            setup()
            target()

    def side(self, rested: float, again: float):
        """A call that takes ``rested`` seconds after a sleep and ``again`` seconds otherwise."""

        def call():
            self.time += rested if self.slept else again
            self.slept = False

        return call

    def sleep(self, seconds: float):
        self.time += seconds
        self.slept = True


def test_short_calls_are_timed_after_one_from_rest_and_long_ones_from_rest(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", lambda: clock.time)
    monkeypatch.setattr(timing, "sleep", clock.sleep)
    sides = {"ours": clock.side(0.003, 0.001), "eager": clock.side(0.004, 0.002), "slow": clock.side(0.5, 0.1)}
    times, rested = timing.interleave(clock, sides, "cpu", seconds=9, least=4)
    assert {name: len(entries) for name, entries in times.items()} == dict.fromkeys(sides, len(rested["ours"]))
    assert {name: pytest.approx(sum(entries) / len(entries)) for name, entries in times.items()} == {
        "ours": 0.001,
        "eager": 0.002,
        "slow": 0.5,
    }
    assert {name: pytest.approx(entries[0]) for name, entries in rested.items()} == {
        "ours": 0.003,
        "eager": 0.004,
        "slow": 0.5,
    }


def test_ratios_are_of_medians_and_their_spread_of_rounds():
    timed = results.timed({"ours": [1.0, 2.0, 3.0, 4.0], "peer": [2.0, 2.0, 6.0, 40.0]})
    assert timed["ms"]["ours"] == [1250, 2500, 3750]
    low, middle, high = timed["ratio"]["peer"]
    assert middle == 1.6  # 4 / 2.5
    assert (low, high) == (1.25, 8.0)  # of 2, 1, 2, 10


def test_a_file_collects_runs_of_one_commit(measured, tmp_path):
    path = tmp_path / "p" / "results.json"
    header = {name: measured[name] for name in ("machine", "versions", "commit", "ceilings")}
    results.write(path, header, measured["rows"][:2], {"JAX": "no GPU"})
    again = row("lrn", "after conv1", 2.0, 12.0)
    results.write(path, {**header, "ceilings": {}}, [again], measured["missing"])
    stored = json.loads(path.read_text())
    assert stored["rows"] == [again, measured["rows"][1]]
    assert stored["missing"] == {"JAX": "no GPU", "OpenVINO": "not installed"}
    assert stored["ceilings"] == CEILINGS
    on_gpus = [row("lrn", "after conv1", 1.0, 2.0, backend=name) for name in ("cuda", "triton")]
    results.write(path, {**header, "commit": "def"}, on_gpus, {})
    assert json.loads(path.read_text())["rows"] == on_gpus


def test_the_machine_is_named():
    about, found = machine.facts(), machine.versions()
    assert about["cores"] >= 1
    assert set(found) >= {"python", "torch"}
    assert machine.folder({"processor": "AMD EPYC 9575F", "cores": 2}) == "amd-epyc-9575f-2-cores"
    assert machine.folder({**about, "gpu": "NVIDIA H200"}) == "nvidia-h200"
