"""Times on a GPU by CUDA events: cold, warm, and as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .results import timed

# Larger than any card's L2: writing it between two calls leaves nothing of their tensors there.
FLUSH_BYTES = 2**28


class Clock:
    """Seconds of a call on the card, between two CUDA events."""

    def __init__(self) -> None:
        self.scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        # Bytes that leave nothing in the L2 of what was touched before them.
        self.rotation = 3 * torch.cuda.get_device_properties(0).L2_cache_size

    def cold(self, call: Callable[[], object]) -> float:
        """Nothing of its tensors is in the L2."""
        self.scratch.zero_()
        return self._between_events(call)

    def warm(self, call: Callable[[], object]) -> float:
        """After another call on the same tensors."""
        call()
        return self._between_events(call)

    def _between_events(self, call: Callable[[], object]) -> float:
        self.events[0].record()
        call()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3

    def captured(self, call: Callable[[], object]) -> Callable[[], object] | None:
        return captured(call)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


def rounds_of(
    seconds_of: Callable[[Callable[[], object]], float],
    calls: dict[str, Callable[[], object]],
    seconds: float,
    least: int = 10,
    most: int = 100,
) -> dict[str, list[float]]:
    """Times of each call, interleaved, for about ``seconds`` in all."""
    first = [seconds_of(call) for call in calls.values()]
    rounds = max(least, min(most, int(seconds / max(sum(first), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    return times


def event_times(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Of each side and peer, interleaved: ``ms`` and ``ratio`` cold, the L2 overwritten before each call; ``warm``, one
    call after the other on the same tensors; ``graph``, warm replays without launch costs, where the side can be
    captured."""
    clock, third = Clock(), seconds / 3
    on_stream = {name: call for name, call in sides.items() if name != "JAX"}  # XLA has streams of its own
    result = timed(rounds_of(clock.cold, on_stream, third))
    result["warm"] = timed(rounds_of(clock.warm, on_stream, third))
    graphs = {name: graph for name, call in on_stream.items() if (graph := captured(call))}
    if "ours" in graphs:
        result["graph"] = timed(rounds_of(clock.warm, graphs, third))
    return result


def captured(call: Callable[[], object]) -> Callable[[], object] | None:
    """Replays of ``call``; None if it cannot be captured, as what synchronizes or is a replay itself."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay
