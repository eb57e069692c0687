"""Every element is written, and written the same, whatever the memory held and however many threads there are."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from alexnet_fast import backend as use_backend

from .compare import DTYPES, as_exact, double, output_gradient, results
from .layouts import relayout
from .samples import SAMPLES, Sample

LARGE = [s for s in SAMPLES if s.reason.startswith(("several pieces", "AlexNet", "two towers", "more channels"))]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)
large_samples = pytest.mark.parametrize("sample", LARGE, ids=str)


def run(sample: Sample, dtype: torch.dtype, layout: str, backend: str, device: str = "cpu", seed: int = 0):
    data = {name: relayout(tensor.to(device), layout) for name, tensor in sample.data(dtype, seed).items()}
    dy = relayout(output_gradient(sample, dtype).to(device), layout)
    return results(lambda leaves: sample.ours(leaves, backend), data, dy)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN, and 255 for bytes."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@samples
def test_every_element_is_written(sample, dtype, layout):
    """Under torch's deterministic mode, which also refuses operators that are not: ours must not call one."""
    actual = run(sample, dtype, layout, "cpu")
    data, dy = sample.data(dtype), output_gradient(sample, dtype)
    torch.use_deterministic_algorithms(False)
    peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
    assert all(as_exact(actual[name], peer[name], exact[name]) for name in actual)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@large_samples
def test_twenty_repeats_are_bitwise_equal(sample, dtype, layout, backend, device):
    first = run(sample, dtype, layout, backend, device)
    assert all(equal(run(sample, dtype, layout, backend, device), first) for _ in range(19))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sample", [s for s in LARGE if not s.stem.startswith("conv")], ids=str)
def test_number_of_threads_changes_nothing(sample, dtype, layout):
    """Work is cut by shape alone. (Convolutions are oneDNN's, which promises no such thing.)"""
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run(sample, dtype, layout, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


def test_eight_threads_at_once(backend, device):
    """Each with data of its own, all operators in turn: they share no scratch memory and no choice of a backend."""
    expected = [
        [run(sample, torch.float32, "contiguous", backend, device, seed) for sample in LARGE] for seed in range(8)
    ]

    def work(seed: int) -> None:
        with use_backend(backend):
            for sample, want in zip(LARGE, expected[seed], strict=True):
                got = run(sample, torch.float32, "contiguous", None, device, seed)
                for name in want:
                    torch.testing.assert_close(got[name], want[name])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def _child(queue) -> None:
    torch.set_num_threads(1)  # as DataLoader's workers do: GNU OpenMP's pool does not survive a fork
    queue.put([{name: t.numpy() for name, t in run(s, torch.float32, "contiguous", "cpu").items()} for s in LARGE])


def test_after_a_fork():
    """DataLoader's workers fork from a process that has run the operators already."""
    expected = [run(s, torch.float32, "contiguous", "cpu") for s in LARGE]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    actual = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    for got, want in zip(actual, expected, strict=True):
        for name in want:
            torch.testing.assert_close(torch.from_numpy(got[name]), want[name])
