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


NO_GPU = "" if torch.cuda.is_available() else "torch sees no CUDA device"


def _or_skip(name: str, reason: str):
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))


forms = pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=lambda value: str(value).removeprefix("torch."))
passes = pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
backends = pytest.mark.parametrize("backend", ["cpu", *(_or_skip(n, NO_GPU or missing(n)) for n in ("cuda", "triton"))])
devices = pytest.mark.parametrize("device", ["cpu", _or_skip("cuda", NO_GPU)])
