"""What moves the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from alexnet_fast.optim import SGD
from alexnet_fast.train.config import TrainConfig

# What an optimizer keeps for each parameter, by the prefix of its keys in a checkpoint.
SLOTS = {"sgd": {"": "momentum_buffer"}, "adamw": {"exp_avg:": "exp_avg", "exp_avg_sq:": "exp_avg_sq"}}


def build_optimizer(config: TrainConfig, parameters: dict[str, Parameter]) -> torch.optim.Optimizer:
    """SGD or AdamW as ``config`` says, over named parameters in the order of the net's layers, whose last is the head.

    Biases form groups of their own, and so does the head if it has a learning rate of its own. A group's ``base`` is
    the rate that the schedule multiplies.
    """
    head = list(parameters)[-1].rpartition(".")[0]
    groups: dict[tuple[bool, bool], dict] = {}
    for name, parameter in parameters.items():
        own, kind = name.rpartition(".")[0] == head, name.rpartition(".")[2]
        key = (own and config.lr_head is not None, kind == "bias")
        if key not in groups:
            base = (config.lr_head if key[0] else config.lr) * (config.bias_lr if key[1] else 1.0)
            decay = config.weight_decay * (config.bias_decay if key[1] else 1.0)
            groups[key] = {"params": [], "lr": base, "base": base, "weight_decay": decay}
        groups[key]["params"].append(parameter)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(list(groups.values()), config.lr, config.betas, config.eps)
    return SGD(list(groups.values()), config.lr, config.momentum, rule=config.rule)


def restore(optimizer: torch.optim.Optimizer, parameter: Parameter, slot: str, value: Tensor, step: int) -> None:
    """Puts what a checkpoint holds for ``parameter`` after ``step`` steps back into ``optimizer``."""
    state = optimizer.state[parameter]
    state[slot] = torch.empty_like(parameter.detach()).copy_(value)
    if slot != "momentum_buffer":
        state["step"] = torch.tensor(float(step))
