"""A training step as CUDA graphs: the host replays what was recorded, and runs none of the net's Python."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet_fast.recording import RECORDERS, Run


@dataclass
class Recorded:
    """What was recorded for one form of the batch, and the tensors that it reads and writes."""

    inputs: tuple[Tensor, ...]
    replay: Run
    result: Tensor | None = None
    gradients: list[tuple[Tensor, Tensor | None]] | None = None
    update: Run | None = None
    options: tuple | None = None  # what the optimizer worked by in the newest call


class Graphed:
    """Training steps as the replay of two graphs. One is of ``work(*inputs, *constants)``, which gives gradients to the
    parameters of ``optimizer`` and returns a tensor; the other is of ``update()``, which steps the optimizer.

    Where the net's or the optimizer's part could not be recorded, ``refused`` says why.

    Args:
        net: a recording holds for one mode of it, training or evaluation.
        warmup, most: as in :func:`graphed_step`.
        name: what warnings begin with.
        generators: seeds the generators that ``work`` draws from, besides the device's own, and returns them. It is
            called before each recording and replay of ``work``.
        proved: take a recording only if its first replay gives the same bits as ``work`` itself. This is for work that
            gives the same bits each time.
    """

    def __init__(
        self,
        work: Callable[..., Tensor],
        update: Run,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        warmup: int,
        most: int,
        name: str,
        generators: Callable[[], Iterable[torch.Generator]] = tuple,
        proved: bool = False,
    ) -> None:
        self.work, self.update, self.net, self.optimizer = work, update, net, optimizer
        self.warmup, self.most, self.name = warmup, most, name
        self.generators, self.proved = generators, proved
        self.refused: dict[str, str] = {}
        self.recorder: Any = None
        self.forget()

    def forget(self) -> None:
        """Drops all recordings: for changes that a step does not notice, such as hooks and replaced buffers."""
        self.recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self.calls: Counter[tuple] = Counter()
        self.state: tuple = ()

    def __call__(self, *inputs: Tensor, constants: tuple = ()) -> Tensor:
        if inputs[0].device.type not in RECORDERS or "net" in self.refused:
            return self._eager(inputs, constants)
        if self.recorder is None or self.recorder.device != inputs[0].device:
            self.forget()
            self.recorder = RECORDERS[inputs[0].device.type](inputs[0].device)
        state = self._state()
        if state != self.state:
            self.forget()
            self.state = state
        form = (*((t.shape, t.stride(), t.dtype, t.device) for t in inputs), constants)
        if form not in self.recorded:
            if self.calls[form] < self.warmup:
                self.calls[form] += 1
                return self.recorder.warm_up(lambda: self._eager(inputs, constants))
            recorded = self._record(inputs, constants)
            if recorded is None:
                return self._eager(inputs, constants)
            self.recorded[form] = recorded
            if len(self.recorded) > self.most:
                self.recorded.popitem(last=False)
        self.recorded.move_to_end(form)
        recorded = self.recorded[form]
        self._replay(recorded, inputs)
        self._step(recorded)
        return recorded.result.clone()

    def _eager(self, inputs: tuple[Tensor, ...], constants: tuple) -> Tensor:
        result = self.work(*inputs, *constants)
        self.update()
        return result.detach()

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _state(self) -> tuple:
        """What a recording holds for: the mode of the net, and where its parameters lie."""
        return (
            self.net.training,
            torch.is_autocast_enabled("cuda"),
            *((id(p), p.data_ptr(), p.requires_grad) for p in self._parameters()),
        )

    def _options(self) -> tuple:
        """What a recording of the optimizer's step holds for: numbers by value, tensors by identity."""
        values = [v for group in self.optimizer.param_groups for name, v in group.items() if name != "params"]
        states = [id(v) for state in self.optimizer.state.values() for v in state.values()]
        return (*[id(v) if isinstance(v, Tensor) else v for v in values], *states)

    def _record(self, inputs: tuple[Tensor, ...], constants: tuple) -> Recorded | None:
        recorded = Recorded(tuple(tensor.detach().clone() for tensor in inputs), lambda: None)

        def run() -> list[Tensor | None]:
            recorded.result = self.work(*recorded.inputs, *constants).detach()
            return [parameter.grad for parameter in self._parameters()]

        replay = self._try("net", run, self.generators())
        if replay is None:
            return None
        recorded.replay = replay
        if self.proved and not self._proves(recorded, inputs, constants):
            self._refuse("net", "what a graph replays is not what the step itself gives")
            return None
        return recorded

    def _proves(self, recorded: Recorded, inputs: tuple[Tensor, ...], constants: tuple) -> bool:
        """Whether a replay gives what the step as it stands gives: result and gradients, bit for bit."""
        self._replay(recorded, inputs)
        got = [recorded.result, *[gradient for _, gradient in recorded.gradients]]
        got = [tensor if tensor is None else tensor.clone() for tensor in got]
        wanted = [self.work(*inputs, *constants).detach(), *[parameter.grad for parameter in self._parameters()]]
        return all(
            (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))
            for one, other in zip(got, wanted, strict=True)
        )

    def _try(self, part: str, run: Run, generators: Iterable[torch.Generator] = ()) -> Run | None:
        try:
            return self.recorder.record(run, generators)
        except RuntimeError as error:
            self._refuse(part, str(error).strip().partition("\n")[0])
            return None

    def _refuse(self, part: str, reason: str) -> None:
        self.refused[part] = reason
        self.optimizer.zero_grad()
        warnings.warn(f"{self.name}: the {part}'s part runs without a graph: {reason}", RuntimeWarning, stacklevel=5)

    def _replay(self, recorded: Recorded, inputs: tuple[Tensor, ...]) -> None:
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self.generators()
        recorded.replay()
        if recorded.gradients is None:
            recorded.gradients = [(parameter, parameter.grad) for parameter in self._parameters()]
        for parameter, gradient in recorded.gradients:  # those of another form, or none, may stand there
            parameter.grad = gradient

    def _step(self, recorded: Recorded) -> None:
        """The optimizer's step: recorded once its options and state have stayed the same from one call to the next."""
        options = self._options()
        steady, recorded.options = options == recorded.options, options
        if not steady:
            recorded.update = None
        elif recorded.update is None and "optimizer" not in self.refused:
            recorded.update = self._try("optimizer", self.update)
            for parameter, gradient in recorded.gradients:
                parameter.grad = gradient
        if recorded.update is None:
            self.update()
            recorded.options = options if options == self._options() else None
        else:
            recorded.update()


def graphed_step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    warmup: int = 3,
    most: int = 4,
) -> Graphed:
    """A function that trains ``net`` by one batch, on CUDA as the replay of CUDA graphs::

        step = graphed_step(net, nn.CrossEntropyLoss(), optimizer)
        for images, labels in batches:
            value = step(images, labels)

    Each call is one step: gradients to None, ``loss(net(input), target)``, backward, ``optimizer.step()``. On CUDA the
    first ``warmup`` calls with a batch's shape, strides and dtype run as they are; the next one records, and it and the
    later ones replay. Forward, loss and backward are one graph, the optimizer's step is a second: it is recorded when
    learning rate, other options and state have stayed the same from one call to the next, and runs without a graph in
    calls before which they were changed. A rate that is a tensor is read from the device's memory.

    A replay runs no Python: hooks, prints and conditions of ``net`` and ``loss`` take part as they were when it was
    recorded. ``net.train()`` and ``eval()``, autocast, and parameters of the optimizer that were replaced, moved or
    frozen are noticed, and recorded anew; after other changes call ``step.forget()``.

    What cannot be recorded runs without a graph; a warning says why, once.

    Args:
        net: called with the input alone.
        loss: of the net's result and the target, to a tensor of one element.
        optimizer: of ``net``'s parameters. torch's Adam and its like want ``capturable=True``.
        warmup: calls before the recording, at least 1: torch's libraries set themselves up in them.
        most: forms of batches that are kept; the least recently used go.

    Returns:
        ``step(input, target)``, which copies both into the graph's memory and returns a copy of the loss, without
        gradient. ``p.grad`` of each parameter then is this step's, and is overwritten by the next.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: expected an nn.Module, got {type(net).__name__}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function of result and target, got {type(loss).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    for name, number in (("warmup", warmup), ("most", most)):
        if type(number) is not int or number < 1:
            raise ValueError(f"{name}: expected a positive int, got {number!r}")

    def work(input: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()  # to None: backward then writes gradients, and adds nothing up
        value = loss(net(input), target)
        value.backward()
        return value

    return Graphed(work, optimizer.step, net, optimizer, warmup=warmup, most=most, name="graphed_step")
