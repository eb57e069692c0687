"""Times on a GPU by CUDA events: cold, warm, and as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .results import timed

# Larger than any card's L2: writing it between two calls leaves nothing of their tensors there.
FLUSH_BYTES = 2**28


def event_times(sides: dict[str, Callable[[], object]], seconds: float) -> dict[str, Any]:
    """Of each side and peer, interleaved: ``ms`` and ``ratio`` cold, the L2 overwritten before each call; ``warm``, one
    call after the other on the same tensors; ``graph``, warm replays without launch costs, where the side can be
    captured."""
    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def seconds_of(call: Callable[[], object], cold: bool) -> float:
        if cold:
            scratch.zero_()
        else:
            call()
        events[0].record()
        call()
        events[1].record()
        events[1].synchronize()
        return events[0].elapsed_time(events[1]) / 1e3

    def rounds_of(calls: dict[str, Callable[[], object]], cold: bool) -> dict[str, list[float]]:
        first = {name: seconds_of(call, cold) for name, call in calls.items()}
        rounds = max(10, min(100, int(seconds / 3 / max(sum(first.values()), 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(seconds_of(call, cold))
        return times

    on_stream = {name: call for name, call in sides.items() if name != "JAX"}  # XLA has streams of its own
    result = timed(rounds_of(on_stream, cold=True))
    result["warm"] = timed(rounds_of(on_stream, cold=False))
    graphs = {name: graph for name, call in on_stream.items() if (graph := captured(call))}
    if "ours" in graphs:
        result["graph"] = timed(rounds_of(graphs, cold=False))
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
