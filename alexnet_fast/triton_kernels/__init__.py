"""Triton kernels of every operator: importing this package registers them as ``alexnet_fast::NAME_triton``.

One file a stem: formula, kernels, launchers, and at the foot the operators. Under TRITON_INTERPRET=1, set before triton
is first imported, the same kernels run on CPU tensors, slowly, through NumPy.
"""

from alexnet_fast.triton_kernels import (  # noqa: F401  each registers its operators
    augment,
    conv_relu,
    conv_stage,
    epilogue,
    linear_int8,
    linear_relu_dropout,
    lpips_layer,
    lrn,
    max_pool,
)
