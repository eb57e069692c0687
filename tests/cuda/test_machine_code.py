"""The machine code that nvcc made for every architecture keeps to budgets.py; its table is printed at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from alexnet_fast import _C
from tests.conftest import TABLES

from . import machine_code
from .budgets import BUDGETS, budget, faults, work_faults
from .limits import KB
from .machine_code import Kernel, kernels, resident_blocks


@pytest.fixture(scope="module")
def built(request) -> list[Kernel]:
    if reason := machine_code.missing():
        pytest.skip(reason)
    request.config.stash[TABLES]["CUDA kernels, as nvcc compiled them"] = machine_code.table(kernels())
    return kernels()


def test_every_kernel_keeps_to_its_budget(built):
    assert [fault for kernel in built for fault in faults(kernel)] == []


def test_every_kernel_is_there_for_every_architecture(built):
    """Machine code for each architecture, and PTX that drivers of later ones compile. Hopper's own kernels are for
    sm_90a alone."""
    general = [kernel for kernel in built if not kernel.hopper]
    names = {kernel.name for kernel in general}
    for architecture in machine_code.ARCHITECTURES:
        assert f"sm_{architecture}" in _C.build_info()["cuda"]
        here = [kernel.name for kernel in general if kernel.architecture == architecture]
        assert set(here) == names
        assert {name for name in names if here.count(name) > 1} <= {"add_rows<float>"}  # a pass of two files
    assert {kernel.architecture for kernel in built if kernel.hopper} == {90}
    assert machine_code.ptx_targets() == {f"sm_{max(machine_code.ARCHITECTURES)}"}


def test_every_budget_is_some_kernels(built):
    """A row that another one hides, or whose kernel is gone, budgets nothing."""
    assert {budget(kernel) for kernel in built} == set(BUDGETS)


def test_what_binds_each_kernel_is_said(built):
    """Bytes on both cards, or on one, or instructions; loops are as long as they were when that was counted."""
    assert work_faults(built) == []


def test_a_longer_loop_is_named(built):
    (kernel,) = (k for k in built if k.name.startswith("pool_bwd_planes<bf16, false") and k.architecture == 80)
    longer = replace(kernel, loops=tuple(length + 10 for length in kernel.loops))
    assert [f for f in work_faults([*(k for k in built if k != kernel), longer]) if "no loop of 45" in f]
    assert [f for f in work_faults([*built, replace(kernel, name="relu_anew<float, 4>")]) if "nobody" in f]


HOPPER, HOPPER_STAGE = (f"sm90::{name}<sm90::WgmmaTile<bf16, 4, " for name in ("conv_relu_fwd", "conv_stage_fwd"))
HOPPER_FIRST = "sm90::conv_first_fwd<sm90::FirstTile<bf16, 56>, true, "


def one(built: list[Kernel], name: str) -> Kernel:
    found = [kernel for kernel in built if kernel.name.startswith(name)]
    return next(kernel for kernel in found if kernel.hopper or kernel.architecture == 86)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("lrn_fwd_nhwc<bf16, 8, 2", {"stack": 8}, "8 bytes of a thread are in local memory"),
        ("lrn_fwd_nhwc<bf16, 8, 2", {"registers": 65}, "65 registers, budget 56"),
        ("lrn_fwd_nhwc<bf16, 8, 2", {"registers": 65}, "3 blocks fit a multiprocessor, budget 4"),
        ("conv_stage_fwd<", {"shared": 12 * KB}, "bytes of shared memory, budget 101376"),
        ("lrn_fwd_nhwc<bf16, 8, 2", {"shared": 48 * KB}, "2 blocks fit a multiprocessor, budget 4"),
        ("conv_relu_fwd<ConvTile<TensorCores<bf16>, 128, 128,", {"instructions": "HMMA"}, "no instruction HMMA"),
        ("conv_relu_fwd<ConvTile<TensorCores<bf16>, 128, 128,", {"instructions": "LDGSTS"}, "no instruction LDGSTS"),
        ("conv_relu_fwd<ConvTile<TensorCores<bf16>, 128, 128,", {"instructions": "LDSM"}, "no instruction LDSM"),
        ("relu_nhwc<float, 4", {"instructions": "STG"}, "no instruction STG"),
        ("relu_nhwc<float, 4", {"instructions": "LD"}, "no instruction LDG"),
        ("pool_fwd_packed<bf16, 8", {"instructions": "HMNMX2"}, "no instruction HMNMX2"),
        ("pool_fwd_planes<bf16", {"instructions": "LDGSTS"}, "no instruction LDGSTS"),
        ("pool_bwd_planes<float", {"instructions": "STG"}, "no instruction STG"),
        ("pool_bwd_patches<bf16", {"instructions": "HSETP2"}, r"no instruction HSETP2\.EQ\.AND"),
        ("lrn_pool_bwd_packed<f16", {"instructions": "HSETP2.LE"}, r"no instruction HSETP2\.LE\.AND"),
        ("lrn_fwd_planes<bf16, LrnOfFive", {"instructions": "LDGSTS"}, "no instruction LDGSTS"),
        ("lrn_bwd_planes<bf16, true", {"registers": 129}, "129 registers, budget 128"),
        ("lrn_fwd_planes<bf16, LrnOfFive, Rectified", {"instructions": "STS.128"}, r"no instruction STS\.128"),
        ("lrn_pool_fwd_planes<float, true", {"instructions": "STG.E.128"}, r"no instruction STG\.E\.128"),
        ("lrn_pool_fwd_columns<bf16, 8, 55", {"instructions": "STS.128"}, r"no instruction STS\.128"),
        ("lrn_pool_bwd_planes<bf16", {"shared": 4 * KB}, "bytes of shared memory, budget 80896"),
        ("pool_fwd_packed<bf16, 8, 2, true", {"registers": 65}, "3 blocks fit a multiprocessor, budget 4"),
        (HOPPER, {"instructions": "HGMMA"}, "no instruction HGMMA"),
        (HOPPER.replace("bf16", "float"), {"instructions": "HGMMA"}, r"x8\.F32\.TF32"),
        (HOPPER.replace("bf16", "float"), {"instructions": "STS.64"}, r"no instruction STS\.64"),
        (HOPPER, {"instructions": "UTMALDG"}, "no instruction UTMALDG"),
        (HOPPER, {"instructions": "STSM"}, "no instruction STSM"),
        (HOPPER, {"instructions": "UTMASTG"}, "no instruction UTMASTG"),
        (HOPPER.replace("relu_fwd", "masked_gradient"), {"instructions": "LDG"}, r"no instruction LDG\.E\.128"),
        (HOPPER, {"instructions": "USETMAXREG"}, "no instruction USETMAXREG"),
        (HOPPER, {"instructions": "ACQBULK"}, "no instruction ACQBULK"),
        (HOPPER, {"instructions": "PREEXIT"}, "no instruction PREEXIT"),
        (HOPPER_STAGE, {"instructions": "UTMAPF"}, "no instruction UTMAPF"),
        (
            "sm90::conv_split_fwd<sm90::WgmmaTile<bf16, 4, 1,",
            {"registers": 88},
            "1 blocks fit a multiprocessor, budget 2",
        ),
        (HOPPER, {"stack": 8}, "8 bytes of a thread are in local memory"),
        (HOPPER, {"shared": 32 * KB}, "of shared memory, budget 232448"),
        (HOPPER_STAGE, {"instructions": "LDS"}, "no instruction LDS"),
        (HOPPER_STAGE, {"instructions": "VIMNMX3"}, "no instruction VIMNMX3"),
        (HOPPER_STAGE, {"shared": 2 * KB}, "of shared memory, budget 232448"),
        (HOPPER_FIRST, {"instructions": "HGMMA"}, r"no instruction HGMMA\.64x56x16\.F32"),
        (HOPPER_FIRST, {"instructions": "UTMALDG.5D"}, r"no instruction UTMALDG\.5D"),
        (HOPPER_FIRST + "false", {"instructions": "VIMNMX3"}, r"no instruction VIMNMX3\.S16x2"),
        (HOPPER_FIRST + "true", {"instructions": "STG.E.U16"}, r"no instruction STG\.E\.U16"),
        (HOPPER_FIRST, {"shared": 17 * KB}, "of shared memory, budget 232448"),
        ("nothing<float>", {}, "has no budget"),
    ],
)
def test_a_fault_is_named(built, name, change, fault):
    """What ptxas or an edit could do to a kernel; "instructions" takes away those that begin so."""
    kernel = one(built, "relu_nhwc" if name.startswith("nothing") else name)
    assert faults(kernel) == []
    if start := change.pop("instructions", None):
        kept = {name: count for name, count in kernel.instructions.items() if not name.startswith(start)}
        kernel = replace(kernel, instructions=Counter(kept))
    if name.startswith("nothing"):
        kernel = replace(kernel, name=name)
    assert fault in "\n".join(faults(replace(kernel, **change)))


def test_too_many_instructions(built):
    """As in the first version, which found the place of every element by itself."""
    kernel = one(built, "conv_fold_image<bf16, 2, false")
    (fault,) = faults(replace(kernel, instructions=kernel.instructions + Counter(IMAD=500)))
    assert fault.endswith("instructions, budget 480")


def test_serialized_products(built):
    """As ptxas makes them where it cannot keep the sums' registers to the products alone."""
    kernel = one(built, HOPPER)
    waits = Counter({"WARPGROUP.ARRIVE": sum(kernel.instructions.values())})
    (fault,) = faults(replace(kernel, instructions=kernel.instructions + waits))
    assert fault.endswith("batches: they are serialized")


@pytest.mark.parametrize("instruction", ["LDL.64", "STL", "RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD", "STG.E"])
def test_unwanted_instructions(built, instruction):
    kernel = one(built, "lrn_fwd_nhwc<bf16, 8, 2")
    (fault,) = faults(replace(kernel, instructions=kernel.instructions + Counter([instruction])))
    assert fault.endswith(f"1 times {instruction}")


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (80, 256, 32, 0, 8),  # threads
        (86, 256, 32, 0, 6),
        (89, 32, 16, 0, 24),  # blocks
        (90, 256, 80, 0, 3),  # registers: 80 of 32 lanes, ten pieces, six warps in a quarter of the file
        (90, 256, 81, 0, 2),  # eleven, five warps
        (90, 128, 255, 0, 2),
        (90, 1024, 65, 0, 0),
        (80, 128, 32, 40 * KB, 4),  # shared memory, and 1 KB of the system's for each
        (86, 128, 32, 99 * KB, 1),
        (90, 128, 32, 75 * KB, 3),
        (90, 128, 32, 75 * KB + 1, 2),
    ],
)
def test_resident_blocks(architecture, threads, registers, shared, blocks):
    assert resident_blocks(architecture, threads, registers, shared) == blocks
