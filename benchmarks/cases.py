"""What every benchmark is crossed with. On a machine without a GPU its cases skip with the reason."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast.backends import missing

FORMS = [
    (torch.float32, "contiguous"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "channels_last"),
]


# Images a call: one, and what a CPU or a GPU is given to be busy. Samples have one; race() gives them the case's.
BATCHES = {"cpu": (1, 32), "cuda": (128, 1024), "triton": (128, 1024)}
NO_GPU = "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _or_skip(*values, reason: str):
    marks = pytest.mark.skipif(bool(reason), reason=f"{values[0]}: {reason}")
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


def _absent(backend: str) -> str:
    return "" if backend == "cpu" else NO_GPU or missing(backend)


forms = pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=lambda value: str(value).removeprefix("torch."))
passes = pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
runs = pytest.mark.parametrize(
    ("backend", "batch"),
    [_or_skip(backend, batch, reason=_absent(backend)) for backend, batches in BATCHES.items() for batch in batches],
)
devices = pytest.mark.parametrize("device", ["cpu", _or_skip("cuda", reason=NO_GPU)])
