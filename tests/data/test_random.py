"""Draws by counter."""

from __future__ import annotations

from collections import Counter

from alexnet_fast.data.random import Draws, mix


def test_the_mixer_is_splitmix64():
    """The first output of SplitMix64 for seed 0, as its authors publish it."""
    assert mix(0) == 0xE220A8397B1DCDAF


def test_a_key_depends_on_each_number_and_on_their_order():
    keys = [mix(a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    assert len(set(keys)) == len(keys)


def test_draws_are_uniform_and_repeat_with_their_key():
    draws = [[Draws(3, epoch, image).below(7) for image in range(7000)] for epoch in range(2)]
    assert draws[0] != draws[1]
    assert draws[0] == [Draws(3, 0, image).below(7) for image in range(7000)]
    assert all(abs(count - 1000) < 150 for count in Counter(draws[0]).values())  # 5 standard deviations
    stream = Draws(1)
    assert len({stream.below(1 << 40) for _ in range(1000)}) == 1000
