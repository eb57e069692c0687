"""What a command prints: names come from strangers, and the stream may not know every letter."""

from __future__ import annotations

import contextlib
import difflib
import io
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def shown(text: object) -> str:
    """``text`` on one line of printable characters. What a terminal would obey, or no encoding has, stands as an
    escape: a byte of a file's name that is not UTF-8 as ``\\xe9``.
    """
    return "".join(char if char.isprintable() else _escaped(char) for char in str(text))


def _escaped(char: str) -> str:
    code = ord(char)
    byte = 0xDC80 <= code <= 0xDCFF  # as Python's surrogateescape carries it
    return f"\\x{code - 0xDC00:02x}" if byte else char.encode("unicode_escape").decode()


def one_line(text: object) -> str:
    """``text``, its line breaks and runs of spaces made one space each, as :func:`shown`."""
    return shown(" ".join(str(text).split()))


def say(console: Console, text: str) -> None:
    """One line, as it is: no markup, no colours, no break at the terminal's width."""
    console.print(shown(text), markup=False, highlight=False, soft_wrap=True)


def escape_unknown_letters() -> None:
    """Standard output and error print what their encoding lacks as escapes, where they would raise."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # closed
                stream.reconfigure(errors="backslashreplace")


def nearest(word: object, known: Iterable[str]) -> str:
    """``; did you mean …?`` with the known words that look like ``word``, or nothing."""
    close = difflib.get_close_matches(str(word), list(known), 3)
    return f"; did you mean {' or '.join(close)}?" if close else ""
