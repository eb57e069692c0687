"""Random numbers by counter: a draw depends on its key alone, never on what was drawn before it.

So an image is cropped the same way in epoch 7 whether the run went through epochs 0 to 6, or was resumed, or was split
over other ranks and workers. The mixer is SplitMix64's (Steele, Lea and Flood, 2014).
"""

from __future__ import annotations

MASK = 2**64 - 1


def mix(*key: int) -> int:
    """64 bits that depend on every number of ``key`` and on their order."""
    state = 0
    for number in key:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


class Draws:
    """The stream of draws that belongs to one key, such as (seed, epoch, image)."""

    def __init__(self, *key: int):
        self._key = mix(*key)
        self._count = 0

    def below(self, bound: int) -> int:
        """A whole number from 0 to ``bound`` - 1. The bias of the fixed-point product is under bound / 2^64."""
        self._count += 1
        return (mix(self._key, self._count) * bound) >> 64

    def unit(self) -> float:
        """A number from 0 up to 1, in steps of 2^-53."""
        return self.below(2**53) / 2**53
