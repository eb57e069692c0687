"""The operators in plain PyTorch: slow, differentiable, readable as the formula. Kernels are checked against these.

``NAME_backward`` is the gradient of operator ``NAME``, with the arguments of the operator of that name: by torch's
operators, so that it has gradients itself, of any order.
"""

from alexnet_fast.reference.augment import augment
from alexnet_fast.reference.conv_relu import conv_relu, conv_relu_backward
from alexnet_fast.reference.conv_stage import conv_stage
from alexnet_fast.reference.epilogue import epilogue, epilogue_backward
from alexnet_fast.reference.linear_int8 import linear_int8
from alexnet_fast.reference.linear_relu import linear_relu
from alexnet_fast.reference.linear_relu_dropout import linear_relu_dropout, linear_relu_dropout_backward
from alexnet_fast.reference.lpips_layer import lpips_layer, lpips_layer_backward
from alexnet_fast.reference.lrn import local_response_norm, lrn_backward
from alexnet_fast.reference.max_pool import max_pool2d, max_pool_backward

__all__ = [
    "augment",
    "conv_relu",
    "conv_relu_backward",
    "conv_stage",
    "epilogue",
    "epilogue_backward",
    "linear_int8",
    "linear_relu",
    "linear_relu_dropout",
    "linear_relu_dropout_backward",
    "local_response_norm",
    "lpips_layer",
    "lpips_layer_backward",
    "lrn_backward",
    "max_pool2d",
    "max_pool_backward",
]
