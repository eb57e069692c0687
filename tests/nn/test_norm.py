"""The normalizations that torch.nn lacks, against loops that read like their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast.nn import GroupedLocalResponseNorm, SpatialResponseNorm

X = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_groups_are_towers():
    """As two GPUs do it: each half by itself."""
    norm = GroupedLocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0, groups=2)
    tower = nn.LocalResponseNorm(5, alpha=0.5, beta=0.75, k=2.0)
    torch.testing.assert_close(norm(X), torch.cat([tower(half) for half in X.chunk(2, 1)], 1))
    assert not torch.allclose(norm(X), tower(X)), "otherwise the groups make no difference here"


def test_one_group_is_torch():
    torch.testing.assert_close(GroupedLocalResponseNorm(4, 0.5)(X), nn.LocalResponseNorm(4, 0.5)(X))


@pytest.mark.parametrize("size", [1, 3, 5])
def test_spatial(size):
    expected = torch.empty_like(X)
    reach = size // 2
    for i in range(X.shape[2]):
        for j in range(X.shape[3]):
            window = X[:, :, max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1]
            total = window.square().sum((2, 3))
            expected[:, :, i, j] = X[:, :, i, j] * (2 + 0.5 / size**2 * total) ** -0.75
    torch.testing.assert_close(SpatialResponseNorm(size, alpha=0.5, beta=0.75, k=2.0)(X), expected)


def test_spatial_gradient():
    assert torch.autograd.gradcheck(SpatialResponseNorm(3, 0.5), X[:1].clone().requires_grad_())


def test_spatial_in_float16_does_not_overflow():
    x = torch.full((1, 1, 3, 3), 300.0)
    norm = SpatialResponseNorm(3, alpha=1e-4)
    torch.testing.assert_close(norm(x.half()).float(), norm(x), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [0, 2, -3])
def test_spatial_sizes_are_odd(size):
    with pytest.raises(ValueError, match="size: expected a positive odd int"):
        SpatialResponseNorm(size)


def test_repr_names_what_it_computes():
    norm = GroupedLocalResponseNorm(5, 1e-4, 0.75, 2.0, groups=2)
    assert repr(norm) == "GroupedLocalResponseNorm(5, alpha=0.0001, beta=0.75, k=2.0, groups=2)"
    assert repr(SpatialResponseNorm(5, 1e-3)) == "SpatialResponseNorm(5, alpha=0.001, beta=0.75, k=1.0)"
