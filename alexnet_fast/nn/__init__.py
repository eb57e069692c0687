"""Modules: what turns an ``nn.Sequential`` into fused stages, and the normalizations that torch.nn lacks."""

from alexnet_fast.nn.fused import FusedSequential, input_fold
from alexnet_fast.nn.fusion import fuse, fusion_report
from alexnet_fast.nn.grouped import GroupedLinear
from alexnet_fast.nn.int8 import Int8Linear, weight_only_int8
from alexnet_fast.nn.norm import GroupedLocalResponseNorm, SpatialResponseNorm
from alexnet_fast.nn.packed import pack

__all__ = [
    "FusedSequential",
    "GroupedLinear",
    "GroupedLocalResponseNorm",
    "Int8Linear",
    "SpatialResponseNorm",
    "fuse",
    "fusion_report",
    "input_fold",
    "pack",
    "weight_only_int8",
]
