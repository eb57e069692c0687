"""Loss and accuracy are what their definitions say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alexnet_fast.data import Transform
from alexnet_fast.data.sources import ArrayImages
from alexnet_fast.parallel import Ranks
from alexnet_fast.train.config import resolve
from alexnet_fast.train.evaluate import evaluate, normalized
from tests.train.runs import small_net

CONFIG = resolve({"data": "digits", "out": "x", "batch_size": 8, "workers": 0}, 10)


@pytest.mark.parametrize("classes", [10, 3])
def test_it_equals_one_pass_over_all_images(classes: int):
    config = dataclasses.replace(CONFIG, num_classes=classes)
    generator = np.random.default_rng(1)
    split = ArrayImages(generator.integers(0, 256, (45, 8, 8), np.uint8), generator.integers(0, classes, 45))
    net = small_net(config)
    result, bad = evaluate(net, split, config, Ranks())
    transform = Transform(config.transform, config.image_size)
    images = torch.stack([torch.from_numpy(transform(split.read(n)[0]).copy()).permute(2, 0, 1) for n in range(45)])
    labels = torch.from_numpy(split.labels)
    with torch.no_grad():
        logits = net((images.float() / 255 - 0.5) / 0.5)
    places = (logits > logits.gather(1, labels[:, None])).sum(1)  # 0: the label has the largest logit
    assert (result.count, bad) == (45, {})
    assert result.top1_count == (places < 1).sum()
    assert result.top5_count == (places < 5).sum()
    assert 0 < result.top1_count < 45
    assert (result.top5_count == 45) == (classes == 3)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.top1 == result.top1_count / 45


def test_images_in_bfloat16_are_the_float32_ones_rounded():
    images = torch.randint(256, (2, 3, 8, 9), dtype=torch.uint8)
    wide = normalized(images, CONFIG, torch.device("cpu"))
    torch.testing.assert_close(wide, (images / 255 - 0.5) / 0.5)
    narrow = normalized(images, dataclasses.replace(CONFIG, precision="bf16"), torch.device("cpu"))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, wide.bfloat16())
