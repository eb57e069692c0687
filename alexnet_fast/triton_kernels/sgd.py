"""One step of SGD for all parameters of a net, in one launch.

    torch   g ← g + λw;  v ← μv + (1 − d)g, at first v ← g;  g ← v, or g + μv (Nesterov);  w ← w − εg
    2012    v ← μv − λεw − εg;  w ← w + v

Tile: 2048 neighbouring elements of one parameter. A table in memory says where each parameter, its gradient, velocity
and 16-bit copy begin; a second one says which parameter a tile belongs to, and where in it.
Bytes: g, w and v read once; w, v and the copy written once: 20 an element, with 16-bit gradients and copies or without.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from alexnet_fast.triton_kernels.launch import INTERPRETED

# In a tile: eight for each thread of eight warps. The interpreter pays by the operation, whatever the tile.
ELEMENTS = 2**17 if INTERPRETED else 2048
KINDS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _update(
    w_ptr,
    g_ptr,
    v_ptr,
    copy_ptr,
    mask,
    lr,
    momentum,
    keep,
    weight_decay,
    decayed_lr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    COPY: tl.constexpr,
    RULE_2012: tl.constexpr,
):
    w = tl.load(w_ptr, mask)
    g = tl.load(g_ptr, mask).to(tl.float32)
    if RULE_2012:
        v = tl.load(v_ptr, mask) * momentum - decayed_lr * w - lr * g
        w += v
        tl.store(v_ptr, v, mask)
    else:
        if DECAY:
            g += weight_decay * w
        if MOMENTUM:
            v = g
            if not FIRST:
                v = tl.load(v_ptr, mask) * momentum + keep * g
            tl.store(v_ptr, v, mask)
            g = g + momentum * v if NESTEROV else v
        w -= lr * g
    tl.store(w_ptr, w, mask)
    if COPY:
        tl.store(copy_ptr, w, mask)


@triton.jit
def _kernel(
    table_ptr,
    tile_ptr,
    lr,
    momentum,
    keep,
    weight_decay,
    decayed_lr,
    KIND: tl.constexpr,
    MOMENTUM: tl.constexpr,
    DECAY: tl.constexpr,
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,
    COPY: tl.constexpr,
    RULE_2012: tl.constexpr,
    ALIGNED: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """keep: 1 − dampening. decayed_lr: weight_decay · lr. KIND: the gradients' type, and the copies'."""
    row = table_ptr + 5 * tl.load(tile_ptr + 2 * tl.program_id(0))
    start = tl.multiple_of(tl.load(tile_ptr + 2 * tl.program_id(0) + 1), ELEMENTS)
    left = tl.load(row + 4) - start
    element = tl.arange(0, ELEMENTS)
    w_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.float32)), ALIGNED) + start + element
    g_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(KIND)), ALIGNED) + start + element
    v_ptr = tl.multiple_of(tl.load(row + 2).to(tl.pointer_type(tl.float32)), ALIGNED) + start + element
    copy_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(KIND)), ALIGNED) + start + element
    if left >= ELEMENTS:  # without a mask loads are 16 bytes wide: nearly all tiles
        _update(
            *(w_ptr, g_ptr, v_ptr, copy_ptr, None, lr, momentum, keep, weight_decay, decayed_lr),
            *(MOMENTUM, DECAY, NESTEROV, FIRST, COPY, RULE_2012),
        )
    else:
        _update(
            *(w_ptr, g_ptr, v_ptr, copy_ptr, element < left, lr, momentum, keep, weight_decay, decayed_lr),
            *(MOMENTUM, DECAY, NESTEROV, FIRST, COPY, RULE_2012),
        )


@lru_cache(64)
def _tiles(sizes: tuple[int, ...], elements: int, device: torch.device) -> Tensor:
    """int64 (tiles, 2): each tile's parameter, and its first element there."""
    rows = [(i, start) for i, size in enumerate(sizes) for start in range(0, size, elements)]
    return torch.tensor(rows, dtype=torch.int64, device=device)


captured: list[tuple[Tensor, Tensor]] = []  # what CUDA graphs read in each replay, for as long as the process lives


@lru_cache(64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 (parameters, 5): addresses of weight, gradient, velocity and copy, and the number of elements."""
    return torch.tensor(rows, dtype=torch.int64, device=device)


def step(
    rows: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    rule_2012: bool,
    first: bool,
) -> None:
    """Steps all parameters in place.

    A row holds a parameter's float32 weight, its gradient, velocity and 16-bit copy, all of the same strides. All rows
    have the same dtypes, and all or none a velocity and a copy.
    """
    weight, grad, _velocity, copy = rows[0]
    addresses = tuple((*(0 if t is None else t.data_ptr() for t in row), row[0].numel()) for row in rows)
    tiles = _tiles(tuple(row[0].numel() for row in rows), ELEMENTS, weight.device)
    if not len(tiles):
        return
    table = _table(addresses, weight.device)
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        captured.append((table, tiles))
    with torch.cuda.device_of(weight):
        _kernel[(len(tiles),)](
            table,
            tiles,
            lr,
            momentum,
            1 - dampening,
            weight_decay,
            weight_decay * lr,
            KIND=KINDS[grad.dtype],
            MOMENTUM=momentum != 0,
            DECAY=weight_decay != 0,
            NESTEROV=nesterov,
            FIRST=first,
            COPY=copy is not None,
            RULE_2012=rule_2012,
            ALIGNED=16 if all(address % 16 == 0 for row in addresses for address in row[:4]) else 1,
            ELEMENTS=ELEMENTS,
            num_warps=8,
        )
