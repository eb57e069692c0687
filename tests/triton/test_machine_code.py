"""What ptxas makes of the kernels for an A100 and an H100: nothing is spilled, and the instructions meant are there.

Compiled without a GPU, in a process of its own for each architecture: where kernels are interpreted, none is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest
import triton

KB = 1024
SHARED = {80: 163 * KB, 90: 227 * KB}  # a block's limit
SMALLEST = 99 * KB  # on sm_86 and sm_89, where the first configuration, which runs untuned, must fit too
MATRIX = {
    (80, "float32"): "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    (80, "bfloat16"): "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    (90, "float32"): "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32",
    (90, "bfloat16"): "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
}

# Two words in local memory, under versions of triton other than the one that development pins.
KNOWN_SPILLS = {
    ("3.9", 80): ["float32 conv1: conv_relu.conv_kernel"],
}

# Kernel -> loads and stores of less than 16 bytes, at most.
NARROW = {
    "lrn.forward_rows": (10, 0),  # biases of two planes for each of five channels
    "lrn.backward_rows": (0, 2),  # sums of two planes
    "lrn.forward_lines": (0, 0),
    "lrn.backward_lines": (0, 1),  # sums of a line's channels
    "max_pool.forward_rows": (2, 1),  # biases of two planes; codes, a byte each
    "max_pool.backward_rows": (1, 2),  # codes; sums of two planes
    "max_pool.forward_kernel": (0, 1),  # codes
    "max_pool.backward_kernel": (4, 1),  # codes of four windows; sums
    "epilogue.forward_rows": (2, 0),  # biases of two planes
    "epilogue.backward_rows": (0, 2),  # sums of two planes
    "epilogue.forward_kernel": (0, 0),
    "epilogue.backward_kernel": (0, 1),  # sums
    "lpips_layer.forward_rows": (1, 1),  # weights; the distance
    "lpips_layer.backward_rows": (
        3,
        17,
    ),  # weights, twice, and the distance's gradient; the ends of stretches, and sums
    "lpips_layer.forward_kernel": (0, 1),  # the distance
    "lpips_layer.backward_kernel": (1, 1),  # its gradient; sums
    "linear_relu_dropout.forward_kernel": (1, 0),  # the seed
}

# Kernel over rows of lines -> instructions an element in float32 and bfloat16. An H100's multiprocessor issues 128 of
# them a cycle (for a warp on each of four schedulers), while at 3.0 TB/s and 1.7 GHz 13.4 bytes of memory come to it.
INSTRUCTIONS = {
    "lrn.forward_rows": (88, 94),
    "lrn.backward_rows": (160, 144),
    "max_pool.forward_rows": (154, 166),
    "max_pool.backward_rows": (190, 173),
    "epilogue.forward_rows": (20, 16),
    "epilogue.backward_rows": (44, 31),
    # All of the kernel by one line's elements, of which a thread goes through many: a turn of both loops of forward has
    # 7 and 9 for an element of x, of backward's three 23 and 25.
    "lpips_layer.forward_rows": (164, 58),
    "lpips_layer.backward_rows": (230, 110),
}


@cache
def compiled(architecture: int) -> list[dict]:
    """A row for each kernel, as machine_code.py describes it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "ALEXNET_FAST_TUNE": "0"}
    command = [sys.executable, "-m", "tests.triton.machine_code", str(architecture)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def names(rows: list[dict]) -> list[str]:
    return [f"{row['case']}: {row['kernel']}" for row in rows]


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_is_compiled(architecture):
    kernels = {row["kernel"] for row in compiled(architecture)}
    strided = {"lrn.forward_kernel", "lrn.backward_kernel"}
    others = {"augment.forward_kernel", "linear_int8.forward_kernel", "sgd.kernel"}
    assert kernels == {*NARROW, *strided, *others, "conv_relu.conv_kernel", "conv_relu.weight_kernel"}


@pytest.mark.parametrize("architecture", SHARED)
def test_nothing_is_spilled(architecture):
    known = KNOWN_SPILLS.get((".".join(triton.__version__.split(".")[:2]), architecture), [])
    assert sorted(set(names([row for row in compiled(architecture) if row["stack"] > 0]))) == known
    assert all(row["stack"] <= 8 for row in compiled(architecture))


@pytest.mark.parametrize("architecture", SHARED)
def test_shared_memory_is_in_budget(architecture):
    rows = compiled(architecture)
    assert names([row for row in rows if row["shared"] > SHARED[architecture]]) == []
    assert names([row for row in rows if "configuration" not in row["case"] and row["shared"] > SMALLEST]) == []


@pytest.mark.parametrize("architecture", SHARED)
def test_two_blocks_of_a_pointwise_kernel_fit(architecture):
    """65,536 registers a multiprocessor: with fewer blocks, too few loads are under way to fill the bus."""
    rows = [row for row in compiled(architecture) if not row["kernel"].startswith("conv")]
    assert names([row for row in rows if 2 * row["registers"] * row["threads"] > 65536]) == []


@pytest.mark.parametrize("architecture", SHARED)
def test_convolutions_run_on_tensor_cores(architecture):
    for row in compiled(architecture):
        if row["kernel"].startswith("conv"):
            wanted = MATRIX[architecture, row["case"].split()[0]]
            first = "configuration" not in row["case"]
            assert (wanted in row["matrix"]) if first else row["matrix"], row


@pytest.mark.parametrize("architecture", SHARED)
def test_loads_are_of_whole_words(architecture):
    """16 bytes a load in convolutions and the optimizer. Not the crops of augment, whose pixels are bytes, and not
    TF32's weight gradient, whose operands the loads have to transpose."""
    for row in compiled(architecture):
        case, (stem, kernel) = row["case"], row["kernel"].split(".")
        if stem in ("conv_relu", "sgd") and not (kernel == "weight_kernel" and case.startswith("float32")):
            assert row["load"] == 16, row


@pytest.mark.parametrize("architecture", SHARED)
def test_images_are_written_by_16_bytes(architecture):
    """By augment, plain and folded; the pixels that it reads are bytes."""
    rows = [row for row in compiled(architecture) if row["kernel"].startswith("augment")]
    assert len(rows) == 4
    assert names([row for row in rows if row["store"] != 16 or row["narrow"][1]]) == []


@pytest.mark.parametrize("architecture", SHARED)
def test_pointwise_kernels_move_16_bytes(architecture):
    """In both layouts, planes being odd: the tensors themselves by 16 bytes, and no more accesses of less than NARROW
    tells the reason of. One such tensor more is four accesses."""
    rows = [row for row in compiled(architecture) if "_format" in row["case"] or "channels_last" in row["case"]]
    rows += [row for row in compiled(architecture) if "classifier" in row["case"]]
    assert {row["kernel"] for row in rows} == NARROW.keys()
    for row in rows:
        loads, stores = NARROW[row["kernel"]]
        assert (row["load"], row["store"]) == (16, 4 if row["kernel"].startswith("lpips_layer.forward") else 16), row
        assert row["narrow"][0] <= loads, row
        assert row["narrow"][1] <= stores, row


@pytest.mark.parametrize("architecture", SHARED)
def test_instructions_an_element(architecture):
    """Of NCHW's kernels, a thread of which has 16 bytes of results: of the variant with bias or its sums, a tenth above
    what ptxas makes today."""
    most: dict[tuple[str, str], float] = {}
    for row in compiled(architecture):
        dtype, kernel = row["case"].split()[0], row["kernel"]
        if kernel.endswith("_rows"):
            count = row["instructions"] / {"float32": 4, "bfloat16": 8}[dtype]
            most[kernel, dtype] = max(count, most.get((kernel, dtype), 0))
    assert {kernel for kernel, _ in most} == INSTRUCTIONS.keys()
    for (kernel, dtype), count in most.items():
        assert count <= 1.1 * INSTRUCTIONS[kernel][dtype == "bfloat16"], (kernel, dtype, count)
