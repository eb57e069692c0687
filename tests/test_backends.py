"""The choice of a backend: who decides, what is refused, and with which words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_fast import BackendError, backend, backends, ops

X = torch.randn(1, 4, 5, 5)


def ran_on(y: torch.Tensor) -> str:
    """Which backend made y, as its autograd node tells."""
    return "cpu" if "alexnet_fast" in y.grad_fn.name() else "reference"


def lrn(**arguments) -> torch.Tensor:
    return ops.local_response_norm(X.clone().requires_grad_(), 3, **arguments)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_the_nearest_choice_wins():
    assert backends.current() == "auto"
    assert ran_on(lrn()) == "cpu"
    with backend("reference"):
        assert ran_on(lrn()) == "reference"
        assert ran_on(lrn(backend="cpu")) == "cpu"
        with backend("auto"):
            assert ran_on(lrn()) == "cpu"
        assert backends.current() == "reference"
    assert backends.current() == "auto"


def test_an_exception_ends_the_block():
    with pytest.raises(KeyError), backend("reference"):
        raise KeyError
    assert backends.current() == "auto"


def test_a_choice_is_its_threads_own():
    with backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: ran_on(lrn())).result() == "cpu"


def test_backward_runs_where_forward_ran():
    """The block has ended when backward is called; only the reference has a second derivative."""
    x = X.clone().requires_grad_()
    with backend("reference"):
        y = ops.local_response_norm(x, 3)
    with backend("cpu"):
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        dx.sum().backward()


def test_environment():
    code = "from alexnet_fast import backends; print(backends.current())"
    assert python(code, ALEXNET_FAST_BACKEND="reference").stdout == "reference\n"
    assert python(code, ALEXNET_FAST_BACKEND="").stdout == "auto\n"
    use = "import torch; from alexnet_fast import ops; ops.max_pool2d(torch.ones(1, 2, 2), 2)"
    wrong = python(use, ALEXNET_FAST_BACKEND="gpu")
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].endswith(
        "BackendError: backend: unknown backend 'gpu'; known are auto, reference, cpu, cuda, triton"
    )


@pytest.mark.parametrize(
    "call", [lambda: lrn(backend="gpu"), lambda: backend("gpu").__enter__()], ids=["argument", "block"]
)
def test_unknown(call):
    with pytest.raises(BackendError, match="unknown backend 'gpu'; known are auto, reference, cpu, cuda, triton"):
        call()


def test_missing_names_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: f"no {name} today")
    backends.forget()
    with pytest.raises(BackendError, match=r"^lrn: backend 'triton' is missing: no triton today$"):
        lrn(backend="triton")


CALLS = {
    "lrn": lambda x, b: ops.local_response_norm(x, 3, backend=b),
    "max_pool": lambda x, b: ops.max_pool2d(x, 2, backend=b),
    "epilogue": lambda x, b: ops.epilogue(x, backend=b),
    "conv_relu": lambda x, b: ops.conv_relu(x, torch.ones(2, 4, 3, 3, device=x.device), backend=b),
    "linear_relu": lambda x, b: ops.linear_relu(x.flatten(1), torch.ones(2, 100, device=x.device), backend=b),
    "linear_relu_dropout": lambda x, b: ops.linear_relu_dropout(
        x.flatten(1), torch.ones(2, 100, device=x.device), backend=b
    ),
    "linear_int8": lambda x, b: ops.linear_int8(
        x.flatten(1), torch.ones(2, 100, dtype=torch.int8, device=x.device), torch.ones(2, device=x.device), backend=b
    ),
    "augment": lambda x, b: ops.augment(x[:, :3].byte(), 3, (0.5,) * 3, (0.5,) * 3, backend=b),
    "conv_stage": lambda x, b: ops.conv_stage(x, torch.ones(2, 4, 3, 3, device=x.device), pool=ops.Pool(2), backend=b),
}


@pytest.mark.parametrize("stem", CALLS)
def test_another_device_is_refused(stem):
    """A named backend that cannot run raises, and never falls back to another."""
    with pytest.raises(BackendError, match=rf"{stem}: backend 'cuda' does not run on cpu tensors"):
        CALLS[stem](X, "cuda")
    with pytest.raises(BackendError, match=rf"{stem}: backend 'cpu' does not run on meta tensors"):
        CALLS[stem](X.to("meta"), "cpu")


@pytest.mark.parametrize("stem", CALLS)
def test_auto_runs_everywhere(stem):
    """On a device without a row in the table, auto takes the reference."""
    assert CALLS[stem](X.to("meta"), None).is_meta


@pytest.mark.parametrize("reason", ["dilation", "windows of more than 255 elements"])
def test_what_a_kernel_does_not_cover(reason):
    arguments = {
        "dilation": {"kernel_size": 2, "dilation": 2},
        "windows of more than 255 elements": {"kernel_size": 16},
    }
    x = torch.randn(1, 2, 20, 20, requires_grad=True)
    assert ran_on(ops.max_pool2d(x, **arguments[reason])) == "reference"
    with pytest.raises(
        BackendError, match=f"max_pool: backend 'cpu' does not cover {reason}.*'reference' and 'auto' do"
    ):
        ops.max_pool2d(x, **arguments[reason], backend="cpu")


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """on_gpu(*shape): a tensor on a GPU that only seems to be there. Operators are called, kernels are not."""
    monkeypatch.setitem(backends._build, "cuda", "13.0 for sm_90")
    monkeypatch.setattr(backends, "missing", lambda name: "")
    backends.forget()
    with FakeTensorMode(), torch.no_grad():
        yield lambda *shape, **options: torch.empty(shape, device="cuda", **options)
    backends.forget()


CONVOLUTIONS = {
    "conv_relu": lambda x, weight, b: ops.conv_relu(x, weight, padding=1, backend=b),
    "conv_stage": lambda x, weight, b: ops.conv_stage(x, weight, padding=1, pool=ops.Pool(3, 2), backend=b),
}


@pytest.mark.parametrize("stem", CONVOLUTIONS)
def test_convolutions_by_name_are_our_own_and_by_auto_chosen(stem, on_gpu, operators):
    x, weight = on_gpu(1, 8, 9, 9), on_gpu(4, 8, 3, 3)
    call = CONVOLUTIONS[stem]
    assert operators(lambda x: call(x, weight, "cuda"), x) == [f"{stem}_cuda"]
    assert operators(lambda x: call(x, weight, None), x) == [f"{stem}_tuned"]


def test_pointwise_operators_are_our_own(on_gpu, operators):
    for named in (None, "cuda"):
        assert operators(
            lambda x, b=named: ops.max_pool2d(ops.local_response_norm(x, 5, backend=b), 3, backend=b),
            on_gpu(1, 4, 9, 9),
        ) == ["lrn", "max_pool"]


@pytest.mark.parametrize("named", ["cuda", None])
def test_what_cuda_kernels_do_not_cover(named, on_gpu, operators):
    """By name an error that says so; auto leaves it to the reference."""
    x, weight = on_gpu(1, 24, 9, 9), on_gpu(4, 24, 3, 3)
    calls = [
        ("windows of more than 16 channels", lambda: ops.local_response_norm(x, 17, backend=named)),
        ("windows of more than 16 channels", lambda: ops.epilogue(x, lrn=ops.LRN(17), backend=named)),
        ("windows of more than 16 channels", lambda: ops.conv_stage(x, weight, lrn=ops.LRN(17), backend=named)),
        ("a weight without elements", lambda: ops.conv_relu(on_gpu(1, 0, 9, 9), on_gpu(4, 0, 3, 3), backend=named)),
        ("torch.float64", lambda: ops.local_response_norm(on_gpu(1, 8, 3, 3, dtype=torch.float64), 5, backend=named)),
    ]
    for reason, call in calls:
        if named is None:
            assert operators(lambda _, call=call: call(), x) == []
            continue
        with pytest.raises(BackendError, match=reason):
            call()


def test_without_cuda_kernels_auto_leaves_a_gpu_to_the_reference(on_gpu, operators, monkeypatch):
    x, weight = on_gpu(1, 8, 9, 9), on_gpu(4, 8, 3, 3)
    monkeypatch.setitem(backends._build, "cuda", None)
    backends.forget()
    assert operators(lambda x: CONVOLUTIONS["conv_stage"](x, weight, None), x) == []


def test_without_the_package_triton():
    """The doctor names the reason, and so does a call; the rest works."""
    hidden = "import sys; sys.modules['triton'] = None; "
    doctor = python(
        hidden + "sys.argv = ['alexnet-fast', 'doctor', '--json']; from alexnet_fast.cli import main; main()"
    )
    state = json.loads(doctor.stdout)["backends"]["triton"]
    assert state == {"available": False, "reason": "the package triton is not installed"}
    call = "import torch; from alexnet_fast import ops; y = ops.max_pool2d(torch.ones(1, 2, 2), 2); print(y.item()); "
    ended = python(hidden + call + "ops.max_pool2d(y, 1, backend='triton')", TRITON_INTERPRET="1")
    assert ended.stdout == "1.0\n"
    message = "BackendError: max_pool: backend 'triton' is missing: the package triton is not installed"
    assert ended.stderr.splitlines()[-1].endswith(message)


def test_report_gives_a_reason_for_each_that_is_missing():
    report = {status.name: status for status in backends.report()}
    assert list(report) == list(backends.NAMES)
    assert report["reference"].available
    assert report["cpu"].available
    assert all(bool(status.reason) != status.available for status in report.values())
    assert report["cuda"].available == (backends.missing("cuda") == "")


def test_the_cuda_reason_follows_the_build(monkeypatch):
    """In the order in which a user can mend them: the build, torch's build, the device."""
    monkeypatch.setitem(backends._build, "cuda", None)
    assert backends.missing("cuda") == "built without CUDA: no nvcc was found, or ALEXNET_FAST_CUDA=0"
    monkeypatch.setitem(backends._build, "cuda", "13.0 for sm_90")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends.missing("cuda") == "this torch is a build without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backends.missing("cuda") == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert backends.missing("cuda") == ""
