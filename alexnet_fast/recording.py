"""Work of a device, recorded once to be repeated without Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


class Cuda:
    """Records work in CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

    @staticmethod
    def stream(device: torch.device) -> int | None:
        """The number of the device's current stream; None while somebody else records what is called on it."""
        with torch.cuda.device(device):
            return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream().cuda_stream

    def warm_up(self, run: Run) -> Any:
        """``run()`` on a stream of its own: what it makes for later calls must not belong to the current stream."""
        current = torch.cuda.current_stream(self.device)
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            result = run()
        current.wait_stream(self.side)
        if isinstance(result, Tensor):
            result.record_stream(current)
        return result

    def record(self, run: Run, generators: Iterable[torch.Generator] = ()) -> Run:
        """A function that repeats the work of ``run()``, which is recorded here and not done. Each replay works in the
        memory of the recording, and draws from ``generators`` with the seeds that they have then."""
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # Other threads, such as those that load images, may go on with what a recording forbids to this one.
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        return graph.replay


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": Cuda}
