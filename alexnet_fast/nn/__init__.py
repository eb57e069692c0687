"""Modules: what turns an ``nn.Sequential`` into fused stages, and the normalizations that torch.nn lacks."""

from alexnet_fast.nn.fused import FusedSequential, fuse
from alexnet_fast.nn.norm import GroupedLocalResponseNorm, SpatialResponseNorm
from alexnet_fast.nn.packed import pack

__all__ = ["FusedSequential", "GroupedLocalResponseNorm", "SpatialResponseNorm", "fuse", "pack"]
