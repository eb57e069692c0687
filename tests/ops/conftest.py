from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alexnet_fast import BackendError, backends

# A backend, and the device its tests run on. On a GPU ``auto`` takes torch's own convolutions.
DEVICES = {"reference": "cpu", "cpu": "cpu", "cuda": "cuda", "auto": "cuda"}
# What the CUDA kernels do not cover; with it a test of ``cuda`` by name is skipped.
REFUSED = ("got torch.float64", "windows of more than 16 channels", "a weight without elements")


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] * (where == "cuda")) for name, where in DEVICES.items()]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that is missing here skips with its reason."""
    if reason := backends.missing(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """On a GPU with float32 products in full, and with cuDNN's deterministic algorithms alone."""
    before = torch.backends.cudnn.conv.fp32_precision
    if DEVICES[backend] == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    yield DEVICES[backend]
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function):
    try:
        return (yield)
    except BackendError as error:
        named = "callspec" in vars(pyfuncitem) and pyfuncitem.callspec.params.get("backend") == "cuda"
        if named and any(reason in str(error) for reason in REFUSED):
            pytest.skip(str(error))
        raise
