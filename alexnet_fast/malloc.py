"""The C library's allocator, told that this process computes with large tensors."""

from __future__ import annotations

import ctypes


def keep_memory() -> bool:
    """Has malloc keep what is freed, as allocators made for training do; False where malloc is not glibc's.

    By default glibc asks the system for new memory for every tensor of 32 MiB or more, and each of its pages, 9,000 of
    them and up, faults when it is first touched. That takes several times as long as an operator. The setting holds for
    the whole process and cannot be undone.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1) and mallopt(top_pad, 2**26))
