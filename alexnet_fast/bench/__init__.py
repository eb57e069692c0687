"""``alexnet-fast bench``: one look at this machine's speed, and a model of training on two devices. ``alexnet-fast
tune``: which convolutions are fastest here."""

from alexnet_fast.bench.look import look
from alexnet_fast.bench.plan import Link, Plan, plan
from alexnet_fast.bench.tune import PRECISIONS, passes, tune

__all__ = ["PRECISIONS", "Link", "Plan", "look", "passes", "plan", "tune"]
