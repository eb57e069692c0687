"""``alexnet-fast tune``: measures ahead, for AlexNet's layers, what a first call would measure with
``torch.backends.cudnn.benchmark = True``, and keeps it in the cache folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn

from alexnet_fast import tuning
from alexnet_fast.backends import backend
from alexnet_fast.errors import RunError
from alexnet_fast.models import AlexNet
from alexnet_fast.ops.linear_relu import MOST_ROWS
from alexnet_fast.tuning import Form, Record

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def passes(net: nn.Module, batches: Sequence[int], train: bool) -> int:
    """How many choices :func:`tune` makes. Training adds the forward pass and two gradients for each convolution, of
    which the first needs none for its input; linear layers are chosen for few rows."""
    layers, linear = (sum(isinstance(m, kind) for m in net.modules()) for kind in (nn.Conv2d, nn.Linear))
    few = sum(batch <= MOST_ROWS for batch in batches)
    return len(batches) * (layers + train * (3 * layers - 1)) + few * linear


@contextlib.contextmanager
def _switched(name: str, value: bool) -> Iterator[None]:
    """Within, torch.backends.cudnn's switch ``name`` is ``value``."""
    before = getattr(torch.backends.cudnn, name)
    setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, name, before)


def tune(
    net: AlexNet, batches: Sequence[int], precision: str, train: bool, heard: Callable[[Form, Record], object]
) -> None:
    """Runs ``net`` with random images, on the device that its weights are on, while each new choice is measured: in
    inference with weights in the dtype of ``precision``, and, if ``train``, forward and backward as the command train
    does, deterministic and under autocast. ``heard`` is told of each choice. Raises :class:`RunError` where memory does
    not suffice.
    """
    device, side = next(net.parameters()).device, net.variant.image_size
    dtype = PRECISIONS[precision]
    net = net.to(memory_format=torch.channels_last)
    try:
        with _switched("benchmark", True), backend("auto"), tuning.watched(heard):
            for batch in batches:
                x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
                if train:
                    with _switched("deterministic", True):
                        with torch.autocast(device.type, dtype, enabled=precision != "fp32"):
                            loss = net.train().float()(x).sum()
                        loss.backward()
                    net.zero_grad()
                with torch.inference_mode():
                    net.eval().to(dtype)(x.to(dtype))
    except torch.OutOfMemoryError:
        raise RunError(f"tune: {batch} images do not fit into the memory of {tuning.device_name(device)}") from None
