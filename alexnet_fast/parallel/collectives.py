"""What ranks send each other in the middle of a net, with its derivatives, and a count of the bytes.

Where the result of a sum over ranks is split, each rank adds its part in the order of the ranks: the bits are then the
same with every communication library.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from alexnet_fast.parallel.ranks import Ranks


def bytes_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


def gather(x: Tensor, ranks: Ranks, kind: str, dim: int = 0) -> Tensor:
    """Every rank's ``x``, all of one shape, one after the other along ``dim``."""
    if ranks.world == 1:
        return x
    x = x.contiguous()
    parts = x.new_empty((ranks.world, *x.shape))
    dist.all_gather(list(parts.unbind(0)), x)
    ranks.sent[kind] += (ranks.world - 1) * bytes_of(x)
    return torch.cat(parts.unbind(0), dim) if dim else parts.flatten(0, 1)


def sum_scattered(x: Tensor, ranks: Ranks, kind: str, dim: int = 0) -> Tensor:
    """This rank's part, one of ``world`` equal ones along ``dim``, of the sum of every rank's ``x``."""
    if ranks.world == 1:
        return x
    parts = torch.stack(x.chunk(ranks.world, dim)).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts)
    ranks.sent[kind] += (ranks.world - 1) * bytes_of(parts[0])
    return received.sum(0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks, partial: bool) -> Tensor:
        ctx.ranks, ctx.partial = ranks, partial
        return gather(x, ranks, "activations", dim=1)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ranks = ctx.ranks
        if ctx.partial:
            return sum_scattered(dy, ranks, "activations", dim=1), None, None
        return dy.chunk(ranks.world, 1)[ranks.rank], None, None


def gather_features(x: Tensor, ranks: Ranks, partial: bool = True) -> Tensor:
    """The whole of an activation of which each rank has computed a part of the features, dimension 1.

    With ``partial``, each rank uses it for its own part of the next layer, so the gradient is a sum over ranks.
    Otherwise all ranks compute the same from it, and each has the whole gradient already.
    """
    return _Gather.apply(x, ranks, partial)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        y = x.clone()
        if ranks.world > 1:
            dist.all_reduce(y)
            ranks.sent["activations"] += 2 * (ranks.world - 1) * bytes_of(y) // ranks.world
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return dy, None


def sum_parts(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum of every rank's ``x``, from which each then computes the same."""
    return _Sum.apply(x, ranks)
