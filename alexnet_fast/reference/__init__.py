"""The operators in plain PyTorch: slow, differentiable, readable as the formula. Kernels are checked against these."""

from alexnet_fast.reference.augment import augment
from alexnet_fast.reference.conv_relu import conv_relu
from alexnet_fast.reference.conv_stage import conv_stage
from alexnet_fast.reference.epilogue import epilogue
from alexnet_fast.reference.linear_relu_dropout import linear_relu_dropout
from alexnet_fast.reference.lpips_layer import lpips_layer
from alexnet_fast.reference.lrn import local_response_norm
from alexnet_fast.reference.max_pool import max_pool2d

__all__ = [
    "augment",
    "conv_relu",
    "conv_stage",
    "epilogue",
    "linear_relu_dropout",
    "local_response_norm",
    "lpips_layer",
    "max_pool2d",
]
