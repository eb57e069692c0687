"""Triton's kernels run on the GPU if torch sees one, and otherwise on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """The interpreter's matrix products are NumPy's, too small for threads: those would only wait for each other."""
    if DEVICE == "cuda":
        yield
        return
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """float32 convolutions are compared with exact ones: no TF32 on a GPU."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before
