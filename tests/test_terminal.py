"""Names from strangers do not steer the terminal, and every stream can print them."""

from __future__ import annotations

import pytest

from alexnet_fast.terminal import nearest, one_line, shown


@pytest.mark.parametrize(
    ("name", "printed"),
    [("\x1b]0;x\x07", r"\x1b]0;x\x07"), ("caf\udce9.jpg", r"caf\xe9.jpg"), ("a\u202eb", r"a\u202eb"), ("café", "café")],
)
def test_what_does_not_print_is_escaped(name: str, printed: str):
    assert shown(name) == printed


def test_an_error_is_one_line():
    assert one_line("a\n  b\tc") == "a b c"


def test_near_words_are_named():
    assert nearest("papr", ["paper", "caffe"]) == "; did you mean paper?"
    assert nearest("x", ["paper"]) == ""
