"""Code of users checks under mypy --strict: README's blocks, and one use of each public name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alexnet_fast
from tests.test_readme import BLOCKS

USES = """
import torch
from torch import Tensor, nn

from alexnet_fast import AlexNet, FusedSequential, alexnet, explain, fuse, fusion_report, models, ops, pack
from alexnet_fast.models import VARIANTS, AlexNet_Weights, Variant
from alexnet_fast.optim import SGD

net: AlexNet = pack(alexnet(weights=AlexNet_Weights.DEFAULT, num_classes=10, replace_head=True))
other: AlexNet = models.alexnet(num_classes=3)
features: FusedSequential = net.features
mine: nn.Sequential = fuse(nn.Sequential(nn.ReLU()), fold_batchnorm=True, pairs=[("a", "b")])
name: str = fusion_report(net, torch.zeros(1))[0].runs_as
variant: Variant = VARIANTS["paper"]
pooled: Tensor = ops.max_pool2d(torch.zeros(1), 3, 2)
pooled, places = ops.max_pool2d(torch.zeros(1), 3, return_indices=True)
image: Tensor = AlexNet_Weights.DEFAULT.transforms()(torch.zeros(3, 300, 300))
SGD(net.parameters(), lr=0.1, rule="2012").step()
heat: Tensor = explain.grad_cam(net, image, target=3)
lost: Tensor = explain.occlusion(net, image, torch.tensor([3]), window=20)
boxes: Tensor = explain.peaks(net, image, "relu3").boxes
"""
WRONG = """
from alexnet_fast import ops

ops.local_response_norm("no tensor", 5)
"""


@pytest.mark.slow  # a minute of mypy, which reads torch
def test_code_of_users_checks(tmp_path):
    """And what is wrong is found, so that types are not all Any."""
    pytest.importorskip("mypy", reason="the extra dev brings mypy")
    for number, code in enumerate([*BLOCKS, USES]):
        (tmp_path / f"uses_{number}.py").write_text(code)
    (tmp_path / "wrong.py").write_text(WRONG)
    package = Path(alexnet_fast.__file__).parent
    assert (package / "py.typed").exists()
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--cache-dir", tmp_path / "cache"]
    command.append("--untyped-calls-exclude=torch")  # Tensor.backward is untyped
    files = sorted(path.name for path in tmp_path.glob("*.py"))
    environment = {**os.environ, "MYPYPATH": str(package.parent)}
    done = subprocess.run([*command, *files], cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = done.stdout.splitlines()[:-1]
    assert [line.partition(":")[0] for line in errors] == ["wrong.py"], done.stdout + done.stderr
    assert 'incompatible type "str"; expected "Tensor"' in errors[0]
