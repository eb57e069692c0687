"""How a run is split over processes: who starts them, how they find each other, what they add up."""

from alexnet_fast.parallel.launch import launch, ranks_given
from alexnet_fast.parallel.ranks import Ranks, joined, plan_devices

__all__ = ["Ranks", "joined", "launch", "plan_devices", "ranks_given"]
