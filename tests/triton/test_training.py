"""A training step of every variant on the Triton kernels is that of the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import AlexNet, backend
from alexnet_fast.models import VARIANTS
from tests.ops.calls import Calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_step(variant, device):
    side = VARIANTS[variant].min_image_size
    net = AlexNet(10, dropout=0.0, variant=variant).to(device)
    images, labels = torch.randn(2, 3, side, side, device=device), torch.tensor([3, 7], device=device)
    gradients = {}
    for name in ("reference", "triton"):
        with backend(name), Calls() as mode:
            loss = F.cross_entropy(net(images), labels)
            gradients[name] = [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
    for expected, actual in zip(gradients["reference"], gradients["triton"], strict=True):
        assert (actual - expected).norm() <= 1e-5 * expected.norm()
    reached = [function.name() for function, _ in mode.calls]
    assert len(reached) >= 10
    assert all(name.endswith("_triton") for name in reached)
