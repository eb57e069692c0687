"""``alexnet-fast bench``: what it prints is what was measured or planned."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from alexnet_fast import bench
from alexnet_fast.cli import app
from alexnet_fast.errors import InputError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_a_look(monkeypatch):
    seen = bench.look(device="cpu", batch=1, seconds=0)
    assert [row.case.split(",")[0] for row in seen] == [
        "torchvision",
        "torchvision",
        "caffe",
        "caffe",
        "LRN after conv1",
    ]
    for row in seen:
        assert row.ours > 0
        assert row.images_s == 1 / row.ours
        assert row.ratio == row.eager / row.ours
    monkeypatch.setattr(bench, "look", lambda batch: seen)
    assert f"{seen[0].ratio:.2f}×" in run()
    assert [row["ratio"] for row in json.loads(run("--json"))["rows"]] == [row.ratio for row in seen]


def test_a_plan():
    rows = json.loads(run("--plan", "--json", "--batch-size", "128", "--link", "100", "--latency", "0"))["rows"]
    assert [row["mode"] for row in rows] == ["ddp", "towers", "hybrid"]
    assert rows[0]["gradients"] == 243_860_896
    assert rows[1]["exchange"] == pytest.approx(rows[1]["activations"] / 100e9)
    assert "243.9" in run("--plan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "--variant", "x"], "--variant: expected one of torchvision, .*, got 'x'"),
        (["--plan", "--link", "0"], "--link: expected a positive number, got 0.0"),
        (["--batch-size", "-1"], "--batch-size: expected a positive number, got -1"),
        (["--plan", "--batch-size", "3"], "--batch-size: expected an even number for two devices, got 3"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(InputError, match=message):
        run(*arguments)
