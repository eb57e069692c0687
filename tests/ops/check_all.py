"""Runs the native kernels once over all samples: for a process that needs an environment or a torch of its own.

python -m tests.ops.check_all [BACKEND …]

checks ``cpu``, in every dtype, or those that are named, on the GPU, each sample in one dtype: under compute-sanitizer
every launch takes its time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from alexnet_fast import _C, BackendError, backends

from .compare import DTYPES, as_exact, double, output_gradient, results
from .layouts import relayout
from .samples import SAMPLES, Sample


def cases(backend: str) -> Iterator[tuple[Sample, torch.dtype]]:
    for number, sample in enumerate(SAMPLES):
        for dtype in DTYPES if backend == "cpu" else [backends.DTYPES["cuda"][number % 3]]:
            yield sample, dtype


def check(backend: str) -> int:
    """How many tensors were compared."""
    device, checked = "cpu" if backend == "cpu" else "cuda", 0
    for sample, dtype in cases(backend):
        data, dy = sample.data(dtype), output_gradient(sample, dtype)
        peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
        for layout in ("contiguous", "channels_last"):
            moved = {name: relayout(tensor.to(device), layout) for name, tensor in data.items()}
            try:
                actual = results(
                    lambda leaves, s=sample: s.ours(leaves, backend), moved, relayout(dy.to(device), layout)
                )
            except BackendError:
                if backend == "cuda":  # by name it refuses what it does not cover
                    continue
                raise
            with torch.inference_mode():
                again = sample.ours(moved, backend)
            assert as_exact(again.cpu(), peer["output"], exact["output"]), f"{sample}, {dtype}, {layout}: inference"
            for name in actual:
                assert as_exact(actual[name].cpu(), peer[name], exact[name]), f"{sample}, {dtype}, {layout}: {name}"
                checked += 1
    return checked


def main(names: list[str]) -> None:
    # As exact as PyTorch's float32 on a CPU: without TF32.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    checked = sum(map(check, names or ["cpu"]))
    print(f"torch {torch.__version__}, {_C.build_info()['cpu_isa']}, {checked} tensors checked")


if __name__ == "__main__":
    main(sys.argv[1:])
