"""What every benchmark is crossed with."""

from __future__ import annotations

import pytest
import torch

FORMS = [
    (torch.float32, "contiguous"),
    (torch.float32, "channels_last"),
    (torch.bfloat16, "channels_last"),
]
forms = pytest.mark.parametrize(("dtype", "layout"), FORMS, ids=lambda value: str(value).removeprefix("torch."))
passes = pytest.mark.parametrize("training", [False, True], ids=["forward", "forward+backward"])
backends = pytest.mark.parametrize("backend", ["cpu"])
