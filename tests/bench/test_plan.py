"""The model of training on two devices: its bytes are those that two ranks count, its times follow from its inputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from alexnet_fast import AlexNet
from alexnet_fast.bench import Link, plan
from alexnet_fast.bench.plan import traffic
from alexnet_fast.parallel import MODES, Ranks, Step, launch

BATCH, SIDE = 4, 64


def test_the_papers_sizes():
    """ddp sends 4 bytes for each of 60,965,224 parameters; a tower sends 128 images' 128·13·13, 128·6·6 and twice 2048
    numbers."""
    with torch.device("meta"):
        sent = traffic(AlexNet(variant="paper"), 128, 224)
    assert sent["ddp"] == {"gradients": 243_860_896, "activations": 0}
    forward = [4 * 128 * size for size in (128 * 13 * 13, 128 * 6 * 6, 2048, 2048)]
    assert sent["towers"] == {"gradients": 0, "activations": sum(forward) + sum(forward[:3])}
    labels = 128 // 2 * 8
    assert sent["hybrid"] == {"gradients": 4 * 2_334_080, "activations": 128 * 4 * (9216 + 4096 + 1000) + labels}


def _steps(ranks: Ranks, out: str) -> int:
    """What a rank counts as sent in one step of each mode."""
    torch.manual_seed(0)
    whole = AlexNet(10, dropout=0.0, variant="paper")
    images, labels = torch.randn(BATCH, 3, SIDE, SIDE), torch.arange(BATCH)
    step = Step(nn.CrossEntropyLoss(reduction="sum"), torch.enable_grad, SIDE)
    sent = {}
    for mode, split_of in MODES.items():
        split = split_of(whole, [], ranks, step)
        share, shares = split.loads
        ranks.sent.clear()
        split.train(images[share::shares], labels[share::shares], BATCH, lambda: None)
        sent[mode] = dict(ranks.sent)
    if ranks.main:
        Path(out).write_text(json.dumps(sent))
    return 0


def test_two_ranks_count_the_models_bytes(tmp_path):
    out = tmp_path / "sent.json"
    assert launch(_steps, (str(out),), 2) == 0
    expected = traffic(AlexNet(10, variant="paper"), BATCH, SIDE)
    assert json.loads(out.read_text()) == {
        mode: {kind: size for kind, size in sizes.items() if size} for mode, sizes in expected.items()
    }


def test_times_follow_from_the_inputs():
    fast, slow = plan("paper", 256, 100, Link(100, 0)), plan("paper", 256, 100, Link(1, 0))
    assert [row.mode for row in fast] == ["ddp", "towers", "hybrid"]
    for row, late in zip(fast, slow, strict=True):
        assert late.exchange == pytest.approx(100 * row.exchange)
        assert late.compute == row.compute == pytest.approx(3 * 2 * 724_406_816 * 128 / 100e12)
        assert row.exposed <= row.exchange
    assert fast[1].exchange == pytest.approx(fast[1].activations / 100e9)
    # On a fast link the linear layers' gradients, 96% of the bytes, hide behind the convolutions' backward pass.
    assert fast[0].exposed == pytest.approx(4 * 2_334_080 / 100e9)
    assert slow[0].exposed > 0.5 * slow[0].exchange
    latent = plan("paper", 256, 100, Link(100, 10))
    assert [b.exposed - a.exposed for a, b in zip(fast, latent, strict=True)] == pytest.approx([1e-5, 7e-5, 7e-5])


def test_towers_need_towers():
    assert [row.mode for row in plan("torchvision", 256, 100, Link(100, 0))] == ["ddp", "hybrid"]
