"""What ptxas makes of the kernels for an A100 and an H100: nothing is spilled, and the instructions meant are there.

Compiled without a GPU, in a process of its own for each architecture: where kernels are interpreted, none is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
    ("3.6", 90): ["float32 contiguous_format: lrn.forward_kernel"],
    ("3.9", 80): ["float32 conv1: conv_relu.conv_kernel"],
}


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict]]:
    """Architecture -> a row for each kernel, as machine_code.py describes it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "ALEXNET_FAST_TUNE": "0"}
    command = [sys.executable, "-m", "tests.triton.machine_code"]
    running = {
        architecture: subprocess.Popen(
            [*command, str(architecture)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for architecture in SHARED
    }
    output = {architecture: process.communicate()[0] for architecture, process in running.items()}
    assert all(process.returncode == 0 for process in running.values())
    return {architecture: [json.loads(line) for line in lines.splitlines()] for architecture, lines in output.items()}


def names(rows: list[dict]) -> list[str]:
    return [f"{row['case']}: {row['kernel']}" for row in rows]


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_is_compiled(architecture, compiled):
    kernels = {row["kernel"] for row in compiled[architecture]}
    both = [
        f"{stem}.{way}_kernel"
        for stem in ("lrn", "lpips_layer", "max_pool", "epilogue")
        for way in ("forward", "backward")
    ]
    stems = "augment", "linear_int8", "linear_relu_dropout"
    once = [*(f"{stem}.forward_kernel" for stem in stems), "sgd.kernel"]
    lines = ["lrn.forward_lines", "lrn.backward_lines"]
    assert kernels == {*both, *once, *lines, "conv_relu.conv_kernel", "conv_relu.weight_kernel"}


@pytest.mark.parametrize("architecture", SHARED)
def test_nothing_is_spilled(architecture, compiled):
    known = KNOWN_SPILLS.get((".".join(triton.__version__.split(".")[:2]), architecture), [])
    assert sorted(set(names([row for row in compiled[architecture] if row["stack"] > 0]))) == known
    assert all(row["stack"] <= 8 for row in compiled[architecture])


@pytest.mark.parametrize("architecture", SHARED)
def test_shared_memory_is_in_budget(architecture, compiled):
    rows = compiled[architecture]
    assert names([row for row in rows if row["shared"] > SHARED[architecture]]) == []
    assert names([row for row in rows if "configuration" not in row["case"] and row["shared"] > SMALLEST]) == []


@pytest.mark.parametrize("architecture", SHARED)
def test_two_blocks_of_a_pointwise_kernel_fit(architecture, compiled):
    """65,536 registers a multiprocessor: with fewer blocks, too few loads are under way to fill the bus."""
    rows = [row for row in compiled[architecture] if not row["kernel"].startswith("conv")]
    assert names([row for row in rows if 2 * row["registers"] * row["threads"] > 65536]) == []


@pytest.mark.parametrize("architecture", SHARED)
def test_convolutions_run_on_tensor_cores(architecture, compiled):
    for row in compiled[architecture]:
        if row["kernel"].startswith("conv"):
            wanted = MATRIX[architecture, row["case"].split()[0]]
            first = "configuration" not in row["case"]
            assert (wanted in row["matrix"]) if first else row["matrix"], row


@pytest.mark.parametrize("architecture", SHARED)
def test_loads_are_of_whole_words(architecture, compiled):
    """16 bytes a load in convolutions and the optimizer. Not the crops of augment, whose pixels are bytes, and not
    TF32's weight gradient, whose operands the loads have to transpose."""
    for row in compiled[architecture]:
        case, (stem, kernel) = row["case"], row["kernel"].split(".")
        if stem in ("conv_relu", "sgd") and not (kernel == "weight_kernel" and case.startswith("float32")):
            assert row["load"] == 16, row


@pytest.mark.parametrize("architecture", SHARED)
def test_pointwise_kernels_move_16_bytes(architecture, compiled):
    """Over channels_last, in float32 and bfloat16, as CUDA's do; in LRN, whose halo once was loaded element by element,
    nothing less. (A pool's codes are bytes, rows of sums one float for each channel, distances of lpips_layer one for
    each pixel.)"""
    rows = [row for row in compiled[architecture] if "channels_last" in row["case"] or "classifier" in row["case"]]
    stems = {row["kernel"].split(".")[0] for row in rows}
    assert stems == {"lrn", "lpips_layer", "max_pool", "epilogue", "linear_relu_dropout"}
    for row in rows:
        store = 4 if row["kernel"] == "lpips_layer.forward_kernel" else 16
        assert (row["load"], row["store"]) == (16, store), row
        assert row["narrowest"] == 16 or not row["kernel"].startswith("lrn."), row
