"""Every kernel is launched once, and what its launch takes is what each architecture gives.

host_simt has counted shared memory by what ran; here registers and static memory are those that nvcc compiled.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from alexnet_fast import tuning
from alexnet_fast.ops import LRN, Pool

from ..ops.samples import epilogue, lpips_layer, lrn
from . import host_build, machine_code
from .conv import (
    BF16,
    EDGES,
    F16,
    F32,
    MODES,
    TF32,
    TILE_ROWS,
    TILES,
    Stage,
    backward,
    forward,
    prepared,
    stage,
    stages,
)
from .host_build import Case
from .limits import MULTIPROCESSORS, refusals
from .machine_code import Kernel
from .mutants import Mutant
from .pointwise import tasks
from .test_conv_relu import CUDA_ERROR_INVALID_VALUE
from .test_hopper import (
    LISTED,
    LISTED_FIRST,
    LISTED_FIRST_STAGES,
    MASKED,
    dx_alone,
    hopper,
    hopper_backward,
    hopper_stage,
    listed_stages,
)
from .test_linear_int8 import all_cases as int8_cases
from .test_linear_relu import all_cases as linear_cases
from .test_pointwise import STEMS, of

OLD_LAUNCH = Mutant(
    "conv_relu_fwd",
    "dynamic memory alone is compared with what there is without asking",
    "common/launch.cuh",
    "if (static_bytes + dynamic_bytes > kWithoutAsking",
    "if (dynamic_bytes > kWithoutAsking",
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def test_the_old_launch_is_caught(tmp_path):
    """What an H100 refused: a ring of 48 KB in the 128 x 64 tile, and 2 KB of places beside it."""
    program = OLD_LAUNCH.program(tmp_path)
    some = [forward(shape, BF16)[0] for shape in TILES]
    host_build.run("threads", some)
    with pytest.raises(host_build.HostFaultError, match="49152 dynamic bytes of shared memory are 51200") as report:
        host_build.run("threads", some, program)
    assert re.search(r"launch: .*conv_relu_fwd<.*128, 64, .*blocks of \(128,1,1\)", str(report.value))


def cases() -> list[Case]:
    """Small cases, enough of them to launch every instantiation that a launcher can pick."""
    found = [task.case for stem in STEMS for task in tasks(stem, 150)]
    vectors = (
        lrn("vectors in both layouts", (1, 16, 4, 4), 5),
        lrn("tiles of planes", (1, 16, 9, 9), 5),
        lrn("tiles of even planes", (1, 16, 8, 9), 5),
        lrn("and any window", (1, 16, 9, 9), 3),
        epilogue("and", (1, 16, 4, 4), lrn=LRN(5)),
        epilogue("and", (1, 16, 7, 7), lrn=LRN(5), pool=Pool(3, 2)),
        epilogue("and any window", (1, 16, 4, 4), lrn=LRN(3)),
        epilogue("and", (1, 16, 7, 7), lrn=LRN(3), pool=Pool(3, 2)),
        epilogue("tiles of planes", (1, 16, 9, 9), lrn=LRN(5)),
        epilogue("tiles of even planes", (1, 16, 8, 9), lrn=LRN(5)),
        epilogue("and", (1, 16, 9, 9), lrn=LRN(5), pool=Pool(3, 2)),
        epilogue("AlexNet's second stage, of fewer channels", (1, 8, 27, 27), lrn=LRN(5), pool=Pool(3, 2)),
        epilogue("and its first one", (1, 8, 55, 55), lrn=LRN(5), pool=Pool(3, 2)),
        epilogue("four channels a group", (1, 12, 7, 7), lrn=LRN(5, groups=3), pool=Pool(3, 2)),
        epilogue("a pool alone", (1, 16, 7, 7), pool=Pool(3, 2)),
        epilogue("and any window", (1, 16, 4, 4), pool=Pool(2, 2)),
        lpips_layer("and", (2, 16, 4, 4)),
    )
    for sample, dtype, channels_last in product(vectors, DTYPES, (False, True)):
        found += [task.case for task in of(sample, dtype, channels_last)]
    for task in [task for stem in STEMS for task in tasks(stem, 60, seed=1)]:  # elements that make no vectors
        tensors = {**task.case.inputs, **task.case.outputs}
        found.append(replace(task.case, offsets={key: tensor.element_size() for key, tensor in tensors.items()}))
    found += [one for one, *_ in [*int8_cases(), *linear_cases()]]
    for mode in MODES:
        found += [forward(shape, mode)[0] for shape in TILES if shape.tile <= TILE_ROWS[mode.name]]
        found += [forward(shape, mode)[0] for shape in EDGES[:6]]
        found += [backward(shape, mode)[0] for shape in [*EDGES[:6], *TILES] if shape.tile <= 2]
        if mode is not F32:
            found += [hopper(shape, mode)[0] for shape in LISTED if shape.tile]
            found += [hopper_stage(one, mode)[0] for one in listed_stages(mode)[4::5]]
            found += [dx_alone(shape, mode, True) for shape in MASKED]
            if mode is not TF32:
                found += [hopper(shape, mode)[0] for shape in LISTED_FIRST[1::5]]
                first = [replace(one, codes=codes) for one in LISTED_FIRST_STAGES[1::4] for codes in (False, True)]
                found += [hopper_stage(one, mode)[0] for one in first]
            found.append(hopper_backward(LISTED[0], mode)[0])
        found += [stage(one, mode)[0] for one in stages(0, seed=0)]
    return found


@pytest.fixture(scope="module")
def launches(tmp_path_factory) -> list[tuple[str, int, int]]:
    """Kernel, threads of a block, and bytes of dynamic shared memory."""
    path = tmp_path_factory.mktemp("launches") / "launches"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOST_SIMT_LAUNCHES", str(path))
        host_build.run("threads", cases())
    return read(path)


def read(path: Path) -> list[tuple[str, int, int]]:
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return [(comparable(machine_code.short(name)), int(threads), int(dynamic)) for name, threads, dynamic in rows]


def comparable(name: str) -> str:
    """One spelling for what compilers and c++filt write differently."""
    return re.sub(r"\s|\{anonymous\}::|(?<=<)sm90::", "", name)


@pytest.fixture(scope="module")
def built() -> dict[str, list[Kernel]]:
    if reason := machine_code.missing():
        pytest.skip(reason)
    found: dict[str, list[Kernel]] = {}
    for kernel in machine_code.kernels():
        found.setdefault(comparable(kernel.name), []).append(kernel)
    return found


def test_every_kernel_is_launched(launches, built):
    assert {name for name, *_ in launches} == set(built)


def test_a_prepared_weight_takes_no_launch(tmp_path, monkeypatch):
    """AlexNet's first convolution folds its image, and its weight where that is not prepared."""
    names, first = {}, EDGES[5]
    for number, change in enumerate((lambda _, *expected: expected, prepared)):
        monkeypatch.setenv("HOST_SIMT_LAUNCHES", str(tmp_path / str(number)))
        some = [change(first, *make(first, mode)) for make, mode in ((forward, F32), (hopper, BF16))]
        some.append(change(first, *stage(Stage(first, (3, 3), (2, 2)), BF16)))
        host_build.run("threads", [case for case, _ in some])
        names[change] = {name.partition("<")[0] for name, *_ in read(tmp_path / str(number))}
    of_tensors, of_prepared = names.values()
    assert of_tensors - of_prepared == {"conv_fold_kernel"}
    assert "conv_fold_image" in of_prepared


TILED = {
    "conv_relu": lambda shape, mode: forward(shape, mode),
    "conv_stage": lambda shape, mode: stage(Stage(shape, (3, 3), (2, 2)), mode),
    "conv_backward_input": lambda shape, mode: backward(shape, mode, wanted=("dx",)),
    "conv_backward_weight": lambda shape, mode: backward(shape, mode, wanted=("dweight",)),
}


@pytest.mark.parametrize("mode", [BF16, F16, TF32], ids=str)
@pytest.mark.parametrize("operator", TILED)
def test_tuning_names_the_kernels_tiles(operator, mode, tmp_path, monkeypatch):
    """TILES lists all tiles of the kernel in their order: the number after the last is refused."""
    monkeypatch.setenv("HOST_SIMT_LAUNCHES", str(tmp_path / "launches"))
    names = tuning.tiles(operator, "cuda", mode.dtype, mode.allow_tf32)
    count = len(names) or 1
    some = [TILED[operator](replace(EDGES[0], tile=tile), mode)[0] for tile in range(1, count + 2)]
    errors = [result.error for result in host_build.run("threads", some)]
    assert errors == [0] * count + [CUDA_ERROR_INVALID_VALUE]
    launched = [re.search(r"Tile<.*?,(\d+),(\d+),", name) for name, *_ in read(tmp_path / "launches")]
    assert len([*filter(None, launched)]) == count
    assert not names or names == tuple("x".join(found.groups()) for found in launched if found)


def test_every_launch_fits_every_architecture(launches, built):
    """And budgets count no less dynamic memory than is asked for."""
    found = []
    for name, threads, dynamic in launches:
        for k in built.get(name, ()):
            found += refusals(k.name, k.architecture, threads, k.threads, k.registers, k.shared, dynamic)
    assert found == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"threads": 288, "registers": 32}, "blocks of 288 threads: compiled for 256"),
        (
            {"threads": 1056, "most_threads": 1056, "registers": 32},
            "blocks of 1056 threads: compiled for 1056, and a card takes 1024",
        ),
        ({"registers": 255, "threads": 512, "most_threads": 512}, "255 registers a thread are 131072 a block"),
        ({"static": 49168, "dynamic": 0}, "49168 bytes of static shared memory"),
        ({"dynamic": 227 * 1024}, "and 232448 dynamic bytes of"),
    ],
)
@pytest.mark.parametrize("architecture", MULTIPROCESSORS)
def test_a_refusal_is_named(architecture, change, reason):
    fits = {"threads": 256, "most_threads": 256, "registers": 255, "static": 2048, "dynamic": 96 * 1024}
    assert refusals("kernel", architecture, **fits) == []
    (found,) = refusals("kernel", architecture, **(fits | change))
    assert re.search(reason, found)
    assert found.startswith(f"kernel, sm_{architecture}, blocks of ")
