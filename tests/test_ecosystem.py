"""The real torchvision and its AlexNet, and int8 quantization, in an environment of their own."""

from __future__ import annotations

import pytest

from tests.second_torch import TORCH


@pytest.mark.slow
def test_with_torchvision_and_torchao(second_torch):
    """tests/ecosystem.py says what."""
    done = second_torch("tests.ecosystem")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"torch {TORCH}")
