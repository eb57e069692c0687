"""The CPU stand-in for CUDA finds what it promises to find, and nothing where nothing is wrong."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from . import host_build
from .host_build import HostFaultError, run_program
from .limits import KB, MULTIPROCESSORS

HERE = Path(__file__).parent

# Whether a missing barrier shows as two accesses without order or as a read that came too early is a matter of chance.
UNORDERED = "race: thread|uninitialized: thread"
# Each fault, what a report must say in the build `threads`, and in the build `address`; None: not its business.
FAULTS = {
    "missing_barrier": (UNORDERED, None),
    "missing_second_barrier": ("race: thread", None),
    "missing_syncwarp": (UNORDERED, None),
    "syncwarp_across_warps": (UNORDERED, None),
    "missing_copy_wait": ("a cp.async to it has not landed", None),
    "wait_for_wrong_group": ("a cp.async to it has not landed", None),
    "missing_barrier_after_wait": ("has not landed|" + UNORDERED, None),
    "copy_over_what_is_read": ("has not landed|race: thread", None),
    "read_past_tensor": ("out of bounds: thread reads 4 bytes, 0 past the end of 'x'", "heap-buffer-overflow"),
    "read_before_tensor": ("out of bounds: thread reads 4 bytes", "heap-buffer-overflow"),
    "write_past_tensor": ("out of bounds: thread writes 4 bytes, 0 past the end of 'y'", "heap-buffer-overflow"),
    "copy_past_tensor": ("out of bounds: thread reads 4 bytes, 0 past the end of 'x'", "heap-buffer-overflow"),
    "past_shared_array": ("0 past the end of 'tile'", "heap-buffer-overflow"),
    "past_dynamic_shared": (r"0 past the end of 'dynamic_shared\(\)'", "heap-buffer-overflow"),
    "past_local_array": (None, r"index 4 out of bounds for type 'float \[4\]'"),
    "overflow": (None, "signed integer overflow"),
    "barrier_in_branch": ("divergence: thread", "divergence: thread"),
    "barriers_in_two_branches": ("divergence: thread", "divergence: thread"),
    "return_before_barrier": ("divergence: thread", "divergence: thread"),
    "shuffle_in_branch": ("divergence: lane", "divergence: lane"),
    "shuffle_from_ended_lane": ("which is not there", "which is not there"),
    "uninitialized_shared": ("uninitialized: thread", None),
    "shared_of_another_block": ("uninitialized: thread", None),
    "uninitialized_output": ("uninitialized: thread", None),
    "misaligned": ("misaligned: 16 bytes", "misaligned: 16 bytes"),
    "misdirected": ("misdirected: a store to global memory goes to 'tile'",) * 2,
    "blocks_write_one_element": ("another block wrote it", None),
    "blocks_read_what_others_write": (UNORDERED, None),
    "mixed_atomics": ("race: thread", None),
    "read_before_dependency_wait": ("race: thread .* reads .*: a kernel wrote it that may still run", None),
    "write_before_dependency_wait": ("race: thread .* writes .*: a kernel read it that may still run", None),
    "waited_by_another_thread": ("race: thread .* reads .*: a kernel wrote it that may still run", None),
    "missing_dependency_wait": ("dependency: thread .* without dependency_wait",) * 2,
    "dependents_let_go_before_wait": ("race: thread .* reads .*: a kernel wrote it that may still run", None),
}


# Launches that a card refuses, and what a report must say: kernel, block and number.
LAUNCHES = {
    "block_threads": r"nothing<true>, blocks of \(32,32,2\): the number of threads is 2048, and a card takes 1 to 1024",
    "block_x": r"blocks of \(1025,1,1\): the block's x is 1025, and a card takes 1 to 1024",
    "block_y": r"blocks of \(1,1025,1\): the block's y is 1025, and a card takes 1 to 1024",
    "block_z": r"blocks of \(1,1,65\): the block's z is 65, and a card takes 1 to 64",
    "grid_x": "the grid's x is 2147483648, and a card takes 1 to 2147483647",
    "grid_y": "the grid's y is 65536, and a card takes 1 to 65535",
    "grid_z": "the grid's z is 65536, and a card takes 1 to 65535",
    "no_blocks": "the grid's y is 0, and a card takes 1 to 65535",
    "cluster_blocks": "the number of blocks in a cluster is 9, and a card takes 1 to 8",
    "part_of_a_cluster": "its grid is no whole number of clusters",
    "parameter_bytes": r"parameters<true>, .*the size of the parameters in bytes is 4112, and a card takes 0 to 4096",
    "asked_too_late": "2048 static and 49152 dynamic bytes of shared memory are 51200, more than 49152, and 0 dynamic",
}


def launch(fault: str, how: str, architecture: int, **environment: int) -> None:
    numbers = {"HOST_SIMT_ARCHITECTURE": architecture, **environment}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in numbers.items():
            patch.setenv(name, str(value))
        run_program([program("address", "faults"), fault, how])


@pytest.mark.parametrize("fault", LAUNCHES)
def test_launches_that_a_card_refuses(fault):
    """A launch at a limit passes, and one past it is refused; ``asked_too_late`` repeats a fault that launch() once
    had."""
    launch(fault, "right", 90)
    with pytest.raises(HostFaultError, match="host_simt: launch: .*" + LAUNCHES[fault]):
        launch(fault, "wrong", 90)


@pytest.mark.parametrize("architecture", MULTIPROCESSORS)
def test_shared_memory_of_a_block(architecture):
    most = MULTIPROCESSORS[architecture].block_shared
    launch("block_shared", "right", architecture, BLOCK_SHARED=most // KB)
    with pytest.raises(
        HostFaultError, match=f"bytes of shared memory are {most + 16}, and sm_{architecture} has {most}"
    ):
        launch("block_shared", "wrong", architecture, BLOCK_SHARED=most // KB)


def test_what_every_architecture_takes():
    """Without the name of an architecture the smallest limit counts, and clusters are refused, as not all have them."""
    least = min(limits.block_shared for limits in MULTIPROCESSORS.values())
    launch("block_shared", "right", 0, BLOCK_SHARED=least // KB)
    for fault in ("block_shared", "cluster_blocks"):
        with pytest.raises(HostFaultError, match="host_simt: launch"):
            launch(fault, "wrong" if fault == "block_shared" else "right", 0, BLOCK_SHARED=least // KB)


@cache
def program(kind: str, name: str) -> Path:
    return host_build.build(kind, kernels=[], main=HERE / f"{name}.cu")


@pytest.mark.parametrize("kind", host_build.BUILDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_reported(fault, kind):
    """With the kernel's name and the place in the grid, in the first schedule that is tried."""
    expected = FAULTS[fault][host_build.BUILDS.index(kind)]
    if expected is None:
        run_program([program(kind, "faults"), fault, "right"])
        return
    with pytest.raises(HostFaultError) as report:
        run_program([program(kind, "faults"), fault, "wrong"])
    assert re.search(expected, str(report.value))
    assert f"{fault}<true>" in str(report.value)
    assert "thread (" in str(report.value)


@pytest.mark.parametrize("fault", FAULTS)
def test_same_kernel_without_the_fault_passes(fault):
    for kind in host_build.BUILDS:
        run_program([program(kind, "faults"), fault, "right"])


def test_report_names_the_source_line():
    """Each report names the source line, so that a reader need not search."""
    with pytest.raises(HostFaultError) as report:
        run_program([program("threads", "faults"), "missing_barrier", "wrong"])
    line = 1 + next(
        i for i, text in enumerate((HERE / "faults.cu").read_text().splitlines()) if "tile[(threadIdx.x + 1)" in text
    )
    assert f"faults.cu:{line}" in str(report.value)


CHECKS = [
    "shuffles",
    "votes",
    "schedules",
    "copies",
    "stores",
    "loads",
    "transposed_loads",
    "product_f16",
    "product_bf16",
    "product_tf32",
    "tf32_rounding",
    "halves",
    "bfloats",
    "division",
    "approximate",
]


@pytest.mark.parametrize("check", CHECKS)
def test_model(check):
    """Shuffles, votes, matrix fragments, roundings and divisions are what the card makes of them."""
    for kind in host_build.BUILDS:
        run_program([program(kind, "model"), check])
