"""A training step of every variant on the Triton kernels: gradients are those of the reference, and weights follow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from alexnet_fast import AlexNet, backend
from alexnet_fast.models import VARIANTS
from alexnet_fast.optim import SGD
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
    assert reached.count("alexnet_fast::linear_relu_dropout_triton") == 2  # fc6 and fc7
    # The interpreter takes a quarter of a microsecond for each number: fc6 and fc7 are for a GPU.
    pairs = zip(net.parameters(), gradients["triton"][1:], strict=True)
    pairs = [(p, g) for p, g in pairs if device == "cuda" or p.numel() < 2**20]
    expected = [(1 - 0.01 * 5e-4) * parameter.detach() - 0.01 * gradient for parameter, gradient in pairs]
    for parameter, gradient in pairs:
        parameter.grad = gradient
    with backend("triton"):
        SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4).step()
    for (parameter, _), value in zip(pairs, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-6, atol=1e-8)
