"""The learning rate as a function of the step and, for schedule plateau, of the cuts so far: a resumed run needs no
scheduler.
"""

from __future__ import annotations

import math
from typing import Any

from alexnet_fast.train.config import TrainConfig

START = {"best": None, "stale": 0, "cuts": 0}  # of schedule "plateau", before the first evaluation


def learning_rate(
    config: TrainConfig, step: int, steps_per_epoch: int, cuts: int = 0, base: float | None = None
) -> float:
    """The rate for step ``step``, counted from 0; ``base`` stands in for ``config.lr`` where parameters have their own.

    Warm-up rises linearly, reaching ``lr`` at its last step. ``step`` cuts by ``lr_gamma`` every ``lr_step`` epochs,
    ``multistep`` after each of ``lr_milestones``, and ``plateau`` has cut ``cuts`` times so far (:func:`plateau`);
    ``cosine`` falls from ``lr`` after warm-up to 0 after the last step (Loshchilov and Hutter, arXiv 1608.03983,
    without restarts).
    """
    lr = config.lr if base is None else base
    warmup = config.warmup * steps_per_epoch
    if step < warmup:
        return lr * min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        length = max(1.0, config.epochs * steps_per_epoch - warmup)
        return lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / length)))
    if config.schedule == "step":
        cuts = step // (config.lr_step * steps_per_epoch)
    elif config.schedule == "multistep":
        cuts = sum(step >= epoch * steps_per_epoch for epoch in config.lr_milestones)
    return lr * config.lr_gamma**cuts


def plateau(config: TrainConfig, before: dict[str, Any], top1: float) -> dict[str, Any]:
    """The state of schedule ``plateau`` after an epoch with this held-out accuracy: a cut once ``lr_patience`` epochs
    in a row have not bettered the best, ``lr_cuts`` times at most.
    """
    if before["best"] is None or top1 > before["best"]:
        return {**before, "best": top1, "stale": 0}
    stale = before["stale"] + 1
    if stale < config.lr_patience or before["cuts"] == config.lr_cuts:
        return {**before, "stale": stale}
    return {**before, "stale": 0, "cuts": before["cuts"] + 1}
