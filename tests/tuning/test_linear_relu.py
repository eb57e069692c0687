"""Which product ``auto`` takes for a linear layer of few rows, and in nets. The CPU's stands in for the kernel's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from alexnet_fast import AlexNet, FusedSequential, backend, backends, bench, ops, tuning
from alexnet_fast.nn import packed
from alexnet_fast.ops.linear_relu import FORWARDS, _form, _tuned
from alexnet_fast.ops.registry import NATIVE
from alexnet_fast.tuning import Record

CPU = torch.device("cpu")
ran: list[tuple[int, ...]] = []  # shapes of what the kernel's stand-in has multiplied


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    ran.append(tuple(x.shape))
    return NATIVE.linear_relu(x, weight, bias, relu)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch):
    """``auto`` chooses for CPU tensors; on_cpu(candidate) sets what the table answers."""
    answers = ["cublas"]
    ran.clear()
    with torch.library._scoped_library("alexnet_fast", "IMPL") as library:
        library.impl("linear_relu_tuned", _tuned, "CPU")
        library.impl("linear_relu_cuda", _kernel, "CPU")
        monkeypatch.setitem(backends._build, "cuda", "on a CPU")
        monkeypatch.setitem(backends.AUTO["cpu"], "linear_relu", "tuned")
        monkeypatch.setattr(tuning, "shipped", lambda form, device: answers[-1])
        monkeypatch.setattr(packed, "onednn_runs", lambda dtype: False)  # it would have the CPU's tensors first
        backends.forget()
        yield answers.append
    backends.forget()


def test_the_shipped_table_answers_the_library():
    """No card has measured the kernel yet."""
    form = _form(torch.empty(1, 9216).bfloat16(), torch.empty(4096, 9216, device="meta").bfloat16())
    assert tuning.shipped(form) == "cublas"


@pytest.mark.parametrize("candidate", FORWARDS)
@pytest.mark.parametrize("relu", [True, False])
def test_every_choice_computes_the_operator(candidate, relu, on_cpu):
    on_cpu(candidate)
    ours = [torch.randn(size, requires_grad=True) for size in ((3, 16), (5, 16), (5,))]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    y, wanted = ops.linear_relu(*ours, relu), ops.linear_relu(*theirs, relu, backend="reference")
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    wanted.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert ran == [(3, 16)] * (candidate == "cuda")
    assert list(tuning.used().values()) == [candidate]


@pytest.mark.parametrize("what", ["rows", "columns", "inputs", "alignment"])
def test_what_the_kernel_is_not_for_is_the_librarys(what, on_cpu):
    """More than eight rows, and what it does not read 16 bytes at a time where it lies."""
    on_cpu("cuda")
    x, weight = torch.randn(9 if what == "rows" else 8, 16), torch.randn(6, 16)
    if what == "columns":
        weight = torch.randn(16, 6).mT
    elif what == "inputs":
        x, weight = x[:, :15].contiguous(), weight[:, :15].contiguous()
    elif what == "alignment":
        weight = torch.randn(6 * 16 + 1)[1:].view(6, 16)
    torch.testing.assert_close(ops.linear_relu(x, weight), torch.relu(x @ weight.mT))
    assert not ran
    assert not tuning.used()


def test_tf32_is_another_form(on_cpu):
    x, weight, matmul = torch.randn(1, 8), torch.randn(4, 8), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for matmul.fp32_precision in ("ieee", "tf32"):
            ops.linear_relu(x, weight)
    finally:
        matmul.fp32_precision = before
    assert ["TF32" in form for form in tuning.used()] == [False, True]


# ---- In nets ---------------------------------------------------------------------------------------------------------


def net() -> FusedSequential:
    layers = nn.Linear(16, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4)
    return FusedSequential(nn.Dropout(), *layers).eval()


ROWS = [(2, 16), (2, 8), (2, 12)]


@pytest.mark.parametrize("grad", [False, True])
def test_inference_takes_it_for_every_linear_layer(grad, on_cpu):
    """As one run, or with gradients layer by layer, under modes too; and nothing for more rows."""
    on_cpu("cuda")
    model = net()
    x = torch.randn(2, 16)
    with torch.set_grad_enabled(grad), backend("reference"):
        wanted = model(x)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(model(x), wanted)
        assert ran == ROWS
        ran.clear()
        with torch.overrides.BaseTorchFunctionMode():
            model(x)
        model(torch.randn(9, 16))
    assert not ran


def test_training(on_cpu):
    """Layer by layer, with dropout's modules in between. Gradients are the reference's."""
    on_cpu("cuda")
    model = net().train()
    model[0].p = model[3].p = 0.0
    x = torch.randn(2, 16)
    model(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    assert ran == ROWS
    model.zero_grad()
    with backend("reference"):
        model(x).sum().backward()
    for a, b in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)


def test_a_run_goes_back(on_cpu):
    """One call into C++ forward, which asks for each layer's choice, and one backward."""
    on_cpu("cuda")
    model = FusedSequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 4, 4, 4)
    y = model(x)
    assert y.grad_fn.name() == "alexnet_fast_run_backward"
    assert ran == [(2, 16), (2, 8)]
    found = torch.autograd.grad(y.square().sum(), [*model.parameters()])
    with backend("reference"):
        wanted = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    torch.testing.assert_close(found, wanted)


def test_autocast_and_graphs_stay_as_they_are(on_cpu, monkeypatch):
    """Of weights that autocast has cast torch keeps the copy; a graph may be for any number of rows."""
    on_cpu("cuda")
    model, x = net(), torch.randn(2, 16)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        program(torch.randn(9, 16))
        torch.compile(model, backend="eager")(x)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: True)
        with torch.overrides.BaseTorchFunctionMode():
            model(x)
    assert not ran


# ---- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", bench.PRECISIONS)
def test_tuning_ahead_measures_linear_layers_of_few_rows(precision, on_cpu, monkeypatch):
    """As many choices as the bar counts to, with and without training."""
    monkeypatch.setattr(tuning, "clock", lambda call, device: 1.0)
    model = AlexNet(5, widths=(8, 12, 16, 12, 8, 40, 24))
    for train in (False, True):
        heard: list[str] = []
        tuning.measured(CPU).clear()
        bench.tune(model, [2, 9], precision, train, lambda form, _, heard=heard: heard.append(form.operator))
        layers = 5
        assert heard.count("linear_relu") == 3
        assert bench.passes(model, [2, 9], train) == 2 * (layers + train * (3 * layers - 1)) + 3


def test_a_wrong_result_is_named(on_cpu, monkeypatch, benchmark):
    monkeypatch.setitem(FORWARDS, "cuda", lambda *arguments: 2 * NATIVE.linear_relu(*arguments))
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with pytest.warns(RuntimeWarning, match="cuda is not taken: its result differs from the library's by 1 of"):
        ops.linear_relu(x, weight)
    (record,) = tuning._used.values()
    assert isinstance(record, Record)
    assert record.candidate == "cublas"
