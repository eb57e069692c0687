"""The C library's allocator, told that this process computes with large tensors."""

from __future__ import annotations

import ctypes


def keep_memory() -> bool:
    """Has malloc keep what is freed, as allocators made for training do; False where malloc is not glibc's.

    By default glibc maps every tensor of 32 MiB or more anew. Its pages then fault one by one at their first touch, at
    9,000 of them several times as long as an operator takes. It holds for the process and cannot be undone.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 2**26))
