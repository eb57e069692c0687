"""AlexNet and its stages as custom PyTorch operators, with CPU, CUDA and Triton kernels."""

from alexnet_fast import interrupt as interrupt  # before all that takes seconds
from alexnet_fast import native as native  # it finds the _C that the others import
from alexnet_fast import ops, reference
from alexnet_fast.backends import BackendError, backend
from alexnet_fast.graphs import graphed_step
from alexnet_fast.models import LPIPS, AlexNet
from alexnet_fast.models.alexnet import alexnet
from alexnet_fast.models.features import features
from alexnet_fast.nn import FusedSequential, fuse, fusion_report, pack

__version__ = "0.1.0"
__all__ = [
    "LPIPS",
    "AlexNet",
    "BackendError",
    "FusedSequential",
    "alexnet",
    "backend",
    "features",
    "fuse",
    "fusion_report",
    "graphed_step",
    "ops",
    "pack",
    "reference",
]
