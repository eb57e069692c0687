"""Errors that a command answers with one line: what is wrong, and what is wanted."""

from __future__ import annotations

import importlib.util


class InputError(ValueError):
    """What the user gave cannot be used. Commands print ``error: <message>`` and exit with 2."""


class RunError(RuntimeError):
    """A run broke off through no fault of its input. Commands print ``error: <message>`` and exit with 1."""


def needs(what: str, *packages: str) -> None:
    """Raises :class:`InputError` where one of ``packages``, of the same name for pip, is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"{what}: needs {name}: pip install {name}")


def out_of_memory(error: BaseException) -> RunError | None:
    """What to say where ``error`` is Python's or torch's for want of memory; None where it is another."""
    text = str(error)
    allocators = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(part in text for part in allocators)):
        reason = f" ({text.splitlines()[0]})" if text else ""
        return RunError(f"out of memory{reason}; a smaller --batch-size or --image-size takes less")
    return None
