"""The learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from alexnet_fast.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """The rate for step ``step``, counted from 0.

    Warm-up rises linearly, reaching ``lr`` at its last step. ``step`` cuts by ``lr_gamma`` every ``lr_step`` epochs;
    ``cosine`` falls from ``lr`` after warm-up to 0 after the last step (Loshchilov and Hutter, arXiv 1608.03983,
    without restarts).
    """
    warmup = config.warmup * steps_per_epoch
    if step < warmup:
        return config.lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        length = max(1.0, config.epochs * steps_per_epoch - warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / length)))
    if config.schedule == "step":
        return config.lr * config.lr_gamma ** (step // (config.lr_step * steps_per_epoch))
    return config.lr
