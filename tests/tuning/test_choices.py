"""Which convolution ``auto`` takes on a GPU, as far as a machine without one can tell.

The shipped table is compared with the rows that were measured. Measuring, keeping and refusing are tried with
candidates and a clock of the tests' own.
"""

from __future__ import annotations

import errno
import json
import warnings
from functools import partial

import pytest
import torch

from alexnet_fast import tuning
from alexnet_fast.ops.conv_stage import FORWARDS
from alexnet_fast.tuning import LIBRARY, Form, Record
from benchmarks import choices

FILES = sorted(choices.RESULTS.glob("*/layers.json"))
CPU = torch.device("cpu")


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


@pytest.mark.parametrize("operator", ["conv_relu", "conv_stage", "conv_backward_weight"])
def test_images_that_come_folded_are_for_the_kernel_that_would_fold_them(operator, monkeypatch):
    """AlexNet's first layer, where it is this package's; images of another size too, but no other convolution."""
    folded = {"channels": 48, "height": 57, "width": 57, "kernel": 3, "stride": 1, "padding": 0}
    wider = {**folded, "height": 65, "width": 65}
    first = [shape for shape in shapes(operator) if shape["channels"] == 3 and shape["dtype"] == "bfloat16"]
    own = [shape for shape in first if not tuning.shipped(form_of(shape)).startswith("cudnn")]
    assert own
    for shape in own:
        for other in (folded, wider):
            assert tuning.shipped(form_of(shape | other)) == tuning.shipped(form_of(shape))
    others = {"channels": 64}, {"kernel": 5}, {"batch": 8}, {"dtype": "float32"}
    forms = [form_of({**shape, **folded, **other}) for shape in first for other in others]
    answers = [tuning.shipped(form) for form in forms]
    monkeypatch.setattr(tuning, "folded_table", tuple)
    assert [tuning.shipped(form) for form in forms] == answers


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
    "a value": (lambda x: 2 * x + (torch.arange(x.numel()).view(x.shape) == 7), "differs from the library's by 0."),
    "NaN": (lambda x: torch.where(x == x[0, 0, 0, 0], torch.nan, 2 * x), "differs from the library's by nan"),
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


def test_hoppers_kernels_take_float32_by_tf32_alone(hopper):
    """The weight's gradient not at all; and float64 never."""
    form = form_of(shapes("conv_relu")[0])
    for dtype, tf32, operator, able in [
        (torch.float32, True, "conv_relu", True),
        (torch.float32, True, "conv_backward_input", True),
        (torch.float32, True, "conv_backward_weight", False),
        (torch.float16, False, "conv_backward_weight", True),
        (torch.float32, False, "conv_relu", False),
        (torch.float64, False, "conv_relu", False),
    ]:
        asked = form._replace(dtype=dtype, tf32=tf32, operator=operator)
        assert tuning._able(asked, "cuda_sm90", CPU) == able, asked


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
    with pytest.warns(RuntimeWarning, match="cuda_sm90 is not taken.*differs from the library's"):
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
    asked = [name for name in FORWARDS if ":" in name and tuning._able(form, name, CPU)]
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
