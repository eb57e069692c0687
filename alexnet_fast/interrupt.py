"""Ctrl-C while the command ``alexnet-fast`` imports its modules, which takes seconds, ends it as it does later: with
exit code 130 and no traceback. In any other program this does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import PurePath


def _end(number: int, frame: object) -> None:
    os._exit(128 + number)


def main_has_begun() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt again, which the command answers itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# While Python looks for the module of -m its name is not known yet.
_name = getattr(sys, "argv", [""])[0]
IS_THE_COMMAND = PurePath(_name).name == "alexnet-fast" or (_name == "-m" and "alexnet_fast" in sys.orig_argv)
if IS_THE_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
