"""What moves the weights."""

from __future__ import annotations

from torch.nn import Parameter

from alexnet_fast.optim import SGD
from alexnet_fast.train.config import TrainConfig


def build_optimizer(config: TrainConfig, parameters: dict[str, Parameter]) -> SGD:
    """SGD as ``config`` says, over named parameters in the order of the net's layers, whose last is the head.

    Biases, and the head if it has a rate of its own, are in groups of their own. A group's ``base`` is the rate that
    the schedule stands on.
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
    return SGD(list(groups.values()), config.lr, config.momentum, rule=config.rule)
