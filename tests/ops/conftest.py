from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from alexnet_fast import BackendError, backends

# A backend, and the device its tests run on. On a GPU ``auto`` takes cuDNN's convolutions for shapes as small as these.
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


def _says_nothing_new(item: pytest.Item) -> bool:
    """Of the cases on a GPU: ``cuda`` refuses float64, which tests/test_backends.py asks once, and ``auto`` runs the
    kernels of ``cuda`` for pointwise operators (tests/test_backends.py again), so that another run of each finds
    nothing. What stays of ``auto`` are convolutions, and the float64 that it leaves to the reference."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    wide = params.get("dtype") == torch.float64
    if params.get("backend") == "cuda":
        return wide
    pointwise = getattr(params.get("sample"), "stem", "") in ("lrn", "max_pool", "epilogue")
    return params.get("backend") == "auto" and pointwise and not wide


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {item for item in items if _says_nothing_new(item)}
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
