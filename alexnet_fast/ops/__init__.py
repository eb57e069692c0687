"""The operators. Each page holds one: formula, schema, fake, gradient and the public function."""

from alexnet_fast.geometry import LRN, Pool, SpaceToDepth
from alexnet_fast.ops.augment import augment
from alexnet_fast.ops.conv_relu import conv_relu
from alexnet_fast.ops.conv_stage import conv_stage
from alexnet_fast.ops.epilogue import epilogue
from alexnet_fast.ops.linear_int8 import linear_int8
from alexnet_fast.ops.linear_relu import linear_relu
from alexnet_fast.ops.linear_relu_dropout import linear_relu_dropout
from alexnet_fast.ops.lpips_layer import lpips_layer
from alexnet_fast.ops.lrn import local_response_norm
from alexnet_fast.ops.max_pool import max_pool2d

__all__ = [
    "LRN",
    "Pool",
    "SpaceToDepth",
    "augment",
    "conv_relu",
    "conv_stage",
    "epilogue",
    "linear_int8",
    "linear_relu",
    "linear_relu_dropout",
    "local_response_norm",
    "lpips_layer",
    "max_pool2d",
]
