"""How a run is split over processes: who starts them, how they find each other, what each computes."""

from alexnet_fast.parallel import hybrid, towers
from alexnet_fast.parallel.dropout import BatchDropout, split_dropouts
from alexnet_fast.parallel.hybrid import Hybrid
from alexnet_fast.parallel.launch import PASSED_ON, launch, leave, ranks_given, ranks_of_launcher
from alexnet_fast.parallel.ranks import RESTARTED, Ranks, joined, plan_devices
from alexnet_fast.parallel.split import Mixed, Split, Step
from alexnet_fast.parallel.towers import Towers

MODES: dict[str, type[Split]] = {"ddp": Split, "towers": Towers, "hybrid": Hybrid}

__all__ = [
    "MODES",
    "PASSED_ON",
    "RESTARTED",
    "BatchDropout",
    "Hybrid",
    "Mixed",
    "Ranks",
    "Split",
    "Step",
    "Towers",
    "hybrid",
    "joined",
    "launch",
    "leave",
    "plan_devices",
    "ranks_given",
    "ranks_of_launcher",
    "split_dropouts",
    "towers",
]
