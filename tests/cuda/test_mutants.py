"""The CPU run of the kernels notices small faults in them: of all, three at most go unseen. A plain run tries every
fifth of those in the kernels for any card, --slow every third of those for Hopper."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.conftest import TABLES

from . import host_build, test_hopper, test_linear_int8, test_linear_relu, test_pointwise
from .conv import BF16, EDGES, TF32, Shape, backward, forward, prepared, stage, stages
from .mutants import OTHER_MUTANTS, Mutant
from .mutants_pointwise import POINTWISE_MUTANTS
from .mutants_sm90 import SM90_MUTANTS
from .pointwise import tasks
from .test_conv_relu import Expected, check
from .test_hopper import (
    LISTED,
    LISTED_FIRST,
    LISTED_FIRST_STAGES,
    LISTED_STAGES,
    hopper,
    hopper_backward,
    hopper_stage,
    listed_stages,
)

MUTANTS = [*POINTWISE_MUTANTS, *OTHER_MUTANTS]


def with_moved_x(shape: Shape) -> Expected:
    """With a prepared weight, and an x that begins between two multiples of 16 bytes."""
    return prepared(shape, *forward(shape, BF16, offsets={"x": 2}))


@cache
def suite(launcher: str) -> dict[str, Callable[[], None]]:
    """What is run of a launcher: a quarter of its tests' shapes or less, under the tests' names."""
    if launcher == "sm90::conv_stage_fwd":
        some = [hopper_stage(one, BF16) for one in LISTED_STAGES] + [hopper_stage(listed_stages(TF32)[1], TF32)]
        return {
            "test_stages": lambda: check("threads", some),
            "test_first_stages": lambda: check("threads", [hopper_stage(one, BF16) for one in LISTED_FIRST_STAGES]),
        }
    if launcher == "sm90::conv_relu_bwd":
        shapes = [shape for shape in LISTED if not shape.tile]
        return {
            "test_backward": lambda: check("threads", [hopper_backward(shape, BF16) for shape in shapes]),
            "test_dx_is_masked_on_its_way": lambda: test_hopper.test_dx_is_masked_on_its_way(BF16),
        }
    if launcher == "sm90::conv_relu_fwd":
        floats = [shape for shape in LISTED if shape.tile in (2, 9)]
        some = [hopper(shape, BF16) for shape in LISTED] + [hopper(shape, TF32) for shape in floats]
        return {
            "test_forward": lambda: check("threads", some),
            "test_first_convolution": lambda: check("threads", [hopper(shape, BF16) for shape in LISTED_FIRST]),
            "test_float32_is_rounded": test_hopper.test_float32_is_rounded,
            "test_refused_dtype_and_tile": test_hopper.test_refused_dtype_and_tile,
        }
    stem = launcher.rpartition("_")[0]
    if stem.startswith("conv"):
        cases = {
            "conv_relu_fwd": lambda: [forward(shape, BF16) for shape in EDGES],
            "conv_relu_bwd": lambda: [backward(shape, BF16) for shape in EDGES[1::3]],
            "conv_stage_fwd": lambda: [stage(s, BF16) for s in stages(20, seed=3) if not s.shape.tile],
        }[launcher]()
        name = {"conv_relu_fwd": "test_forward", "conv_relu_bwd": "test_backward", "conv_stage_fwd": "test_pooling"}
        found = {name[launcher]: lambda: check("threads", cases)}
        if launcher == "conv_relu_fwd":
            found["test_prepared_weights"] = lambda: check("threads", [with_moved_x(shape) for shape in EDGES[5:10]])
        return found
    if stem == "linear_relu":
        few = test_linear_relu.all_cases()[::2]
        return {
            "test_as_exact_as_torch": lambda: test_linear_int8.check("threads", few),
            "test_special_values": lambda: test_linear_relu.test_special_values(19, True),
        }
    if stem == "linear_int8":
        few, moved = test_linear_int8.all_cases()[::2], test_linear_int8.misaligned()[::5]
        return {
            "test_as_exact_as_torch": lambda: test_linear_int8.check("threads", few),
            "test_misaligned_tensors": lambda: test_linear_int8.check("threads", moved),
        }
    some = [task for task in tasks(stem, 50) if task.case.launcher == launcher]
    found = {"test_as_exact_as_torch": lambda: test_pointwise.run_and_check("threads", some)}
    if stem == "lrn":
        few = [task for task in test_pointwise.lrn_planes(torch.bfloat16) if task.case.launcher == launcher]
        found["test_lrn_of_planes_in_shared_memory"] = lambda: test_pointwise.run_and_check("threads", few)
        special = (5, 13), 16, False, 1
        found["test_nan_stays_within_its_windows"] = lambda: test_pointwise.test_nan_stays_within_its_windows(*special)
    if stem == "max_pool":
        few = [task for task in test_pointwise.planes(torch.bfloat16) if task.case.launcher == launcher]
        found["test_planes_in_shared_memory"] = lambda: test_pointwise.run_and_check("threads", few)
        found["test_ties"] = lambda: test_pointwise.test_ties(torch.float32, False)
    if launcher == "max_pool_fwd":
        bits = torch.bfloat16, False, (2, 16, 9, 11), 2
        found["test_every_bit_of_pooling"] = lambda: test_pointwise.test_every_bit_of_pooling(*bits)
    if stem == "epilogue":
        both = [task for dtype in (torch.bfloat16, torch.float32) for task in test_pointwise.pairs(dtype)]
        few = [task for task in both if task.case.launcher == launcher]
        found["test_lrn_and_pool_in_pairs"] = lambda: test_pointwise.run_and_check("threads", few)
        tiles = [task for task in test_pointwise.epilogue_planes(torch.bfloat16) if task.case.launcher == launcher]
        found["test_lrn_of_planes_in_shared_memory"] = lambda: test_pointwise.run_and_check("threads", tiles)
        down = [task for task in test_pointwise.columns(torch.bfloat16) if task.case.launcher == launcher]
        found["test_lrn_and_pool_down_columns"] = lambda: test_pointwise.run_and_check("threads", down)
    if launcher == "epilogue_fwd":
        special = test_pointwise.test_special_values_down_columns
        found["test_special_values_down_columns"] = lambda: special(torch.float32, True)
    return found


def catcher(mutant: Mutant, program: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test that fails on the mutant, and how: a report of host_simt's, or a wrong result. Empty if none does."""
    monkeypatch.setattr(host_build, "runner", lambda kind: program)
    for name, test in suite(mutant.launcher).items():
        try:
            test()
        except host_build.HostFaultError as fault:
            named = re.search(
                "race|uninitialized|out of bounds|misaligned|divergence|dependency|launch|registers", str(fault)
            )
            return f"{name}: {named[0] if named else str(fault).splitlines()[0]}"  # "exit -11": by a signal
        except AssertionError:
            return f"{name}: wrong result"
    return ""


@pytest.mark.parametrize(
    ("mutants", "unseen"),
    [
        pytest.param(MUTANTS[::5], 1, id="portable"),  # of nearly every launcher some
        pytest.param(SM90_MUTANTS[::3], 1, id="sm90", marks=pytest.mark.slow),
        pytest.param(MUTANTS, 2, id="all portable", marks=pytest.mark.soak),
        pytest.param(SM90_MUTANTS, 1, id="all sm90", marks=pytest.mark.soak),
    ],
)
def test_mutants_are_caught(mutants, unseen, tmp_path, monkeypatch, request):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda n: mutants[n].program(tmp_path / str(n)), range(len(mutants))))
    caught = [catcher(mutant, program, monkeypatch) for mutant, program in zip(mutants, programs, strict=True)]
    title = f"faults in kernels, and what notices them ({len(mutants)})"
    request.config.stash[TABLES][title] = [
        f"{mutant!s:<69} {how or 'NOT CAUGHT'}" for mutant, how in zip(mutants, caught, strict=True)
    ]
    assert len(mutants) > 6
    assert caught.count("") <= unseen


def test_a_death_by_a_signal_is_a_catch(tmp_path, monkeypatch):
    """A mutant that crashes counts as caught, though host_simt reports nothing: the process is gone."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nkill -SEGV $$\n")
    program.chmod(0o755)
    assert catcher(MUTANTS[0], program, monkeypatch) == "test_as_exact_as_torch: exit -11"


@pytest.mark.parametrize("launcher", sorted({mutant.launcher for mutant in [*MUTANTS, *SM90_MUTANTS]}))
def test_the_kernels_themselves_pass(launcher):
    """The kernels without a fault pass, or else every mutant would count as caught."""
    for test in suite(launcher).values():
        test()
