"""A training step as CUDA graphs: the host replays what it recorded, and runs no Python of the net."""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Any]


class Cuda:
    """Records work in CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)

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

    def record(self, run: Run) -> Run:
        """What repeats the work of ``run()``, which is recorded and not done, in the memory that it has then."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            run()
        return graph.replay


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": Cuda}


@dataclass
class Recorded:
    """What was recorded for one form of the batch, and the tensors that it reads and writes."""

    input: Tensor
    target: Tensor
    replay: Run
    loss: Tensor | None = None
    gradients: list[tuple[Tensor, Tensor | None]] | None = None
    step: Run | None = None  # the optimizer's
    options: tuple | None = None  # what the optimizer worked by in the newest call


class GraphedStep:
    """See :func:`graphed_step`. ``refused`` says why the net's or the optimizer's part is not recorded, where it is
    not."""

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        warmup: int,
        most: int,
    ) -> None:
        self.net, self.loss, self.optimizer = net, loss, optimizer
        self.warmup, self.most = warmup, most
        self.refused: dict[str, str] = {}
        self.recorder: Any = None
        self.forget()

    def forget(self) -> None:
        """Drops all recordings: for changes that a step does not notice, such as hooks and replaced buffers."""
        self.recorded: OrderedDict[tuple, Recorded] = OrderedDict()
        self.calls: Counter[tuple] = Counter()
        self.state: tuple = ()

    def __call__(self, input: Tensor, target: Tensor) -> Tensor:
        if input.device.type not in RECORDERS or "net" in self.refused:
            return self._eager(input, target)
        if self.recorder is None or self.recorder.device != input.device:
            self.forget()
            self.recorder = RECORDERS[input.device.type](input.device)
        state = self._state()
        if state != self.state:
            self.forget()
            self.state = state
        form = tuple((t.shape, t.stride(), t.dtype, t.device) for t in (input, target))
        if form not in self.recorded:
            if self.calls[form] < self.warmup:
                self.calls[form] += 1
                return self.recorder.warm_up(lambda: self._eager(input, target))
            recorded = self._record(input, target)
            if recorded is None:
                return self._eager(input, target)
            self.recorded[form] = recorded
            if len(self.recorded) > self.most:
                self.recorded.popitem(last=False)
        self.recorded.move_to_end(form)
        return self._replay(self.recorded[form], input, target)

    def _eager(self, input: Tensor, target: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.net(input), target)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

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

    def _record(self, input: Tensor, target: Tensor) -> Recorded | None:
        recorded = Recorded(input.detach().clone(), target.detach().clone(), lambda: None)

        def run() -> list[Tensor | None]:
            self.optimizer.zero_grad()  # to None: backward then writes gradients, and adds nothing up
            loss = self.loss(self.net(recorded.input), recorded.target)
            loss.backward()
            recorded.loss = loss.detach()
            return [parameter.grad for parameter in self._parameters()]

        replay = self._try("net", run)
        if replay is None:
            return None
        recorded.replay = replay
        return recorded

    def _try(self, part: str, run: Run) -> Run | None:
        try:
            return self.recorder.record(run)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            self.refused[part] = reason
            self.optimizer.zero_grad()
            warnings.warn(
                f"graphed_step: the {part}'s part runs without a graph: {reason}", RuntimeWarning, stacklevel=4
            )
            return None

    def _replay(self, recorded: Recorded, input: Tensor, target: Tensor) -> Tensor:
        recorded.input.copy_(input, non_blocking=True)
        recorded.target.copy_(target, non_blocking=True)
        recorded.replay()
        if recorded.gradients is None:
            recorded.gradients = [(parameter, parameter.grad) for parameter in self._parameters()]
        for parameter, gradient in recorded.gradients:  # those of another form, or none, may stand there
            parameter.grad = gradient
        self._step(recorded)
        return recorded.loss.clone()

    def _step(self, recorded: Recorded) -> None:
        """The optimizer's step: recorded once its options and state have stayed the same from one call to the next."""
        options = self._options()
        steady, recorded.options = options == recorded.options, options
        if not steady:
            recorded.step = None
        elif recorded.step is None and "optimizer" not in self.refused:
            gradients = recorded.gradients
            recorded.step = self._try("optimizer", self.optimizer.step)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        if recorded.step is None:
            self.optimizer.step()
            recorded.options = options if options == self._options() else None
        else:
            recorded.step()


def graphed_step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    warmup: int = 3,
    most: int = 4,
) -> GraphedStep:
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
    return GraphedStep(net, loss, optimizer, warmup, most)
