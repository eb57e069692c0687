from __future__ import annotations

import pytest

from alexnet_fast import backends

# A backend, and the device its tests run on.
DEVICES = {"reference": "cpu", "cpu": "cpu"}


@pytest.fixture(params=DEVICES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn; one that is missing here skips with its reason."""
    if reason := backends.missing(request.param):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return DEVICES[backend]
