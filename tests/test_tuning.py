"""Which convolution ``auto`` takes on a GPU, as far as a machine without one can tell: the shipped table against the
rows that were measured; measuring, keeping and refusing with candidates and a clock of the tests' own."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from alexnet_fast import FusedSequential, backends, bench, cli, fuse, ops, tuning
from alexnet_fast.ops import Pool
from alexnet_fast.ops.registry import NATIVE
from alexnet_fast.parallel import Ranks, launch
from alexnet_fast.train import checkpoint, commands
from alexnet_fast.train.config import TrainConfig, resolve
from alexnet_fast.train.engine import agreed
from alexnet_fast.tuning import LIBRARY, Form, Record
from benchmarks import choices
from tests.train import runs

FILES = sorted(choices.RESULTS.glob("*/layers.json"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and nothing chosen yet."""
    monkeypatch.setenv("ALEXNET_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_told", set())
    tuning.forget()
    yield tmp_path / "cache"
    tuning.forget()


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


# ---- The shipped table -----------------------------------------------------------------------------------------------


def form_of(shape: dict, **other) -> Form:
    shape = {**shape, **other}
    pairs = [(shape[name],) * 2 for name in ("stride", "padding")]
    x = shape["batch"], shape["channels"], shape["height"], shape["width"]
    weight = shape["filters"], shape["channels"] // shape["groups"], shape["kernel"], shape["kernel"]
    pool = (shape["pool"],) * 2
    dtype = getattr(torch, shape["dtype"])
    operator, groups, lrn = shape["operator"], shape["groups"], shape["lrn"]
    return Form(operator, dtype, x, weight, *pairs, (1, 1), groups, "channels_last", lrn, pool)


SHAPES = [
    pytest.param(path, name, id=f"{path.parent.name}, {form_of(dict(name))}")
    for path in FILES
    for name in choices.measured(path)
]


def test_the_table_is_what_its_script_makes():
    assert tuning.TABLE.read_text() == choices.text()


@pytest.mark.parametrize(("path", "name"), SHAPES)
def test_auto_takes_the_fastest_that_was_measured(path, name):
    """Or one within 5% of it, for every shape of every results file. Where it takes one that was not measured for the
    shape, that one's inferred time is less than the fastest measured, by the margin that the script asks for."""
    device = json.loads(path.read_text())["about"]["device"]
    times = choices.all_times(path)[name]
    fastest = min(time for time, how in times.values() if how == "measured")
    time, how = times[tuning.shipped(form_of(dict(name)), device)]
    assert time <= 1.05 * fastest if how == "measured" else time * choices.MARGINS[how] <= fastest


def shapes(operator: str) -> list[dict]:
    return [dict(name) for path in FILES for name in choices.measured(path) if dict(name)["operator"] == operator]


def test_fused_bias_and_relu_are_cudnns_without_groups_and_never_with():
    answers = {True: set(), False: set()}
    for shape in shapes("conv_relu"):
        if shape["channels"] > 3:
            for batch in (1, 32, shape["batch"]):
                answers[shape["groups"] > 1].add(tuning.shipped(form_of(shape, batch=batch)))
    assert answers[False] == {"cudnn_bias_relu"}
    assert "cudnn_bias_relu" not in answers[True]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("operator", LIBRARY)
def test_small_batches_are_the_librarys(operator, batch):
    """No small batch was measured, and blocks of few images leave a part of the card idle."""
    assert all(tuning.shipped(form_of(shape, batch=batch)).startswith("cudnn") for shape in shapes(operator))


def test_the_first_layer_at_its_batches():
    first = [shape for shape in shapes("conv_stage") if shape["channels"] == 3]
    answers = {(s["batch"], s["filters"]): tuning.shipped(form_of(s)) for s in first}
    assert answers == {(128, 64): "cuda_epilogue", (128, 96): "cuda_epilogue", (1024, 64): "cuda", (1024, 96): "cuda"}
    assert {tuning.shipped(form_of(s, batch=4096)) for s in first} == {"cuda"}


def test_what_is_far_from_all_rows_is_the_librarys():
    shape = {"operator": "conv_relu", "dtype": "bfloat16", "batch": 128, "lrn": 0, "pool": 0, "groups": 1}
    conv1 = {"channels": 3, "height": 200, "width": 200, "filters": 80, "kernel": 9, "stride": 4, "padding": 2}
    vgg = {**conv1, "filters": 64, "kernel": 3, "stride": 1, "padding": 1}
    depthwise = {**vgg, "channels": 256, "filters": 256, "height": 14, "width": 14, "groups": 256}
    answers = [tuning.shipped(form_of(shape | layer)) for layer in (conv1, vgg, depthwise)]
    assert answers == ["cuda", "cudnn_epilogue", "cudnn_epilogue"]


def test_half_precision_is_as_bfloat16_and_float32_as_nothing_measured():
    for shape in [shape for operator in LIBRARY for shape in shapes(operator)]:
        assert tuning.shipped(form_of(shape, dtype="float16")) == tuning.shipped(form_of(shape))
        assert tuning.shipped(form_of(shape, dtype="float32")) == LIBRARY[shape["operator"]]


def test_a_devices_own_rows_come_first(monkeypatch):
    form, rows = form_of(shapes("conv_relu")[0], batch=300), tuning.table()
    own = [row._replace(device="another", candidate="triton") for row in rows if row.work.sizes[0] == 10]
    monkeypatch.setattr(tuning, "table", lambda: (*rows, *own))
    assert tuning.shipped(form, rows[0].device) == tuning.shipped(form) == "cuda"
    assert tuning.shipped(form, "another") == "triton"


# ---- Measuring -------------------------------------------------------------------------------------------------------


class Race:
    """Candidates that double their input and take what ``us`` says on the fake clock; ``results`` of some differ."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, us: dict[str, float], results: dict | None = None):
        self.us, self.calls, self.clocked = us, [], 0
        results = results or {}
        self.candidates = {name: self.candidate(name, results.get(name, lambda x: 2 * x)) for name in us}
        monkeypatch.setattr(tuning, "clock", self.clock)

    def candidate(self, name, result):
        def call(x, *_rest):
            self.calls.append(name)
            return result(x)

        return call

    def clock(self, call, device) -> float:
        self.clocked += 1
        call()
        # One round in which all is slow, as when something else runs on the machine: medians do not see it.
        return self.us[self.calls[-1]] * (100 if self.clocked <= len(self.us) else 1)

    def form(self, x: torch.Tensor, batch: int = 2) -> Form:
        ones = (1, 1)
        return Form("conv_relu", x.dtype, (batch, *x.shape[1:]), (4, 3, 3, 3), ones, ones, ones, 1, "contiguous")

    def run(self, batch: int = 2, dtype: torch.dtype = torch.float32, x: torch.Tensor | None = None):
        x = torch.rand(2, 3, 8, 8, dtype=dtype) if x is None else x
        self.calls.clear()
        assert tuning.run(self.form(x, batch), self.candidates, (x,)) is not None
        return self.calls[-1]


def test_the_first_call_of_a_shape_measures_and_keeps_the_winner(benchmark, monkeypatch, folder):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20, "cudnn_bias_relu": 30})
    assert race.run() == "cuda"
    assert race.clocked == 3 * tuning.ROUNDS
    assert race.run() == "cuda"
    assert race.calls == ["cuda"]
    assert race.run(batch=3) == "cuda"
    assert race.clocked == 6 * tuning.ROUNDS
    tuning.forget()  # as another process, whose clock would say otherwise
    other = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 90, "cudnn_bias_relu": 30})
    assert [other.run(), other.run(batch=3)] == ["cuda", "cuda"]
    assert other.clocked == 0
    (file,) = folder.iterdir()
    record = json.loads(file.read_text())
    assert record["about"] == tuning.about(CPU)
    assert [kept["us"]["cuda"] for kept in record["choices"].values()] == [20, 20]


def test_without_the_switch_nothing_is_measured(monkeypatch, folder):
    """And what was measured with it does not count."""
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    assert race.run() == "cudnn_epilogue"
    assert race.clocked == 0
    assert not folder.exists()
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        assert race.run() == "cuda"
    assert race.run() == "cudnn_epilogue"


WRONG = {
    "a value": (lambda x: 2 * x + (torch.arange(x.numel()).view(x.shape) == 7), "differs from cuDNN's by 0."),
    "NaN": (lambda x: torch.where(x == x[0, 0, 0, 0], torch.nan, 2 * x), "differs from cuDNN's by nan"),
    "its dtype": (lambda x: (2 * x).half(), "its results are"),
    "its failure": (lambda x: torch.mm(x[0, 0], x[0, 0, :3]), "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_candidate_that_is_wrong_is_never_taken_and_named_once(what, benchmark, monkeypatch):
    result, message = WRONG[what]
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20, "triton": 1}, {"cuda": result})
    x = torch.rand(2, 3, 8, 8) + 0.5
    with pytest.warns(RuntimeWarning, match=f"cuda is not taken.*{message}") as seen:
        assert [race.run(x=x), race.run(x=x)] == ["cudnn_epilogue"] * 2
    assert len(seen) == 1
    monkeypatch.setattr(tuning, "shipped", lambda form, device: "cuda")
    monkeypatch.setattr(tuning, "_capturing", lambda device: True)
    assert race.run(batch=5) == "cudnn_epilogue", "of another shape, by the table"
    tuning.forget()  # as another process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert race.run() == "cudnn_epilogue", "the file remembers"
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        assert race.run(batch=6) == "cudnn_epilogue", "for calls that measure nothing too"


@pytest.mark.parametrize("dtype", tuning.TOLERANCES)
def test_rounding_is_no_difference(dtype, benchmark, monkeypatch):
    step = torch.finfo(dtype).eps
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20}, {"cuda": lambda x: 2 * x * (1 + 2 * step)})
    assert race.run(dtype=dtype) == "cuda"


def test_a_poolings_winners_may_differ_where_values_tie_but_not_all_over():
    code = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    few, many = code.clone(), code.clone()
    few[0, 0], many[0] = 1, 1
    y = torch.rand(2, 4, 8, 8)
    assert tuning._differs(lambda: (y, few), (), (y, code), 0) == ""
    assert tuning._differs(lambda: (y, many), (), (y, code), 0).startswith("50% of its pooling's winners are others")


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_data_that_tell_nothing_measure_nothing(value, benchmark, monkeypatch, folder):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    assert race.run(x=torch.full((2, 3, 8, 8), value)) == "cudnn_epilogue"
    assert race.clocked == 0
    assert not folder.exists()


def test_memory_that_does_not_suffice_is_no_fault(benchmark, monkeypatch):
    def greedy(x):
        raise torch.OutOfMemoryError("out of memory")

    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20, "triton": 10}, {"cuda": greedy})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert race.run() == "cudnn_epilogue"
        monkeypatch.setattr(tuning, "shipped", lambda form, device: "cuda")
        monkeypatch.setattr(tuning, "_capturing", lambda device: True)
        assert tuning.choose(race.form(torch.rand(2, 3, 8, 8), 5), race.candidates, (torch.rand(1),)) == "cuda"


def test_a_capture_takes_the_table_and_says_nothing(benchmark, monkeypatch):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20, "cudnn_bias_relu": 90})
    monkeypatch.setattr(tuning, "_capturing", lambda device: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert race.run() == "cudnn_epilogue"
        monkeypatch.setattr(tuning, "shipped", lambda form, device: "cuda")
        assert race.run() == "cuda"
        # Whether it keeps NaN is tried on one image, and a capture cannot wait for the answer.
        monkeypatch.setattr(tuning, "shipped", lambda form, device: "cudnn_bias_relu")
        assert race.run() == "cudnn_epilogue"
    assert race.clocked == 0
    monkeypatch.setattr(tuning, "_capturing", lambda device: False)
    assert race.run() == "cuda"
    assert race.clocked == 3 * tuning.ROUNDS


def test_a_relu_that_makes_numbers_of_nan_is_not_taken(monkeypatch):
    """By the table or by measuring; it is no fault that the user has to hear of."""
    results = {"cudnn_bias_relu": lambda x: (2 * x).nan_to_num()}
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cudnn_bias_relu": 20}, results)
    monkeypatch.setattr(tuning, "shipped", lambda form, device: "cudnn_bias_relu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert race.run() == "cudnn_epilogue"
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        assert race.run() == "cudnn_epilogue"


def test_fused_bias_and_relu_are_asked_where_they_can_be(monkeypatch):
    """Of one that keeps NaN: never with groups, nor where results must be deterministic, as torch calls it without, nor
    beyond 32-bit offsets, nor without cuDNN."""
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cudnn_bias_relu": 20})
    monkeypatch.setattr(tuning, "shipped", lambda form, device: "cudnn_bias_relu")
    assert race.run() == "cudnn_bias_relu"
    form = race.form(torch.rand(2, 3, 8, 8))
    for other in (form._replace(groups=3), form._replace(deterministic=True), form._replace(x=(2**31, 3, 8, 8))):
        assert tuning.choose(other, race.candidates, (torch.rand(1),)) == "cudnn_epilogue"
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    assert race.run() == "cudnn_epilogue"


def test_triton_compiles_only_while_the_command_tunes(benchmark, monkeypatch):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "triton": 20})
    assert race.run() == "cudnn_epilogue"
    heard = []
    with tuning.watched(lambda form, record: heard.append(record)):
        assert race.run(batch=3) == "triton"
    assert heard == [Record("triton", "measured", {"cudnn_epilogue": 50, "triton": 20}, {})]
    assert race.run(batch=3) == "triton"


# ---- Kernels of one architecture, and tiles --------------------------------------------------------------------------


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is of compute capability 9.0."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))


def refuses(x):
    raise RuntimeError("conv_relu_sm90: operation not supported")


def test_hoppers_kernels_are_taken_where_they_were_measured_alone(hopper, monkeypatch):
    """And the shipped table has no row of them: nobody has measured any."""
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda_sm90": 20})
    assert race.run(dtype=torch.bfloat16) == "cudnn_epilogue"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert race.run(dtype=torch.bfloat16) == "cuda_sm90"
    assert not any("sm90" in row.candidate for row in tuning.table())
    assert race.run(dtype=torch.float32) == "cudnn_epilogue"
    assert "cuda_sm90" not in race.calls


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_cards_never_reach_hoppers_kernels(capability, benchmark, monkeypatch):
    """Measured, by the table, or by a pin from another machine."""
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda_sm90": 20}, {"cuda_sm90": refuses})
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    half = partial(race.run, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert half() == "cudnn_epilogue"
        with tuning.pinned({str(race.form(torch.rand(2, 3, 8, 8).bfloat16())): "cuda_sm90"}):
            assert half() == "cudnn_epilogue"
        monkeypatch.setattr(tuning, "shipped", lambda form, device: "cuda_sm90")
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        assert half() == "cudnn_epilogue"
    assert list(tuning.measured(CPU).values()) == [Record("cudnn_epilogue", "measured", {"cudnn_epilogue": 50}, {})]


def test_a_shape_that_is_not_covered_speaks_against_no_other(hopper, benchmark, monkeypatch):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda_sm90": 20})
    covering, race.candidates["cuda_sm90"] = race.candidates["cuda_sm90"], refuses
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert race.run(dtype=torch.bfloat16) == "cudnn_epilogue"
        race.candidates["cuda_sm90"] = covering
        assert race.run(batch=3, dtype=torch.bfloat16) == "cuda_sm90"
    assert [one.refused for one in tuning.measured(CPU).values()] == [{"cuda_sm90": tuning.NOT_COVERED}, {}]


def test_hoppers_kernel_that_is_wrong_is_taken_for_no_shape(hopper, benchmark, monkeypatch):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda_sm90": 20}, {"cuda_sm90": lambda x: 2 * x.roll(1, 3)})
    half = partial(race.run, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match="cuda_sm90 is not taken.*differs from cuDNN's"):
        assert half() == "cudnn_epilogue"
    with tuning.pinned({str(race.form(torch.rand(2, 3, 8, 8).bfloat16(), 5)): "cuda_sm90"}):
        assert half(batch=5) == "cudnn_epilogue"


@pytest.mark.parametrize(
    ("dtype", "tf32", "measured"),
    [(torch.bfloat16, False, ["128x64", "64x64"]), (torch.float32, True, ["64x64"]), (torch.float32, False, [])],
)
def test_each_tile_is_a_candidate_where_the_dtype_has_it(dtype, tf32, measured, benchmark, monkeypatch, folder):
    """The winner is kept under its tile's name."""
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 40, "cuda:128x64": 30, "cuda:64x64": 20, "cuda:1x1": 1})
    x = torch.rand(2, 3, 8, 8, dtype=dtype)
    form = race.form(x)._replace(tf32=tf32)
    wins = "cuda:64x64" if measured else "cuda"
    assert tuning.choose(form, race.candidates, (x,)) == wins
    (file,) = folder.iterdir()
    (kept,) = json.loads(file.read_text())["choices"].values()
    assert kept["candidate"] == wins == tuning.used()[str(form)]
    assert set(kept["us"]) == {"cudnn_epilogue", "cuda", *(f"cuda:{tile}" for tile in measured)}


def test_a_stages_kernel_has_its_own_tiles(monkeypatch):
    form = form_of(shapes("conv_stage")[0])
    asked = [name for name in PAGES["conv_stage"].FORWARDS if ":" in name and tuning._able(form, name, CPU)]
    epilogue = [f"cuda_epilogue:{tile}" for tile in ("128x128", "128x192", "128x64", "64x64")]
    assert asked == [*epilogue, "cuda:128x64", "cuda:64x128"]
    assert not any(tuning._able(form._replace(operator="conv_relu"), name, CPU) for name in epilogue)


# ---- The cache folder ------------------------------------------------------------------------------------------------

SPOILT = {
    "damaged": lambda text: text[: len(text) // 2],
    "of another device": lambda text: text.replace('"device": "cpu"', '"device": "another"'),
    "no object": lambda text: "[]",
    "without choices": lambda text: json.dumps({"about": tuning.about(CPU)}),
    "of another make": lambda text: text.replace('"candidate"', '"winner"'),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_file_that_cannot_be_used_is_ignored_with_one_line(how, benchmark, monkeypatch, folder):
    Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20}).run()
    (file,) = folder.iterdir()
    file.write_text(SPOILT[how](file.read_text()))
    tuning.forget()
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    with pytest.warns(RuntimeWarning, match="is ignored") as seen:
        assert race.run() == "cuda"
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)
    assert race.clocked == 2 * tuning.ROUNDS
    assert len(json.loads(file.read_text())["choices"]) == 1, "and is written anew"


@pytest.mark.parametrize("how", ["a file is there", "the disk is full"])
def test_a_folder_that_cannot_be_written_costs_one_line(how, benchmark, monkeypatch, folder):
    if how == "a file is there":
        folder.write_text("")
    else:

        def full(*_arguments, **_options):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tuning.json, "dump", full)
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    with pytest.warns(RuntimeWarning, match="measurements cannot be kept there") as seen:
        assert [race.run(), race.run(batch=3), race.run()] == ["cuda"] * 3
    assert len([one for one in seen if "kept" in str(one.message)]) == 1
    assert not folder.is_dir() or not list(folder.iterdir()), "nothing unfinished is left"


def test_two_processes_keep_what_the_other_has_measured(benchmark, monkeypatch, folder):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    race.run()
    (file,) = folder.iterdir()
    record = json.loads(file.read_text())
    record["choices"] |= {"of another process": record["choices"].popitem()[1]}
    file.write_text(json.dumps(record))
    race.run(batch=3)
    assert len(json.loads(file.read_text())["choices"]) == 3


@pytest.mark.parametrize("fact", ["device", "driver", "cudnn", "kernels"])
def test_a_change_of_the_machine_measures_anew(fact, benchmark, monkeypatch, folder):
    before, facts = tuning.file_of(CPU), tuning.about(CPU)
    monkeypatch.setattr(tuning, "about", lambda device: {**facts, fact: "new"})
    assert tuning.file_of(CPU) != before


# ---- Pins ------------------------------------------------------------------------------------------------------------


def test_what_is_pinned_is_taken_and_nothing_is_measured(benchmark, monkeypatch, folder):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20, "triton": 10})
    pinned = str(race.form(torch.rand(2, 3, 8, 8)))
    with tuning.pinned({pinned: "triton"}):
        assert [race.run(), race.run(batch=3)] == ["triton", "cudnn_epilogue"]
        assert tuning.used()[pinned] == "triton"
    assert race.clocked == 0
    assert race.run() == "cuda"


def test_a_pin_of_a_candidate_that_is_not_here_is_the_tables(monkeypatch):
    race = Race(monkeypatch, {"cudnn_epilogue": 50, "cuda": 20})
    with tuning.pinned({str(race.form(torch.rand(2, 3, 8, 8))): "of a later version"}):
        assert race.run() == "cudnn_epilogue"


# ---- The operators ---------------------------------------------------------------------------------------------------

PAGES = {stem: importlib.import_module(f"alexnet_fast.ops.{stem}") for stem in ("conv_relu", "conv_stage")}
TUNED = {
    "conv_relu": PAGES["conv_relu"]._tuned,
    "conv_relu_backward": PAGES["conv_relu"]._tuned_backward,
    "conv_stage": PAGES["conv_stage"]._tuned,
}


ran: list[str] = []  # of this package's kernels


def _native(name: str, family: str, *arguments):
    """What stands for ``name`` of a family; the family ``kernel`` takes the switch for TF32 and a tile's number."""
    if family == "kernel":
        *arguments, _tf32, tile = arguments
        family = f"tile {tile}"
    wanted = arguments[-1] if name == "conv_relu_backward" else None
    ran.append(f"{name} {family} {wanted}" if wanted else f"{name} {family}")
    if wanted and family == "sm90" and wanted[2]:
        raise RuntimeError("conv_relu_backward_sm90: operation not supported")
    return getattr(NATIVE, name)(*arguments)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """``auto`` chooses convolutions of CPU tensors too; on_cpu(operator=candidate, ...) sets what the table answers.
    The CPU's operators stand in for all candidates."""
    answers = {}
    ran.clear()
    with torch.library._scoped_library("alexnet_fast", "IMPL") as library:
        for name, tuned in TUNED.items():
            library.impl(f"{name}_tuned", tuned, "CPU")
            for family in ("cuda", "kernel", *(["sm90"] if name != "conv_stage" else [])):
                library.impl(f"{name}_{family}", partial(_native, name, family), "CPU")
        monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *arguments: F.relu(F.conv2d(*arguments)))
        monkeypatch.setitem(backends._build, "cuda", "on a CPU")
        for stem, page in PAGES.items():
            monkeypatch.setitem(backends.AUTO["cpu"], stem, "tuned")
            for table in [table for name, table in vars(page).items() if name.endswith(("FORWARDS", "GRADIENTS"))]:
                monkeypatch.delitem(table, "triton")
        monkeypatch.setattr(tuning, "shipped", lambda form, device: answers.get(form.operator, LIBRARY[form.operator]))
        backends.forget()
        yield lambda **given: answers.update(given)
    backends.forget()


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, weight = torch.randn(2, 6, 9, 9), torch.randn(8, 6, 3, 3)
    x, weight = (t.to(dtype, memory_format=torch.channels_last) for t in (x, weight))
    return [t.requires_grad_() for t in (x, weight, torch.randn(8, dtype=dtype))]


CALLS = {
    "conv_relu": lambda *t, backend=None: ops.conv_relu(*t, padding=1, backend=backend),
    "conv_stage": lambda *t, backend=None: ops.conv_stage(*t, pool=Pool(3, 2), lrn=ops.LRN(3), backend=backend),
}


GRADIENTS = [("cudnn", "cudnn"), ("cuda", "cuda"), ("cudnn", "cuda"), ("cuda", "cudnn"), ("cuda_sm90", "cuda_sm90")]
GRADIENTS += [("cuda_sm90", "cudnn"), ("cuda:64x64", "cuda:64x128"), ("cuda:128x128", "cuda:128x128")]


def noted(operator: str, candidate: str, wanted: list[bool] | None = None) -> list[str]:
    """What ``ran`` says of it: nothing of the library's."""
    name, _, tile = candidate.partition(":")
    if name.startswith("cudnn"):
        return []
    family = "sm90" if "sm90" in name else "cuda"
    if tile:
        family = f"tile {1 + tuning.tiles(operator, name, torch.float16, False).index(tile)}"
    stem = "conv_relu_backward" if wanted else "conv_relu" if "epilogue" in name else operator
    return [" ".join(map(str, (stem, family, *([wanted] if wanted else []))))]


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(
    ("stem", "forward"), [(stem, name) for stem in PAGES for name in PAGES[stem].FORWARDS if name != "triton"]
)
def test_every_choice_computes_the_operator(stem, forward, gradients, hopper, on_cpu):
    """Forward and all three gradients; what ran is what was chosen, and forward's choice is not backward's. Triton's
    kernels have tests of their own."""
    of_input, of_weight = gradients
    on_cpu(**{stem: forward}, conv_backward_input=of_input, conv_backward_weight=of_weight)
    half = any(":" in name or "sm90" in name for name in (forward, *gradients))
    dtype, near = (torch.float16, {"rtol": 0.01, "atol": 0.01}) if half else (torch.float32, {})
    ours, theirs = tensors(dtype), tensors(dtype)
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.data)
    y, wanted = CALLS[stem](*ours), CALLS[stem](*theirs, backend="reference")
    torch.testing.assert_close(y, wanted, **near)
    assert y.stride() == wanted.stride()
    for t, loss in ((ours, y), (theirs, wanted)):
        (loss * torch.linspace(-1, 1, loss.numel()).view(loss.shape)).sum().backward()
        assert all(tensor.grad is not None for tensor in t)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **near)
    chosen = {form.split(",")[0]: name for form, name in tuning.used().items()}
    assert chosen == {stem: forward, "conv_backward_input": of_input, "conv_backward_weight": of_weight}
    # One pass if a kernel gives all, the bias's too, which a stage has from its epilogue; else one for each.
    masks = [[True, False, False], [False, True, False]]
    passes = [word for way in zip([*chosen][1:], gradients, masks, strict=True) for word in noted(*way)]
    if gradients == ("cuda", "cuda"):
        passes = noted("conv_backward_input", "cuda", [True, True, stem == "conv_relu"])
    assert ran == noted(stem, forward) + passes


def test_a_masked_gradient_has_a_bias_too(hopper, on_cpu):
    """Where no kernel that was chosen makes it."""
    on_cpu(conv_backward_input="cuda_sm90", conv_backward_weight="cuda_sm90")
    x, weight, _ = (tensor.detach() for tensor in tensors(torch.float16))
    dy = torch.ones(2, 8, 9, 9, dtype=torch.float16)
    arguments = dy, x, weight, None, [1, 1], [1, 1], [1, 1], 1, [True, True, True]
    for one, other in zip(TUNED["conv_relu_backward"](*arguments), NATIVE.conv_relu_backward(*arguments), strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_that_is_not_wanted_is_not_chosen(on_cpu):
    for frozen in range(3):
        ours = tensors()
        ours[frozen].requires_grad_(False)
        tuning.forget()
        CALLS["conv_relu"](*ours).sum().backward()
        asked = {form.split(",")[0] for form in tuning.used()}
        unasked = [{"conv_backward_input"}, {"conv_backward_weight"}, set()][frozen]
        assert asked == {"conv_relu", "conv_backward_input", "conv_backward_weight"} - unasked
        assert [t.grad is None for t in ours] == [index == frozen for index in range(3)]


def test_the_calls_own_tensors_are_timed(on_cpu, benchmark, monkeypatch):
    """Forward and backward, each on its own; in inference a stage is another form."""
    seen = []

    def clock(call, device):
        seen.append(call())
        return 1.0

    monkeypatch.setattr(tuning, "clock", clock)
    t = tensors()
    CALLS["conv_stage"](*t).sum().backward()
    with torch.no_grad():
        CALLS["conv_stage"](*t)
    assert [form.split(",")[0] for form in tuning.used()] == [
        *("conv_stage", "conv_backward_input", "conv_backward_weight", "conv_stage")
    ]
    tiles = ("128x128", "64x64")  # of TF32
    stage = {"cudnn_epilogue", "cuda", "cuda_epilogue", *(f"cuda_epilogue:{tile}" for tile in tiles)}
    gradients = {"cudnn", "cuda", *(f"cuda:{tile}" for tile in tiles)}, {"cudnn", "cuda"}
    timed = [set(record.us) for record in tuning.measured(CPU).values()]
    assert timed == [stage, *gradients, stage]
    assert len(seen) == tuning.ROUNDS * sum(map(len, timed))
    assert ["training" in form for form in tuning.used()] == [True, False, False, False]


@pytest.mark.parametrize("stem", PAGES)
def test_the_tuned_operators_are_registered_as_torch_wants(stem, on_cpu):
    x, weight, bias = tensors()
    geometry = [1, 1], [1, 1], [1, 1], 1
    stage = (3, 1e-4, 0.75, 1.0, 1, [3, 3], [2, 2], [0, 0], False, True) if stem == "conv_stage" else ()
    operator = getattr(torch.ops.alexnet_fast, f"{stem}_tuned").default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")  # the formula is all families' own
    torch.library.opcheck(operator, (x, weight, bias, *geometry, *stage), test_utils=checks)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_net_is_one_run_with_choices_inside(on_cpu, gradients):
    """A run in C++ goes on over convolutions that are chosen for their shapes, with all that they are told."""
    operators = ("conv_relu", "conv_stage", "conv_backward_input", "conv_backward_weight")
    on_cpu(**dict.fromkeys(operators, "cuda"))
    norm, pool = nn.LocalResponseNorm(3, 0.1), nn.MaxPool2d(3, 2, ceil_mode=True)
    plain = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=(1, 2), bias=False), nn.ReLU(), norm, pool),
        *(nn.Conv2d(8, 8, 3, stride=(1, 2), padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(8, 4, 3, dilation=(2, 1)), nn.ReLU(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(8, 5)),
    )
    fused = FusedSequential(*plain)
    x = torch.randn(2, 3, 15, 15, requires_grad=gradients)
    wanted = [x, *plain.parameters()]
    with torch.set_grad_enabled(gradients):
        y, expected = fused(x), plain(x)
    (native,) = fused._plan.parts[0].natives.values()
    assert native.runs == 5
    torch.testing.assert_close(y, expected)
    assert ran == ["conv_stage cuda", "conv_relu cuda", "conv_stage cuda"]
    if gradients:
        for got, one in zip(*(torch.autograd.grad(out.sum(), wanted) for out in (y, expected)), strict=True):
            torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-5)
        wants = "conv_relu_backward cuda (True, True, False)", "conv_relu_backward cuda (True, True, True)"
        assert [str(name).replace("[", "(").replace("]", ")") for name in ran[3:]] == [wants[0], wants[1], wants[0]]


def test_an_empty_batch_needs_no_choice(on_cpu, benchmark):
    x, weight, bias = tensors()
    assert ops.conv_relu(x[:0], weight, bias, padding=1).shape == (0, 8, 9, 9)
    assert tuning.used() == {}


# ---- Training --------------------------------------------------------------------------------------------------------


def _fused_net(config: TrainConfig) -> nn.Module:
    return fuse(runs.small_net(config))


def _train(out: Path, resume: bool = False, **given) -> None:
    words = given if resume else runs.options(out, {"max_steps": 6, "checkpoint_steps": 3, **given})
    assert commands.train(words, str(out) if resume else None, _fused_net) == 0


def test_a_resumed_run_takes_what_it_has_taken(on_cpu, benchmark, monkeypatch, tmp_path):
    """Though the table, and what was measured since, would choose otherwise: its bits are an undisturbed run's. And
    nothing is measured in a run, with the switch on."""

    def ours(*arguments):  # in other bits than the library's
        y, *kept = NATIVE.conv_stage(*arguments)
        return y * 1.001, *kept

    monkeypatch.setitem(PAGES["conv_stage"].FORWARDS, "cuda", ours)
    on_cpu(conv_stage="cuda", conv_backward_weight="cuda")
    _train(tmp_path / "whole")
    _train(tmp_path / "run", max_steps=3)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    stored = checkpoint.load(checkpoint.find(tmp_path / "run", "last")).config
    assert config["choices"] == stored.choices
    assert {form.split(",")[0]: name for form, name in stored.choices.items() if "10x3x" in form} == {
        "conv_stage": "cuda",
        "conv_backward_weight": "cuda",
    }
    on_cpu(conv_stage="cudnn_epilogue", conv_backward_weight="cudnn")
    kept = dict.fromkeys(stored.choices, Record("cudnn_epilogue", "measured", {}, {}))
    monkeypatch.setattr(tuning, "measured", lambda device: kept)
    monkeypatch.setattr(tuning, "clock", None)
    _train(tmp_path / "run", resume=True, max_steps=6)
    runs.assert_same_bits(tmp_path / "run", tmp_path / "whole")
    resumed = checkpoint.load(checkpoint.find(tmp_path / "run", "last")).config
    assert {form: resumed.choices[form] for form in stored.choices} == stored.choices


def _agree(ranks: Ranks, out: str) -> int:
    """Each rank's folder says that another candidate was measured fastest; of one form only the second's speaks."""
    os.environ["ALEXNET_FAST_CACHE"] = f"{out}/cache-{ranks.rank}"
    ones, weight = [(1, 1)] * 3, (4, 3, 3, 3)
    forms = [Form("conv_relu", torch.bfloat16, (n, 3, 9, 9), weight, *ones, 1, "contiguous") for n in (1, 2)]
    for form in forms[: 1 + ranks.rank]:
        tuning._keep(CPU, form, Record(["cuda", "triton"][ranks.rank], "measured", {}, {}))
    candidates = dict.fromkeys(("cudnn_epilogue", "cuda", "triton"))
    config = resolve({"data": "digits", "out": out}, 10)
    with tuning.pinned(agreed(config, ranks)):
        chosen = [tuning.choose(form, candidates, (torch.rand(1),)) for form in forms]
    Path(out, f"{ranks.rank}.json").write_text(json.dumps(chosen))
    return 0


def test_ranks_agree(tmp_path):
    """On the first one's choices, and where it has none, on the table's."""
    assert launch(_agree, (str(tmp_path),), 2) == 0
    chosen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert chosen[0] == chosen[1] == ["cuda", "cudnn_epilogue"]


# ---- The command -----------------------------------------------------------------------------------------------------


class Small(FusedSequential):
    variant = SimpleNamespace(image_size=15)

    def __init__(self):
        norm, pool = nn.LocalResponseNorm(3), nn.MaxPool2d(3, 2)
        convolutions = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        super().__init__(convolutions[0], nn.ReLU(), norm, pool, convolutions[1], nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_tuning_ahead_measures_what_inference_and_training_will_ask(precision, on_cpu, monkeypatch, folder):
    """As many choices as the bar counts to, and under the forms that calls have afterwards."""
    monkeypatch.setattr(tuning, "clock", lambda call, device: 1.0)
    net, heard = Small(), []
    bench.tune(net, [2, 3], precision, True, lambda form, record: heard.append((str(form), record.why)))
    assert {why for _, why in heard} == {"measured"}
    assert len(heard) == len(tuning.measured(CPU)) == 2 * bench.passes(net, True) == 2 * (2 + 3 + 2)
    assert not torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(tuning, "clock", None)  # nothing is left to measure
    x = torch.randn(3, 3, 15, 15).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        net.to(bench.PRECISIONS[precision])(x.to(bench.PRECISIONS[precision]))
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with torch.autocast("cpu", bench.PRECISIONS[precision], enabled=precision != "fp32"):
        net.float()(x).sum().backward()
    console = Console(width=200, file=io.StringIO())
    cli._show_measured(console, CPU)
    printed = console.file.getvalue()
    assert str(tuning.file_of(CPU)) in printed.replace("\n", "")
    assert "conv_backward_input" in printed


def test_tune_needs_a_gpu(monkeypatch, capsys):
    """And options that mean something, first."""
    for words, message in (
        ([], "tune: there is nothing to measure: "),
        (["--batch", "1,x"], "--batch: expected positive numbers separated by commas, got '1,x'"),
        (["--variant", "x"], "--variant: expected one of torchvision, "),
        (["--precision", "int8"], "--precision: expected one of fp32, fp16, bf16, got 'int8'"),
    ):
        monkeypatch.setattr(sys, "argv", ["alexnet-fast", "tune", *words])
        monkeypatch.setattr(backends, "missing", lambda name: "torch sees no CUDA device")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {message}")


def test_doctor_says_that_the_table_answers():
    console = Console(width=200, file=io.StringIO())
    cli._show_measured(console, CPU)
    assert console.file.getvalue().startswith("tuned: on cpu nothing was measured: the nearest of ")
