"""Compiles the Triton kernels for a GPU that is not here, through the launchers themselves, and describes the result.

    python -m tests.triton.machine_code 90

prints one line of JSON for each kernel: its name and case, registers a thread, bytes of stack (spilled registers) and
of shared memory, in bytes the widest load and store, how many loads and stores are of less than 16 bytes, instructions,
and those for matrices. Tensors are on torch's meta device: they have a shape and a dtype, and no memory.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from alexnet_fast.geometry import Geometry, Window
from alexnet_fast.ops import LRN
from alexnet_fast.triton_kernels import (
    augment,
    conv_relu,
    epilogue,
    linear_int8,
    linear_relu_dropout,
    lpips_layer,
    lrn,
    max_pool,
    sgd,
)

from ..cuda.machine_code import resource_usage

PAPER = LRN(5, 5e-4, 0.75, 2.0)
OVERLAPPING = Window([3, 3], [2, 2], [0, 0], False)
NO_POOL = Window([0, 0], [1, 1], [0, 0], False)
# Images, weight, geometry: folded, channels that are no multiple of a step of the depth, and channels that are one.
CONVOLUTIONS = {
    "conv1": ((128, 3, 224, 224), (64, 3, 11, 11), Geometry([4, 4], [2, 2], [1, 1], 1)),
    "conv2 in towers": ((128, 96, 27, 27), (256, 48, 5, 5), Geometry([1, 1], [2, 2], [1, 1], 2)),
    "conv3": ((128, 192, 13, 13), (384, 192, 3, 3), Geometry([1, 1], [1, 1], [1, 1], 1)),
}


class Elsewhere:
    """A driver for a GPU of compute capability ``capability`` / 10, for compiling: nothing can be launched on it."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pointwise(dtype: torch.dtype, form: torch.memory_format) -> None:
    """Every pointwise kernel, at the shapes of the first stage."""
    z = torch.empty(128, 96, 55, 55, dtype=dtype, device="meta", memory_format=form)
    y = torch.empty(128, 96, 27, 27, dtype=dtype, device="meta", memory_format=form)
    code = torch.empty_like(y, dtype=torch.uint8)
    bias = torch.empty(96, dtype=dtype, device="meta")
    lrn.forward(z, form, PAPER)
    lrn.backward(z, z, form, PAPER)
    lrn.forward(z, form, PAPER, bias, relu=True, keep_r=True)
    lrn.backward(z, z, form, PAPER, relu=True, want_bias=True)
    max_pool.forward(z, form, OVERLAPPING, True)
    max_pool.backward(y, code, form, [55, 55], OVERLAPPING)
    max_pool.forward(z, form, OVERLAPPING, True, bias, relu=True)
    max_pool.backward(y, code, form, [55, 55], OVERLAPPING, want_bias=True)
    epilogue.forward(z, form, bias, LRN(0), NO_POOL, True)
    epilogue.mask(z, z, form, True)
    weight = torch.empty(96, device="meta")
    distance = lpips_layer._lpips_layer(z, weight, False)
    lpips_layer._lpips_layer_backward(distance, z, weight, False, True)


def strided(dtype: torch.dtype) -> None:
    """LRN over images in NCHW that are no whole number of lines."""
    z, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((128, 97, 55, 55), (97,)))
    lrn.forward(z, torch.contiguous_format, PAPER, bias, relu=True, keep_r=True)
    lrn.backward(z, z, torch.contiguous_format, PAPER, relu=True, want_bias=True)


def pictures(dtype: torch.dtype) -> None:
    """A training batch from bytes."""
    images = torch.empty(128, 3, 256, 256, dtype=torch.uint8, device="meta", memory_format=torch.channels_last)
    place = torch.empty(128, 3, dtype=torch.int32, device="meta")
    shift, scale = torch.empty(128, 3, device="meta"), torch.empty(3, device="meta")
    for fold in (([1, 1], [0, 0], [224, 224]), ([4, 4], [2, 2], [57, 57])):
        augment._augment(images, place, shift, scale, 224, 224, dtype, *fold)


def classifier(dtype: torch.dtype) -> None:
    """What follows fc6 and fc7; its backward pass is epilogue's."""
    z, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((128, 4096), (4096,)))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    linear_relu_dropout._linear_relu_dropout(z, bias, 0.5, seed)


def weight_only(dtype: torch.dtype) -> None:
    """fc6 with int8 weights, of one image."""
    x, bias = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((1, 9216), (4096,)))
    weight, scales = torch.empty(4096, 9216, dtype=torch.int8, device="meta"), torch.empty(4096, device="meta")
    linear_int8._linear_int8(x, weight, scales, bias)


def optimizer(dtype: torch.dtype, **options) -> None:
    """Weights, gradients and velocities of fc8, and in bfloat16 the copies."""
    rule = {"lr": 0.01, "momentum": 0.9, "dampening": 0.0, "weight_decay": 5e-4, "nesterov": False, "first": False}
    weights, biases = (torch.empty(size, device="meta") for size in ((1000, 4096), (1000,)))
    rows = [(w, w.to(dtype), w, None if dtype == torch.float32 else w.to(dtype)) for w in (weights, biases)]
    sgd.step(rows, **rule, **options)


def convolution(layer: str, dtype: torch.dtype) -> None:
    """Forward and both gradients."""
    images, kernel, geometry = CONVOLUTIONS[layer]
    x = torch.empty(images, dtype=dtype, device="meta", memory_format=torch.channels_last)
    weight = torch.empty(kernel, dtype=dtype, device="meta")
    y = conv_relu.forward(x, weight, torch.empty(kernel[0], dtype=dtype, device="meta"), geometry)
    conv_relu.backward(y, x, weight, geometry, [True, True])


def cases() -> Iterator[str]:
    """Launches everything once, after giving the case its name."""
    for dtype, form in (
        (torch.float32, torch.contiguous_format),
        (torch.float32, torch.channels_last),
        (torch.bfloat16, torch.contiguous_format),
        (torch.bfloat16, torch.channels_last),
    ):
        yield f"{dtype} {form}"
        pointwise(dtype, form)
    yield "float32 strided"
    strided(torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"{dtype} pictures"
        pictures(dtype)
        yield f"{dtype} classifier"
        classifier(dtype)
        yield f"{dtype} weight-only"
        weight_only(dtype)
        for rule_2012 in (False, True):
            yield f"{dtype} optimizer"
            optimizer(dtype, rule_2012=rule_2012)
        for layer in CONVOLUTIONS:
            yield f"{dtype} {layer}"
            convolution(layer, dtype)
    tuned = conv_relu.CONV, conv_relu.WEIGHT
    for number in range(1, max(len(kernel.configurations) for kernel in tuned)):
        for kernel in tuned:
            kernel.first = kernel.configurations[number % len(kernel.configurations)].all_kwargs()
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{dtype} conv2 in towers, configuration {number}"
            convolution("conv2 in towers", dtype)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        (used,) = resource_usage(file.name, triton.knobs.nvidia.cuobjdump.path).values()
    return used


def instructions(cubin: bytes) -> int:
    """16 bytes each in the ELF file's sections of code, which end with a few that do nothing."""
    (sections,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, sections + size * i) for i in range(count)]
    return sum(length for name, *_, length in headers if cubin.startswith(b".text", headers[names][4] + name)) // 16


def widths(ptx: str, what: str) -> list[int]:
    """In bytes, of one thread's loads from global memory (``what`` is "ld") or stores to it ("st")."""
    found = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(rf"{what}\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)]
    copies = re.findall(r"cp\.async\.c\w\.shared\.global \[[^]]+\], \[[^]]+\], (\w+)", ptx) if what == "ld" else []
    return found + [int(n, 0) for n in copies]


def main(capability: int) -> None:
    triton.runtime.driver.set_active(Elsewhere(capability))
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    def describe(case: str) -> None:
        for kernel in compiled:
            ptx, used = kernel.asm["ptx"], resources(kernel.asm["cubin"])
            row = {
                "case": case.replace("torch.", ""),
                "kernel": f"{kernel.src.fn.__module__.rpartition('.')[2]}.{kernel.name.strip('_')}",
                "registers": used["REG"],
                "stack": used["STACK"] + used["LOCAL"],
                "shared": kernel.metadata.shared,
                "threads": 32 * kernel.metadata.num_warps,
                "load": max(widths(ptx, "ld")),
                "store": max(widths(ptx, "st"), default=0),
                "narrow": [sum(width < 16 for width in widths(ptx, what)) for what in ("ld", "st")],
                "instructions": instructions(kernel.asm["cubin"]),
                "matrix": sorted(set(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync)\S*", ptx))),
            }
            print(json.dumps(row), flush=True)
        compiled.clear()

    JITFunction.run = compile_only
    before = None
    for case in cases():
        if before:
            describe(before)
        before = case
    describe(before)


if __name__ == "__main__":
    main(int(sys.argv[1]))
