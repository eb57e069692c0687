"""JSON from strangers: what is not of its type is named, whatever it is, and nothing else is raised."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest

from alexnet_fast.data.records import Range, conform, read_json


class Box(TypedDict):
    side: Annotated[int, Range(1, 9)]
    mean: tuple[float, float]
    names: list[str]


WHOLE: dict[str, Any] = {"side": 3, "mean": [0, 0.5], "names": ["a"]}


def test_a_whole_record_passes_with_its_lists_as_tuples():
    assert conform(WHOLE, Box, "box") == {"side": 3, "mean": (0.0, 0.5), "names": ["a"]}


FAULTS = {
    "side: expected from 1 to 9, got 0": {"side": 0},
    "side: expected a whole number, got True": {"side": True},
    "side: expected a whole number, got 3.0": {"side": 3.0},
    "mean: expected 2 entries, got 1": {"mean": [1]},
    "mean[1]: expected a finite number": {"mean": [1, 10**400]},
    "mean[0]: expected a number, got 'a'": {"mean": ["a", 0]},
    "names: expected a list, got None": {"names": None},
    "unknown 'other'": {"other": 1},
}


@pytest.mark.parametrize("said", FAULTS)
def test_a_fault_is_named(said: str):
    with pytest.raises(ValueError, match=r"^box: ") as caught:
        conform({**WHOLE, **FAULTS[said]}, Box, "box")
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\0" * 64, b"\xff", b"1" * 5000, b""])
def test_what_is_no_json_is_a_value_error_with_the_files_name(tmp_path: Path, content: bytes):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^state\.json: "):
        read_json(tmp_path / "state.json")
