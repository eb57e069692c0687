"""AlexNet and its stages as custom PyTorch operators, with CPU, CUDA and Triton kernels."""

from alexnet_fast import native as native  # first: it finds the _C that the others import
from alexnet_fast import ops, reference
from alexnet_fast.backends import BackendError, backend
from alexnet_fast.models import LPIPS, AlexNet, alexnet, features
from alexnet_fast.nn import FusedSequential, fuse, pack

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
    "ops",
    "pack",
    "reference",
]
