"""Errors that a command answers with one line: what is wrong, and what is wanted."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used. Commands print ``error: <message>`` and exit with 2."""


class RunError(RuntimeError):
    """A run broke off through no fault of its input. Commands print ``error: <message>`` and exit with 1."""
