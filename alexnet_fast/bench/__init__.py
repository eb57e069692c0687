"""``alexnet-fast bench``: one look at this machine's speed, and a model of training on two devices."""

from alexnet_fast.bench.look import look
from alexnet_fast.bench.plan import Link, Plan, plan

__all__ = ["Link", "Plan", "look", "plan"]
