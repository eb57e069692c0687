"""benchmarks.quick from beginning to end, on the CPU with a CPU's clock and at tiny sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from time import perf_counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alexnet_fast import AlexNet, tuning
from alexnet_fast.ops.registry import NATIVE
from benchmarks import bench_alexnet, bench_train_step, machine, peers, profile, quick, quick_rows, results
from benchmarks.quick import SECTIONS
from benchmarks.quick_rows import Place
from benchmarks.tables import PASSES, quick_table
from tests.ops.calls import Calls

CEILINGS = {"copy_gb_s": 3000.0, "float32_tflop_s": 50.0, "bfloat16_tflop_s": 780.0}


class Clock:
    """gpu.Clock's methods, without a card."""

    rotation = 1

    def cold(self, call) -> float:
        begin = perf_counter()
        call()
        return perf_counter() - begin

    warm = cold

    def captured(self, call):
        return call

    def synchronize(self) -> None:
        pass


@cache
def small_net(variant: str) -> AlexNet:
    net = AlexNet(variant=variant)
    for number, sides in ((1, (9216, 8)), (4, (8, 8)), (6, (8, 1000))):
        net.classifier[number] = nn.Linear(*sides)
    return net


def without_switch(operator) -> Callable:
    """What takes the arguments of Hopper's operator, which is told of TF32, for ``operator``."""
    count = len(operator._schema.arguments)
    return lambda *arguments: operator(*arguments[:count])


@pytest.fixture
def place(monkeypatch) -> Iterator[Place]:
    """A CPU in a card's place: oneDNN for every kind of convolution, and some of the cases, of few pixels."""
    for name, value in {"SECONDS": 0, "ROUNDS": (1, 1), "REPLAYS": 1, "CALLS": 1}.items():
        monkeypatch.setattr(quick_rows, name, value)
    monkeypatch.setattr(quick, "VARIANTS", ("torchvision",))
    for name, chosen in {"POINTWISE": (0, 2, 5, 7), "CONVOLUTIONS": (0, 6), "STAGES": (0, 4)}.items():
        few = [getattr(quick, name)[number] for number in chosen]
        monkeypatch.setattr(quick, name, [replace(sample, input=(1, sample.input[1], 19, 19)) for sample in few])
    monkeypatch.setattr(quick, "FORMS", quick.FORMS[1:])
    monkeypatch.setattr(quick, "HOST", quick.HOST[-1:])
    monkeypatch.setattr(quick_rows, "family", lambda name: NATIVE)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *arguments: F.relu(F.conv2d(*arguments)))
    for stem, candidates in quick_rows.CANDIDATES.items():
        monkeypatch.setitem(candidates, "triton", candidates[tuning.LIBRARY[stem]])
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "compile", lambda net, mode: net)
    monkeypatch.setattr(peers, "compiled", lambda net, x: lambda: net(x))
    monkeypatch.setattr(machine, "ceilings", lambda: CEILINGS)
    for module in (bench_alexnet, bench_train_step):
        monkeypatch.setattr(module, "net_of", small_net)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.library._scoped_library("alexnet_fast", "IMPL") as library:
        for name in ("conv_relu", "conv_relu_backward", "conv_stage"):
            operator = getattr(NATIVE, name)
            library.impl(f"{name}_cuda", operator, "CPU")
            library.impl(f"{name}_sm90", without_switch(operator), "CPU")
        library.impl("linear_relu_cuda", NATIVE.linear_relu, "CPU")
        yield Place(Clock(), "cpu", "cpu", batches=(2,), net_batches=(1,))
    torch.set_num_threads(before)


def test_every_section_runs(place, tmp_path):
    path = tmp_path / "quick.jsonl"
    last = quick.measure(path, place, list(SECTIONS), 600)
    found = results.load_lines(path)
    assert [row for row in found["rows"] if "failed" in row] == []
    assert (last["failed"], last["left_out"], found["left_out"]) == (0, {}, {})
    assert found["ceilings"] == CEILINGS
    us: dict[str, dict] = {}
    for row in results.merged(found["rows"]):
        us.setdefault(row["bench"], {}).update(row["us"])
        assert all(time > 0 for time in row["us"].values())
    assert set(us["lrn"]) == {"cpu", "copy", "eager", "triton"}
    candidates = {stem: {name for name in calls if ":" not in name} for stem, calls in quick_rows.CANDIDATES.items()}
    assert set(us["conv_relu"]) == {*candidates["conv_relu"], "eager", "cudnn"}
    assert set(us["conv_stage"]) == {*candidates["conv_stage"], "eager"}
    assert set(us["linear_relu"]) == {"eager", "cublas", "cuda"}
    assert set(us["conv_backward_weight"]) == candidates["conv_backward_weight"]
    plain = {"eager", "auto", "cpu"}
    assert set(us["alexnet"]) == {*plain, *(f"{side}, graph" for side in plain), "compile"}
    assert set(us["train_step"]) == {"eager", "auto", "compile"}
    assert set(us["host"]) == {"eager", "auto"}
    layers = json.loads((tmp_path / "layers.json").read_text())
    shipped = json.loads((machine.ROOT / "benchmarks/results/nvidia-h100-80gb-hbm3/layers.json").read_text())
    assert layers["rows"][0].keys() == shipped["rows"][0].keys()
    assert layers["about"].keys() == shipped["about"].keys()


def test_one_call_of_each_kernel(place):
    with Calls() as seen:
        profile.one_call_of_each(place)
    names = [operator._opname for operator, _ in seen.calls]
    assert {"lrn", "lrn_backward", "max_pool", "max_pool_backward", "epilogue", "epilogue_backward"} <= set(names)
    assert {"conv_relu_cuda", "conv_relu_backward_cuda", "conv_stage_cuda"} <= set(names)


@pytest.fixture
def one_case(place, monkeypatch):
    """install(section=row, …): SECTIONS of one case each, which gives ``row`` or raises it."""

    def install(**rows: dict | Exception) -> None:
        def run(row):
            if isinstance(row, Exception):
                raise row
            yield row

        def section(name: str):
            return lambda _: iter([(f"case of {name}", lambda: run(rows[name]))])

        monkeypatch.setattr(quick, "SECTIONS", {name: section(name) for name in rows})

    return install


ROW = {"bench": "lrn", "case": "c, batch 2", "dtype": "float32", "layout": "contiguous", "pass": "forward"}


def test_a_case_that_fails_is_named_and_the_rest_goes_on(place, one_case, tmp_path):
    one_case(a=RuntimeError("CUDA error: invalid argument\nmore"), b=ROW | {"us": {"cuda": 2.0, "copy": 1.0}})
    last = quick.measure(tmp_path / "q.jsonl", place, ["a", "b"], 600)
    assert (last["rows"], last["failed"]) == (2, 1)
    found = results.load_lines(tmp_path / "q.jsonl")
    assert found["rows"][0]["failed"] == {"": "RuntimeError: CUDA error: invalid argument"}
    table = quick_table(found)
    assert "  case of a : RuntimeError: CUDA error: invalid argument" in table
    assert "lrn c float NCHW" in table[2]
    assert "2 50%" in table[2]


def test_a_spent_budget_says_what_it_left_out(place, one_case, tmp_path):
    one_case(a=ROW | {"us": {"cuda": 2.0}}, layers=ROW | {"us": {}})
    quick.measure(tmp_path / "q.jsonl", place, ["a", "layers"], 0)
    found = results.load_lines(tmp_path / "q.jsonl")
    assert found["rows"] == []
    assert found["left_out"] == {"a": ["case of a"], "layers": ["case of layers"]}
    assert quick_table(found)[-1] == "left out: 1 of a, 1 of layers"
    assert not (tmp_path / "layers.json").exists()


LAYER = ROW | {"bench": "conv_relu", "layer": {"batch": 2}, "us": {"cuda": 2.0}}


NOTHING = {"us": {}, "failed": {"cuda_sm90": "no kernel image"}}


@pytest.mark.parametrize("broken", [RuntimeError("illegal access"), LAYER | NOTHING | {"pass": "backward"}, None])
def test_layers_are_replaced_by_whole_runs_alone(broken, place, one_case, tmp_path):
    """A failed side of a case whose other sides were measured does not spoil the case."""
    one_case(layers=LAYER, gradients=broken or LAYER, sm90=LAYER | NOTHING)
    quick.measure(tmp_path / "q.jsonl", place, ["layers", "gradients", "sm90"], 600)
    assert (tmp_path / "layers.json").exists() == (broken is None)


def test_a_side_with_another_result_is_not_timed():
    sides = {"eager": lambda: torch.ones(2, 3), "same": lambda: torch.ones(2, 3), "other": lambda: torch.zeros(2, 3)}

    def breaks() -> None:
        raise RuntimeError("no kernel image")

    found = quick_rows.raced(Clock(), sides | {"broken": breaks})
    assert list(found["us"]) == ["eager", "same"]
    assert found["failed"] == {"other": "gives another result", "broken": "RuntimeError: no kernel image"}


def test_a_file_that_was_broken_off_counts_until_there(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"commit": "abc"}) + "\n" + json.dumps(ROW) + "\n" + json.dumps(ROW)[:20])
    assert results.load_lines(path) == {"commit": "abc", "rows": [ROW]}


def test_the_table_of_all_cases_fits_a_screen():
    """All cases that run on a card, not the few of these tests."""
    rows, us = [], {"us": {"cuda": 1.0, "copy": 1.0, "cudnn": 1.0, "auto": 1.0}}
    gradients = ("conv_backward_input", "conv_backward_weight")
    for batch in (128, 1024):
        for (dtype, layout), sample, what in product(quick.FORMS, quick.POINTWISE, PASSES):
            rows.append(quick_rows.labels(sample.stem, sample, batch, what, dtype, layout) | us)
        for sample in [*quick.CONVOLUTIONS, *quick.STAGES]:
            rows.append(quick_rows.labels(sample.stem, sample, batch, "forward") | us)
        for sample, bench in product(quick.CONVOLUTIONS, gradients):
            rows.append(quick_rows.labels(bench, sample, batch, "backward") | us)
    for variant in quick.VARIANTS:
        for batch in quick_rows.GPU_BATCHES:
            rows.append(quick_rows.labels_of(variant, batch, quick_rows.HALF) | us)
        for batch in (128, 1024):
            rows.append(quick_rows.labels_of(variant, batch, quick_rows.HALF) | quick_rows.LABELS | us)
    for case in [*(sample.stem for sample in quick.HOST), "torchvision net, batch 1", "tiny net", "tiny net too"]:
        rows.append({"bench": "host", "case": case, "pass": "forward", "us": {"eager": 1.0, "auto": 1.0}})
    failed = [{"bench": "lrn", "case": str(n), "failed": {"cuda": "why"}} for n in range(9)]
    left_out = {section: ["a case"] for section in SECTIONS}
    table = quick_table({"rows": rows + failed, "ceilings": CEILINGS, "left_out": left_out})
    assert len(table) <= 60
    assert max(map(len, table)) <= 160
    assert sum("lrn after conv1" in line for line in table) == len(quick.FORMS)


def test_it_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert quick.main(["x.jsonl"]) == 2
    assert capsys.readouterr().err.startswith("quick: torch")
    with pytest.raises(SystemExit):
        quick.main(["x.jsonl", "layer"])
    assert "no section is called 'layer'; there are ceilings, pointwise" in capsys.readouterr().err
