"""The CUDA backend as users call it, on a CPU: public functions, autograd formulas, bindings and kernels together."""

from __future__ import annotations

import pytest

from alexnet_fast.models import VARIANTS

from . import bindings

STAGES = {"conv_stage_cuda", "epilogue_backward", "conv_relu_cuda", "conv_relu_backward_cuda"}
LPIPS = {"lpips_layer", "lpips_layer_backward"}
LRN, POOL = {"lrn", "lrn_backward"}, {"max_pool", "max_pool_backward"}


def test_every_sample():
    """The samples of tests/ops, in several layouts: results as exact as PyTorch's, strides as the fakes say, TF32 as
    torch's switch says."""
    count, *reached = bindings.run("tests.cuda.check_bindings").split()
    assert int(count) > 70
    others = {"epilogue", "linear_int8", "linear_relu_cuda", "linear_relu_dropout_backward"}
    assert {name.removeprefix("alexnet_fast::") for name in reached} == STAGES | LRN | POOL | LPIPS | others


def test_packed_nets():
    """Weights are prepared once, and followed; see tests/cuda/check_packed.py."""
    assert int(bindings.run("tests.cuda.check_packed")) > 30


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_special_values(seed, monkeypatch):
    """The tests pass whatever values approximate instructions give within their allowed errors."""
    monkeypatch.setenv("HOST_SIMT_APPROXIMATION", str(seed))
    assert int(bindings.run("tests.cuda.check_special")) > 150


@pytest.fixture(scope="module")
def called() -> dict[str, set[str]]:
    """The operators that each variant ran, its results having been compared."""
    lines = bindings.run("tests.cuda.check_variants").splitlines()
    return {name: set(operators) for name, *operators in map(str.split, lines)}


# What lies beside whole stages: an LRN after the pool, or before the ReLU.
BESIDE = {"alex2012": LRN | POOL, "caffenet": LRN, "owt": LRN | POOL}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_trains_on_the_kernels(name, called):
    """Outputs and gradients as the reference's; and nothing but our operators where there is one."""
    assert called[name] == STAGES | BESIDE.get(name, set())
