"""Choices at work: in the operators, in nets, in training runs, and in the commands tune and doctor.

No GPU is needed: operators for the CPU stand in for every candidate.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from alexnet_fast import FusedSequential, backends, bench, cli, fuse, ops, tuning
from alexnet_fast.bench.commands import show_measured
from alexnet_fast.ops import Pool
from alexnet_fast.ops.registry import NATIVE
from alexnet_fast.parallel import Ranks, launch
from alexnet_fast.train import checkpoint, commands
from alexnet_fast.train.config import TrainConfig, resolve
from alexnet_fast.train.engine import agreed
from alexnet_fast.tuning import LIBRARY, Form, Record
from tests.train import runs

CPU = torch.device("cpu")

# ---- The operators ---------------------------------------------------------------------------------------------------

PAGES = {stem: importlib.import_module(f"alexnet_fast.ops.{stem}") for stem in ("conv_relu", "conv_stage")}
TUNED = {
    "conv_relu": PAGES["conv_relu"]._tuned,
    "conv_relu_backward": PAGES["conv_relu"]._tuned_backward,
    "conv_stage": PAGES["conv_stage"]._tuned,
}


ran: list[str] = []  # of this package's kernels


def _native(name: str, family: str, *arguments):
    """What stands for ``name`` of a family; ``kernel`` and ``sm90`` take the switch for TF32, and ``kernel`` a tile's
    number."""
    if family == "kernel":
        *arguments, _tf32, tile = arguments
        family = f"tile {tile}"
    if family == "sm90":
        masks = name == "conv_relu_backward" and len(arguments) > 10  # torch leaves out what has its default
        *arguments, _tf32 = arguments[:-1] if masks else arguments
    wanted = arguments[-1] if name == "conv_relu_backward" else None
    ran.append(f"{name} {family} {wanted}" if wanted else f"{name} {family}")
    if wanted and family == "sm90" and wanted[2] and not wanted[1]:
        raise RuntimeError("conv_relu_backward_sm90: operation not supported")
    result = getattr(NATIVE, name)(*arguments)
    if family == "sm90" and masks:
        ran.append("masks dx")
        return result[0] * (arguments[1] > 0), *result[1:]
    return result


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """``auto`` chooses convolutions of CPU tensors too; on_cpu(operator=candidate, ...) sets what the table answers.
    The CPU's operators stand in for all candidates."""
    answers = {}
    ran.clear()
    with torch.library._scoped_library("alexnet_fast", "IMPL") as library:
        for name, tuned in TUNED.items():
            library.impl(f"{name}_tuned", tuned, "CPU")
        library.impl("conv_relu_backward_in_run", PAGES["conv_relu"]._backward_in_run, "CPU")
        for name in TUNED:
            for family in ("cuda", "kernel", "sm90"):
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


@pytest.mark.parametrize("of_weight", [True, False])
def test_a_masked_gradient_has_a_bias_too(of_weight, hopper, on_cpu):
    """With the weight's, or where that is not wanted by itself."""
    on_cpu(conv_backward_input="cuda_sm90", conv_backward_weight="cuda_sm90")
    x, weight, _ = (tensor.detach() for tensor in tensors(torch.float16))
    dy = torch.ones(2, 8, 9, 9, dtype=torch.float16)
    arguments = dy, x, weight, None, [1, 1], [1, 1], [1, 1], 1, [True, of_weight, True]
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("of_input", "passes"), [("cuda_sm90", 1), ("cuda", 3), ("cudnn", 0)])
def test_a_convolution_masks_for_the_one_before(of_input, passes, bias, hopper, on_cpu, monkeypatch):
    """Where Hopper's kernel gives dx, the ReLU before has no pass of its own; its bias has a gradient all the same. Not
    for a layer that normalizes, nor for the last one, which no convolution follows."""
    on_cpu(conv_backward_input=of_input)
    seen, mask = [], NATIVE.epilogue_backward
    monkeypatch.setattr(NATIVE, "epilogue_backward", lambda *arguments: seen.append(1) or mask(*arguments))
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=bias)
    plain = nn.Sequential(
        *(conv(3, 4), nn.ReLU(), nn.LocalResponseNorm(3, 0.1), conv(4, 8), nn.ReLU(), conv(8, 8), nn.ReLU()),
        *(conv(8, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 5)),
    )
    fused, x = FusedSequential(*plain), torch.randn(2, 3, 7, 7)
    grads = [torch.autograd.grad(net(x).sum(), list(plain.parameters())) for net in (fused, plain)]
    for got, one in zip(*grads, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-5)
    assert len(seen) == passes
    assert ran.count("masks dx") == (2 if of_input == "cuda_sm90" else 0)


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
    assert len(native.layers) == 5
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
    assert len(heard) == len(tuning.measured(CPU)) == bench.passes(net, [2, 3], True) == 2 * (2 + 3 + 2)
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
    show_measured(console, CPU)
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
    show_measured(console, CPU)
    assert console.file.getvalue().startswith("tuned: on cpu nothing was measured: the nearest of ")
