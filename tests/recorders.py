"""A stand-in for CUDA graphs, for processors that have none: it keeps what to run, and runs it anew in each replay."""

from __future__ import annotations

import pytest
import torch

from alexnet_fast import recording


class StandIn:
    """As of a graph, gradients are written to the same memory in each replay. ``refuses``: the numbers of the
    recordings that fail."""

    made = 0
    refuses: tuple[int, ...] = ()

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @staticmethod
    def stream(device):
        return 0

    def warm_up(self, run):
        return run()

    def record(self, run, generators=()):
        StandIn.made += 1
        if StandIn.made in StandIn.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        written = []

        def replay() -> None:
            made = run() or []
            written.extend(made[len(written) :])
            for kept, new in zip(written, made, strict=True):
                if kept is not None and kept is not new:
                    kept.copy_(new)

        return replay


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """Work on the CPU is recorded by StandIn."""
    monkeypatch.setitem(recording.RECORDERS, "cpu", StandIn)
    monkeypatch.setattr(StandIn, "made", 0)
    monkeypatch.setattr(StandIn, "refuses", ())
    return StandIn
