"""Inference on GPUs as replays of CUDA graphs, for nets that :func:`alexnet_fast.pack` was asked for."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from alexnet_fast import backends
from alexnet_fast.recording import RECORDERS, Run

MOST = 8  # forms of input that are kept, each with the memory of all its activations; the least recently used goes


@dataclass
class Replay:
    """What was recorded for one form of input, and the tensors that it reads and writes."""

    input: Tensor
    run: Run | None = None
    result: Tensor | None = None


class Replays:
    """``run``, a function of one tensor that reads ``parameters`` and is the same work for each input of a form.

    In inference on a device that can record, the first call of a form (shape, strides, dtype, stream) runs as it
    stands, the second is recorded, and that one and the later ones are replayed: two copies, the input's into the
    recording's memory and the result's out of it, and one launch. Parameters are read where they lie, so that new
    values written there are followed; recordings are dropped when one lies elsewhere.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> None:
        self.run, self.parameters = run, parameters
        self.recorded: OrderedDict[tuple, Replay | None] = OrderedDict()
        self.places: list[int] = []
        self.lock = Lock()  # copy, launch and copy of two threads on one stream must not be mixed
        self.refused = ""  # why nothing is recorded

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or type(x) is not Tensor or self.refused:
            return self.run(x)
        make = RECORDERS.get(x.device.type)
        stream = make and make.stream(x.device)
        if stream is None:
            return self.run(x)
        with self.lock:
            places = [parameter.data_ptr() for parameter in self.parameters]
            if places != self.places:
                self.recorded.clear()
                self.places = places
            inference = torch.is_inference_mode_enabled()  # tensors made there cannot be written elsewhere
            form = x.shape, x.stride(), x.dtype, x.device, stream, inference, backends.current()
            if form not in self.recorded:
                self.recorded[form] = None
                if len(self.recorded) > MOST:
                    self.recorded.popitem(last=False)
                return make(x.device).warm_up(lambda: self.run(x))
            replay = self.recorded[form]
            if replay is None:
                replay = self.recorded[form] = self._record(make(x.device), x)
                if replay is None:
                    return self.run(x)
            self.recorded.move_to_end(form)
            replay.input.copy_(x)
            replay.run()
            return replay.result.clone()

    def _record(self, recorder, x: Tensor) -> Replay | None:
        replay = Replay(x.clone())

        def run() -> None:
            replay.result = self.run(replay.input)

        try:
            replay.run = recorder.record(run)
        except RuntimeError as error:
            self.refused = str(error).strip().partition("\n")[0]
            warnings.warn(f"pack: inference runs without a graph: {self.refused}", RuntimeWarning, stacklevel=2)
            return None
        return replay
