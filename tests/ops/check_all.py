"""Runs the native kernels once over all samples: for a process that needs an environment or a torch of its own.

python -m tests.ops.check_all
"""

from __future__ import annotations

import torch

from alexnet_fast import _C

from .compare import DTYPES, as_exact, double, output_gradient, results
from .layouts import relayout
from .samples import SAMPLES


def main() -> None:
    checked = 0
    for sample in SAMPLES:
        for dtype in DTYPES:
            data, dy = sample.data(dtype), output_gradient(sample, dtype)
            peer, exact = results(sample.torch, data, dy), results(sample.torch, double(data), dy.double())
            for layout in ("contiguous", "channels_last"):
                moved = {name: relayout(tensor, layout) for name, tensor in data.items()}
                actual = results(lambda leaves, s=sample: s.ours(leaves, "cpu"), moved, relayout(dy, layout))
                for name in actual:
                    assert as_exact(actual[name], peer[name], exact[name]), f"{sample}, {dtype}, {layout}: {name}"
                    checked += 1
    print(f"torch {torch.__version__}, {_C.build_info()['cpu_isa']}, {checked} tensors checked")


if __name__ == "__main__":
    main()
