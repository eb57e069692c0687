"""What splits a net: its dropout, what cannot be split, and what a resumed run may change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from alexnet_fast.errors import InputError
from alexnet_fast.models import VARIANTS
from alexnet_fast.parallel import BatchDropout, split_dropouts
from alexnet_fast.train.config import resolve, resumed

DIGITS = {"data": "digits", "out": "runs/x"}


def _dropout(seed: int = 5, p: float = 0.25) -> BatchDropout:
    dropout = BatchDropout(p, 12)
    dropout.seed, dropout.rows = seed, torch.arange(12)
    return dropout


def test_a_part_of_a_batch_gets_its_part_of_the_mask():
    dropout, x = _dropout(), torch.ones(12, 40)
    whole = dropout(x)
    assert whole.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert 0.6 < (whole > 0).float().mean() < 0.9
    dropout.rows = torch.tensor([3, 1, 11])
    assert torch.equal(dropout(x[:3]), whole[[3, 1, 11]])
    dropout.columns = (1, 4)
    assert torch.equal(dropout(x[:3, :10]), whole[[3, 1, 11], 10:20])


def test_another_seed_gives_another_mask_and_evaluation_none():
    x = torch.ones(12, 40)
    assert torch.equal(_dropout()(x), _dropout()(x))
    assert not torch.equal(_dropout(6)(x), _dropout()(x))
    assert torch.equal(_dropout().eval()(x), x)
    assert not _dropout(p=1.0)(x).any()
    assert torch.equal(_dropout(p=0.0)(x), x)


def test_dropouts_of_any_net_are_replaced_in_order():
    net = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))
    keys = list(net.state_dict())
    made = split_dropouts(net, 8)
    assert [dropout.p for dropout in made] == [0.1, 0.3]
    assert (net[0], net[1][1]) == tuple(made)
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"parallel": "pipeline"}, "--parallel: unknown parallel 'pipeline'; known are ddp, towers, hybrid"),
        ({"parallel": "towers", "variant": "paper"}, "--parallel: towers needs 2 ranks, got 1"),
        ({"parallel": "towers", "variant": "paper", "nproc": 4}, "towers needs 2 ranks, got 4"),
        ({"parallel": "towers", "nproc": 2}, "which has 1, 1, 1, 1, 1 (variant torchvision)"),
        ({"parallel": "towers", "nproc": 2, "variant": "caffe"}, "LRN within each tower, and its windows cross them"),
        ({"parallel": "hybrid", "nproc": 3}, "a number of ranks that divides the 4096 features of fc6 and fc7, got 3"),
        ({"hybrid_scheme": "b", "nproc": 2}, "--hybrid-scheme: b is of --parallel hybrid, got ddp"),
        ({"hybrid_scheme": "d", "parallel": "hybrid"}, "known are a, b, c"),
        ({"gradients": "bf16", "parallel": "towers", "variant": "paper", "nproc": 2}, "--gradients: towers send"),
        ({"gradients": "fp8"}, "known are fp32, bf16"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints: expected from 1 to "),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(given: dict, said: str):
    with pytest.raises(InputError) as caught:
        resolve({**DIGITS, **given}, 10)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_towers_split_the_nets_of_2012_alone(variant: str):
    def made() -> object:
        return resolve({**DIGITS, "variant": variant, "parallel": "towers", "nproc": 2}, 10)

    if variant in ("paper", "alex2012"):
        made()
    else:
        with pytest.raises(InputError, match="--parallel: towers needs"):
            made()


def test_a_resumed_run_may_change_its_ranks():
    towers = resolve({**DIGITS, "variant": "paper", "parallel": "towers", "nproc": 2}, 10)
    assert resumed(towers, {"parallel": "ddp", "nproc": 1}).nproc == 1
    assert resumed(towers, {"parallel": "hybrid"}).parallel == "hybrid"
    with pytest.raises(InputError, match="towers needs 2 ranks, got 1"):
        resumed(towers, {"nproc": 1})


def test_the_passes_of_schemes_b_and_c_stay_with_their_ranks():
    config = resolve({**DIGITS, "parallel": "hybrid", "hybrid_scheme": "b", "nproc": 2}, 10)
    assert resumed(config, {"nproc": 2, "workers": 1}).workers == 1
    with pytest.raises(InputError, match=r"--resume: --nproc 2 stays with --hybrid-scheme b.*; got 4"):
        resumed(config, {"nproc": 4})
    with pytest.raises(InputError, match="--resume: the run has --hybrid-scheme b, got a"):
        resumed(config, {"hybrid_scheme": "a"})
