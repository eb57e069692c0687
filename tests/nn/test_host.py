"""How much Python a call of a fused net is: calls are counted, which no noise of the machine changes."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch

from alexnet_fast.nn.pairing import join
from benchmarks.host import PRODUCTS, SIDE, bare, call_of, nets, products

# Times nn.Sequential's calls, in inference and in training, whose numbers differ between versions of torch and Python.
MOST = {False: 0.22, True: 0.43}


def python_calls(call: Callable[[], object]) -> int:
    """Functions entered, Python's and C's, by this thread in a ``call`` that was made before."""
    call()
    count = 0

    def entered(_frame, event, _argument) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(entered)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_python_calls_do_not_creep_back(training):
    x = torch.randn(1, 3, SIDE, SIDE)
    counts = {name: python_calls(call_of(net, x, training)) for name, net in nets().items()}
    assert counts["ours"] <= MOST[training] * counts["eager"]


def test_pairs_cost_little():
    """A small net calls its pairs many times in a millisecond, and torch's two modules are few calls themselves."""
    plain = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    paired = copy.deepcopy(plain)
    join(paired, "0", "1")
    x = torch.randn(1, 3, 9, 9)
    with torch.inference_mode():
        plain_calls, calls = python_calls(lambda: plain(x)), python_calls(lambda: paired(x))
    assert calls <= 2.5 * plain_calls


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_products_that_have_to_be_made(training):
    x = torch.randn(1, 3, SIDE, SIDE)
    calls = products(nets()["eager"], x, training)
    made = [function._opname for function, _, _ in calls]
    # The input wants no gradient, but each linear layer's input does: two products for each.
    wanted = {"convolution": 5, "addmm": 3, "convolution_backward": 5 * training, "mm": 6 * training}
    assert {name: made.count(name) for name in PRODUCTS} == wanted
    bare(calls)()  # they can be made again
