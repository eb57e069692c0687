"""Inference of whole nets: torchvision's and the paper's, float32 and bfloat16, ours with packed weights."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from alexnet_fast import AlexNet, pack

from . import peers
from .cases import NO_GPU
from .timing import agreed, row_of, short

gpu_only = pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
GPU_BATCHES = (1, 128, 1024)
CASES = [("cpu", 1), ("cpu", 32), *(pytest.param("cuda", batch, marks=gpu_only) for batch in GPU_BATCHES)]


@cache
def net_of(variant: str) -> AlexNet:
    """The cases of a variant share its float32 weights; each takes copies."""
    torch.manual_seed(0)
    return AlexNet(variant=variant)


def net_bytes_and_flops(net: AlexNet, x: torch.Tensor) -> tuple[int, int]:
    """Weights, images and logits once; convolutions and linear layers, a multiply-add counted as two."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        AlexNet(variant=net.variant.name)(torch.empty(x.shape))
    elements = sum(p.numel() for p in net.parameters()) + x.numel() + x.shape[0] * 1000
    return elements * x.itemsize, counter.get_total_flops()


def on_device(variant: str, device: str, dtype: torch.dtype) -> AlexNet:
    """A copy in channels_last for inference; its peer in torch's modules shares its parameters."""
    net = copy.deepcopy(net_of(variant)).eval().requires_grad_(False)
    return net.to(device, dtype).to(memory_format=torch.channels_last)


def labels_of(variant: str, batch: int, dtype: torch.dtype) -> dict[str, str]:
    return {
        "bench": "alexnet",
        "case": f"{variant}, batch {batch}",
        "dtype": short(dtype),
        "layout": "channels_last",
        "pass": "forward",
        "backend": "auto",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
@pytest.mark.parametrize(("device", "batch"), CASES)
@pytest.mark.parametrize("variant", ["torchvision", "paper"])
def test_alexnet(benchmark, keep, missing, variant, device, batch, dtype):
    truth_net = copy.deepcopy(net_of(variant)).eval().requires_grad_(False)
    images = torch.randn(batch, 3, truth_net.variant.image_size, truth_net.variant.image_size)
    last, gpu = torch.channels_last, device == "cuda"
    ours = on_device(variant, device, dtype)
    x = images.to(device, dtype).contiguous(memory_format=last)
    torch.backends.cudnn.benchmark = True
    plain_last = peers.plain(ours)
    made = {"eager channels_last": peers.eager(plain_last, x), "compile": peers.compiled(plain_last, x)}
    if gpu:
        made["JAX"] = peers.jax_compiled(plain_last, x)
    else:
        plain = peers.plain(copy.deepcopy(truth_net).to(dtype))
        made = {"eager": peers.eager(plain, x.contiguous()), **made}
        made |= {"ONNX Runtime": peers.onnxruntime(plain, x), "OpenVINO": peers.openvino(plain, x)}
    with torch.inference_mode():
        truth = peers.plain(truth_net)(images).to(device, dtype)
        pack(ours)
        sides = {"ours": lambda: ours(x), **made}
        missing |= {f"{name} ({short(dtype)})": reason for name, reason in made.items() if isinstance(reason, str)}
        sides = {name: torch.inference_mode()(call) for name, call in agreed(sides, truth, {}).items()}
    row = row_of(benchmark, sides, labels_of(variant, batch, dtype), device, seconds=2, least=4)
    if row:
        row["bytes"], row["flops"] = net_bytes_and_flops(ours, x)
    keep(row)
