"""Local response normalization as ONNX's own node, in both of torch's exporters.

    y_c = x_c · (bias + alpha/size · Σ x_j²)^-beta,    j = c - ⌊(size-1)/2⌋ … c + ⌈(size-1)/2⌉

For odd sizes that is torch's. An even window leans to the other side, and ONNX Runtime refuses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch.onnx
from torch import Tensor


class _Node(torch.autograd.Function):
    """The node, for the exporter that traces: it asks a function for its ``symbolic``."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        return F.local_response_norm(x, size, alpha, beta, k)

    @staticmethod
    def symbolic(g, x, size: int, alpha: float, beta: float, k: float):
        return g.op("LRN", x, size_i=size, alpha_f=alpha, beta_f=beta, bias_f=k).setType(x.type())


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    """The normalization of (N, C, *), with the parts that ``groups`` makes as images of a batch. By torch's operators
    for even windows, and for float64, which runtimes have no such node for."""
    parameters = int(size), float(alpha), float(beta), float(k)
    images = x if x.dim() == 4 else x.flatten(2).unsqueeze(-1)
    if groups > 1:
        images = images.reshape(-1, images.shape[1] // groups, *images.shape[2:])
    if size % 2 == 0 or x.dtype == torch.float64:
        y = F.local_response_norm(images, *parameters)
    elif torch.jit.is_tracing():
        y = _Node.apply(images, *parameters)
    else:
        attributes = dict(zip(("size", "alpha", "beta", "bias"), parameters, strict=True))
        y = torch.onnx.ops.symbolic("LRN", (images,), attributes, dtype=images.dtype, shape=images.shape)
    return y.reshape(x.shape)
