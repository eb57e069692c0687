"""Runs the tests of tests/ops on special values on the CUDA kernels: for the process that bindings.run starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product

import torch

from ..ops import test_lrn, test_max_pool
from ..ops.calls import Calls
from . import bindings

TESTS = [
    test_lrn.test_impulses_are_exact,
    test_lrn.test_squares_do_not_overflow,
    test_lrn.test_denominator_keeps_its_digits_in_bfloat16,
    test_lrn.test_special_values_stay_within_their_windows,
    test_lrn.test_zeros_and_subnormals_pass,
    test_lrn.test_unusual_parameters_follow_the_formula,
    test_max_pool.test_ties_and_special_values_go_where_torch_sends_them,
    test_max_pool.test_windows_of_minus_infinity,
    test_max_pool.test_gradients_keep_special_values,
]


def cases(test: Callable) -> Iterator[dict]:
    """The arguments with which pytest would call the test, except those with float64, which no CUDA kernel takes."""
    axes = []
    for mark in test.pytestmark:
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        axes.append([dict(zip(names, value if len(names) > 1 else [value], strict=True)) for value in values])
    for chosen in product(*axes):
        arguments = {name: value for part in chosen for name, value in part.items()}
        if arguments.get("dtype") != torch.float64:
            yield arguments


def main() -> None:
    bindings.take_over(sys.argv[1])
    count, wrong = 0, []
    for test in TESTS:
        for arguments in cases(test):
            torch.manual_seed(0)
            count += 1
            try:
                with Calls():  # unwatched, functions would go to the CPU's kernels without a word to the dispatcher
                    test(**arguments, backend="auto", device="cpu")
            except AssertionError as error:
                wrong.append(f"{test.__name__}, {arguments}: {error}")
    assert not wrong, "\n" + "\n".join(wrong)
    print(count)


if __name__ == "__main__":
    main()
