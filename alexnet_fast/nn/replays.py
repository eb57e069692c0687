"""Inference on GPUs as replays of CUDA graphs, for nets that :func:`alexnet_fast.pack` was asked for."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from alexnet_fast import backends
from alexnet_fast.ops.convolution import prepared_by
from alexnet_fast.recording import RECORDERS, Run

MOST = 8  # forms of input that are kept, each with the memory of all its activations; the least recently used goes


class Prepared:
    """A convolution's weight as csrc/cuda reads it, in memory that stays, so that a recording may read it."""

    def __init__(self, weight: Tensor, *geometry: tuple[int, ...]) -> None:
        self.weight, self.geometry = weight, geometry
        self.version = weight._version
        self.tensor = self._prepare()

    def _prepare(self) -> Tensor:
        # Not as a tensor of inference mode, which could not be written again outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return torch.ops.alexnet_fast.conv_prepare(self.weight, *self.geometry)

    def follow(self) -> None:
        """Prepares the weight anew if it was written in place since."""
        version = self.weight._version
        if self.version != version:
            self.tensor.copy_(self._prepare())
            self.version = version


@dataclass
class Replay:
    """What was recorded for one form of input, and the tensors that it reads and writes. ``weights``: those that it
    reads prepared, by weight, stride and dilation; ``asked``: those for which its newest run has asked."""

    weights: dict[tuple, Prepared] = field(default_factory=dict)
    asked: dict[tuple, Tensor] = field(default_factory=dict)
    input: Tensor | None = None
    run: Run | None = None
    result: Tensor | None = None


class Replays:
    """``run``, a function of one tensor that reads ``parameters`` and is the same work for each input of a form.

    In inference on a device that can record, the first call of a form (shape, strides, dtype, stream) runs as it
    stands, the second is recorded, and that one and the later ones are replayed: two copies, the input's into the
    recording's memory and the result's out of it, and one launch. Parameters are read where they lie, so that new
    values written there are followed; recordings are dropped when one lies elsewhere.

    Weights that this package's CUDA convolutions would bring into their form in each call are prepared once, for all
    recordings on a stream, and anew, in the same memory, by the call that finds the weight's version changed.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> None:
        self.run, self.parameters = run, parameters
        self.recorded: OrderedDict[tuple, Replay] = OrderedDict()
        self.prepared: WeakValueDictionary[tuple, Prepared] = WeakValueDictionary()
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
                self.prepared.clear()
                self.places = places
            inference = torch.is_inference_mode_enabled()  # tensors made there cannot be written elsewhere
            form = x.shape, x.stride(), x.dtype, x.device, stream, inference, backends.current()
            replay = self.recorded.get(form)
            if replay is None:
                replay = self.recorded[form] = Replay()
                if len(self.recorded) > MOST:
                    self.recorded.popitem(last=False)
                return make(x.device).warm_up(lambda: self._run(replay, x))
            if replay.run is None and not self._record(replay, make(x.device), stream, x):
                self.recorded.clear()
                return self.run(x)
            self.recorded.move_to_end(form)
            for prepared in replay.weights.values():
                prepared.follow()
            replay.input.copy_(x)
            replay.run()
            return replay.result.clone()

    def _run(self, replay: Replay, x: Tensor) -> Tensor:
        replay.asked = {}

        def find(weight: Tensor, *geometry: tuple[int, ...]) -> Tensor | None:
            if weight.is_inference() or not any(weight is parameter for parameter in self.parameters):
                return None  # nothing would tell that it has changed
            key = id(weight), *geometry
            replay.asked[key] = weight
            prepared = replay.weights.get(key)
            return None if prepared is None else prepared.tensor

        with prepared_by(find):
            return self.run(x)

    def _record(self, replay: Replay, recorder, stream: int, x: Tensor) -> bool:
        replay.input = x.clone()

        def run() -> None:
            replay.result = self._run(replay, replay.input)

        try:
            for key, weight in replay.asked.items():
                prepared = self.prepared.get((stream, *key)) or Prepared(weight, *key[1:])
                replay.weights[key] = self.prepared[(stream, *key)] = prepared
            replay.run = recorder.record(run)
        except RuntimeError as error:
            self.refused = str(error).strip().partition("\n")[0]
            warnings.warn(f"pack: inference runs without a graph: {self.refused}", RuntimeWarning, stacklevel=3)
            return False
        # Not those that were only asked for while candidates were measured.
        replay.weights = {key: prepared for key, prepared in replay.weights.items() if key in replay.asked}
        return True
