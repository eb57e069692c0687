"""The two response normalizations of 2012 that torch.nn lacks."""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet_fast.backends import exports_plainly
from alexnet_fast.ops import local_response_norm


def spatial_response_norm(input: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    mean = F.avg_pool2d(x.square(), size, stride=1, padding=size // 2)  # padding counts: Σ / size²
    return (x * (k + alpha * mean).pow(-beta)).to(input.dtype)


# torch.fx, so torchvision's feature extraction, keeps these calls whole: they look at the input's type and dtype, which
# its proxies lack.
torch.fx.wrap("local_response_norm")
torch.fx.wrap("spatial_response_norm")


class GroupedLocalResponseNorm(nn.LocalResponseNorm):
    """Local response normalization whose windows end at the borders of ``groups`` equal parts of the channels.

    So normalizes a layer that is split over two GPUs, each of which sees its own half. Formula and arguments as in
    :func:`alexnet_fast.ops.local_response_norm`; with ``groups=1`` it is :class:`torch.nn.LocalResponseNorm`.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, groups: int = 1) -> None:
        super().__init__(size, alpha, beta, k)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():  # of every part its own, as if it were an image
            parts = input.unflatten(1, [self.groups, -1]).flatten(0, 1)
            return F.local_response_norm(parts, self.size, self.alpha, self.beta, self.k).reshape(input.shape)
        else:  # noqa: RET505  TorchScript leaves out this branch, but nothing that would follow it
            named = "reference" if exports_plainly() else None
            return local_response_norm(
                input, self.size, self.alpha, self.beta, self.k, groups=self.groups, backend=named
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class SpatialResponseNorm(nn.Module):
    """Response normalization over a square of pixels of one channel: cuda-convnet's ``rnorm``, Caffe's WITHIN_CHANNEL.

        y = x · (k + alpha/size² · Σ x²)^-beta,    Σ over the size x size square around the pixel, cut at the borders

    Args:
        size: the square's side, odd.
        alpha, beta, k: as above.

    Shape: (N, C, H, W) or (C, H, W), kept. float16 and bfloat16 are computed in float32.
    """

    def __init__(self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size: expected a positive odd int, got {size!r}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def forward(self, input: Tensor) -> Tensor:
        return spatial_response_norm(input, self.size, self.alpha, self.beta, self.k)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
