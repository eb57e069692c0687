"""Stochastic gradient descent that goes over memory once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet_fast import backends
from alexnet_fast.ops.registry import LIBRARY

RULES = ("torch", "2012")
HALF = (torch.float16, torch.bfloat16)

LIBRARY.define(
    "sgd_(Tensor(a!) weight, Tensor grad, Tensor(b!)? velocity, Tensor(c!)? copy, float lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool rule_2012, bool first) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("alexnet_fast::sgd_", lambda *_: None, lib=LIBRARY)


def is_sharded(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor, as FSDP2 makes of parameters."""
    return hasattr(x, "placements") and hasattr(x, "to_local")


def _local(x: Tensor) -> Tensor:
    """What this rank holds of ``x``: a step moves each element by itself."""
    return x.to_local() if is_sharded(x) else x


class Row(NamedTuple):
    """One parameter. With a 16-bit ``copy``, the gradient has its dtype, and ``weight`` is the float32 master."""

    weight: Tensor
    grad: Tensor
    velocity: Tensor | None
    copy: Tensor | None


class Rule(NamedTuple):
    """How parameters move, in the order of the operator's arguments."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    rule_2012: bool
    first: bool  # the velocity is unset, and becomes the gradient


def _plain(row: Row, rule: Rule) -> None:
    """One step of one parameter, in place, in PyTorch:

    torch   g ← g + λw;  v ← μv + (1 − d)g;  g ← v, or g + μv (Nesterov);  w ← w − εg
    2012    v ← μv − λεw − εg;  w ← w + v
    """
    weight, velocity = row.weight, row.velocity
    grad = row.grad.to(weight.dtype)
    if rule.rule_2012:
        velocity.mul_(rule.momentum).add_(weight, alpha=-rule.weight_decay * rule.lr).add_(grad, alpha=-rule.lr)
        weight.add_(velocity)
    else:
        if rule.weight_decay:
            grad = grad.add(weight, alpha=rule.weight_decay)
        if rule.momentum:
            if rule.first:
                velocity.copy_(grad)
            else:
                velocity.mul_(rule.momentum).add_(grad, alpha=1 - rule.dampening)
            grad = grad.add(velocity, alpha=rule.momentum) if rule.nesterov else velocity
        weight.add_(grad, alpha=-rule.lr)
    if row.copy is not None:
        row.copy.copy_(weight)


def _covered(weight: Tensor) -> bool:
    """Whether the kernels cover ``weight``: they take float32 tensors without gaps in memory."""
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return weight.dtype == torch.float32 and dense


def _triton(rows: list[Row], rule: Rule) -> None:
    from alexnet_fast.triton_kernels import sgd

    alike: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        alike[row.weight.device, row.grad.dtype].append(row)
    for part in alike.values():
        sgd.step(part, **rule._asdict())


def _rule(group: dict[str, Any], first: bool) -> Rule:
    """A parameter group's rule; raises ValueError for one that is none, and for torch's options that are not ours."""
    rule = group["rule"]
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if rule == "2012" and (group["dampening"] or group["nesterov"]):
        raise ValueError("rule: '2012' has neither dampening nor nesterov")
    for name in ("maximize", "differentiable"):
        if group[name]:
            raise ValueError(f"{name}: expected False, got {group[name]!r}; torch.optim.SGD has it")
    if isinstance(group["lr"], Tensor):
        raise ValueError("lr: expected a float, got a Tensor")
    options = [group[name] for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")]
    return Rule(*options, rule == "2012", first)


class SGD(torch.optim.SGD):
    """:class:`torch.optim.SGD` in one pass over memory, and the update rule of Krizhevsky, Sutskever and Hinton 2012.

    torch's own step goes over gradient, velocity and weight in up to four passes. In float32 on a CPU results are equal
    to those of its default (``foreach`` and ``fused`` not set) bit for bit. Either loads the other's ``state_dict``. On
    a GPU one launch steps all parameters of a group.

    float16 and bfloat16 parameters are rounded copies of float32 masters, ``state[parameter]["master"]``, and are
    written in the same pass. A master begins as the parameter at the first step; from then on, new values for the
    parameter alone are lost at the next step.

    Args:
        params: parameters, or groups of them.
        lr, momentum, dampening, weight_decay, nesterov: as in :class:`torch.optim.SGD`; ``lr`` is a float.
        rule: ``"torch"``, or ``"2012"``: v ← momentum · v − weight_decay · lr · w − lr · g, w ← w + v. There lr sits
            inside the velocity: a smaller lr holds for new gradients alone, while what is in the velocity runs out.

    Which implementation runs is chosen as for the operators (:mod:`alexnet_fast.backends`). Parameters that no kernel
    covers (float64, neither contiguous nor channels_last) are stepped by plain PyTorch. Sparse gradients are made
    dense. Of sharded parameters (FSDP2, DTensor) each rank steps its part, and the state is sharded alike.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        rule: str = "torch",
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)
        self.defaults["rule"] = rule
        for group in self.param_groups:
            group.setdefault("rule", rule)
            _rule(group, False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rows: dict[bool, list[Row]] = {True: [], False: []}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    first = self.state.get(parameter, {}).get("momentum_buffer") is None
                    rows[first].append(self._row(parameter, group))
            for first, part in rows.items():
                self._step(part, _rule(group, first))
        return loss

    def _row(self, parameter: Tensor, group: dict[str, Any]) -> Row:
        half = parameter.dtype in HALF
        if half and "master" not in self.state[parameter]:
            self.state[parameter]["master"] = parameter.detach().float()
        weight = self.state[parameter]["master"] if half else parameter
        velocity = None
        if group["momentum"] or group["rule"] == "2012":
            state = self.state[parameter]
            velocity = state.get("momentum_buffer")
            if velocity is None:
                velocity = torch.zeros_like(weight)
            elif _local(velocity).stride() != _local(weight).stride():  # torch gives it the gradient's
                velocity = torch.empty_like(weight).copy_(velocity)
            state["momentum_buffer"] = velocity
        grad = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
        if is_sharded(parameter) and grad.placements != parameter.placements:
            grad = grad.redistribute(placements=parameter.placements)
        if _local(grad).stride() != _local(parameter).stride():
            grad = torch.empty_like(parameter).copy_(grad)
        return Row(*[t if t is None else _local(t) for t in (weight, grad, velocity, parameter if half else None)])

    @staticmethod
    def _step(rows: list[Row], rule: Rule) -> None:
        together = []
        for row in rows:
            name = backends.choose("sgd", row.weight, None) if _covered(row.weight) else "reference"
            if name == "triton":
                together.append(row)
            elif name == "cpu":
                torch.ops.alexnet_fast.sgd_(*row, *rule)
            else:
                _plain(row, rule)
                continue
            # For autograd, which then refuses a graph from before the step; plain PyTorch does it by itself.
            torch.autograd.graph.increment_version([t for t in (row.weight, row.velocity, row.copy) if t is not None])
        if together:
            _triton(together, rule)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but without rounding the float32 state of 16-bit parameters to their dtype."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("rule", "torch")  # a state of torch.optim.SGD
            _rule(group, False)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if parameter.dtype in HALF:
                for name, value in state_dict["state"].get(number, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)
