"""The signals that end a run."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

from alexnet_fast.parallel import PASSED_ON

SAME_SIGNAL = 0.2  # seconds in which a second signal counts as the first: some programs signal a process and its group


class Signal:
    """``number`` is that of the SIGINT or SIGTERM that this process was sent, or 0."""

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within the block the first signal is noted, and a second one ends the process. A signal that the launcher
        passed on counts as the one that the launcher was sent."""
        sent = {passed: number for number, passed in PASSED_ON.items()}
        noted = 0.0

        def note(number: int, frame: object) -> None:
            nonlocal noted
            now = time.monotonic()
            if self.number and now - noted > SAME_SIGNAL:
                os._exit(128 + self.number)
            if not self.number:
                self.number, noted = sent.get(number, number), now

        numbers = [n for n in {signal.SIGINT, *sent} if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
