"""Two images in one: MixUp (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), as in timm.

One share is drawn for each step, from (seed, step). A rank mixes the first image of its part of the batch with the last
one, the second with the one before the last, and so on.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from alexnet_fast.data.random import mix
from alexnet_fast.parallel import Mixed
from alexnet_fast.train.config import TrainConfig

MIXING_KEY = 0x6D6978  # keeps these draws apart from others of the step


def mix_images(config: TrainConfig, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Mixed | None]:
    """Images (n, 3, h, w) as ``config`` wants them mixed in ``step``, and how the loss is shared; None: not mixed."""
    if not config.mixup and not config.cutmix:
        return images, None
    generator = np.random.default_rng(mix(config.seed, step, MIXING_KEY))
    cut = bool(config.cutmix) and (not config.mixup or generator.random() < 0.5)
    share = float(generator.beta(*[config.cutmix if cut else config.mixup] * 2))
    others = images.flip(0)
    if cut:
        height, width = images.shape[2:]
        down, right = generator.random(2) * (height, width)  # the middle of the box that the other image fills
        reach = math.sqrt(1 - share) / 2
        top, bottom = (min(height, max(0, round(down + side * reach * height))) for side in (-1, 1))
        left, end = (min(width, max(0, round(right + side * reach * width))) for side in (-1, 1))
        images = images.clone()
        images[:, :, top:bottom, left:end] = others[:, :, top:bottom, left:end]
        share = 1 - (bottom - top) * (end - left) / (height * width)
    else:
        images = images * share + others * (1 - share)
    return images, Mixed(labels.flip(0), share)
