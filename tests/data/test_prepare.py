"""Shards: what is in them, that nothing disturbs them, and that faults are named."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_fast import cli
from alexnet_fast.data import open_data
from alexnet_fast.data import prepare as making
from alexnet_fast.data.images import read_image
from alexnet_fast.data.prepare import prepare
from alexnet_fast.data.shards import problems
from alexnet_fast.data.transforms import centre
from alexnet_fast.errors import InputError
from alexnet_fast.train.commands import open_run_data
from alexnet_fast.train.config import resolve
from tests.data.pictures import picture, write_folder
from tests.train.runs import ROOT, children

SMALL = {"size": 32, "shard_size": 5, "workers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source"), train=8, val=3)


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A copy of ``source`` that may be spoiled."""
    return Path(shutil.copytree(source, tmp_path / "source"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(source: Path, target: Path, *words: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "alexnet_fast", "prepare", source, target, "--size", 32, "--shard-size", 5, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, **pipes, **options)


# ---- What is written -----------------------------------------------------------------------------------------------


def test_shards_hold_the_centres_of_the_pictures_in_order(source: Path, tmp_path: Path):
    prepare(source, tmp_path / "out", **SMALL)
    plain, stored = open_data(str(source)), open_data(str(tmp_path / "out"))
    assert stored.classes == plain.classes == ["cat", "dog"]
    for part in ("train", "val"):
        split = getattr(stored, part)
        assert split.labels.tolist() == getattr(plain, part).labels
        for number, path in enumerate(getattr(plain, part).paths):
            assert (split.pixels(number) == centre(read_image(path), 32, 32)).all()
            assert split.read(number)[0].size == (32, 32)
    assert [len(list((tmp_path / "out" / part).glob("*.u8"))) for part in ("train", "val")] == [4, 2]


def test_lists_name_each_source_with_its_time(source: Path, tmp_path: Path):
    prepare(source, tmp_path / "out", **SMALL)
    rows = json.loads((tmp_path / "out/train/00001.json").read_text())["rows"]
    paths = open_data(str(source)).train.paths[5:10]
    assert [row[:2] for row in rows] == [[f"{p.parent.name}/{p.name}", int(p.parent.name == "dog")] for p in paths]
    assert [row[2:] for row in rows] == [[p.stat().st_mtime_ns, p.stat().st_size] for p in paths]


def test_mean_and_principal_components_are_the_training_sets(source: Path, tmp_path: Path):
    prepare(source, tmp_path / "out", **SMALL)
    data = open_data(str(tmp_path / "out"))
    pixels = np.stack([data.train.pixels(number) for number in range(16)]).astype(np.float64)
    np.testing.assert_allclose(np.load(tmp_path / "out/mean.npy"), pixels.mean(0), rtol=1e-6)
    rgb = pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(data.statistics.mean, rgb.mean(0))
    colour = np.array(data.statistics.colour)
    np.testing.assert_allclose(colour @ colour.T, np.cov(rgb.T, bias=True), rtol=1e-6, atol=1e-12)
    lengths = np.linalg.norm(colour, axis=0)
    assert lengths[0] > lengths[1] > lengths[2] > 0
    np.testing.assert_allclose(colour.T @ colour, np.diag(lengths**2), atol=1e-9)


# ---- Undisturbed, interrupted, split over processes: the same bytes ------------------------------------------------


def test_processes_and_a_kill_at_any_moment_change_no_byte(tmp_path: Path):
    source = write_folder(tmp_path / "source", train=60, val=10)
    prepare(source, tmp_path / "whole", size=32, shard_size=5, workers=1)
    target = tmp_path / "killed"
    for least in (1, 9):  # shards there when it is killed
        process = start(source, target, "--workers", 2)
        deadline = time.monotonic() + 60
        while len(list(target.rglob("0*.json"))) < least:
            assert process.poll() is None, "too fast to be killed"
            assert time.monotonic() < deadline
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):  # they end with their parent
            assert time.monotonic() < deadline
        assert not (target / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in target.rglob("0*.json")}
    assert start(source, target, "--workers", 2).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # whole shards are not made again
    assert contents(target) == contents(tmp_path / "whole")
    assert problems(target, 1)[1] == []


def test_a_worker_that_is_killed_ends_it_with_one_line(tmp_path: Path):
    source = write_folder(tmp_path / "source", train=60, val=10)
    process = start(source, tmp_path / "out", "--workers", 2)
    while not children(process.pid):
        assert process.poll() is None, "too fast to be killed"
    os.kill(children(process.pid)[0], signal.SIGKILL)
    assert "a process of prepare died" in process.communicate()[1]
    assert process.returncode == 1
    prepare(source, tmp_path / "out", size=32, shard_size=5, workers=1)


def test_only_shards_whose_sources_changed_are_made_again(own: Path, tmp_path: Path):
    target = tmp_path / "out"
    prepare(own, target, **SMALL)
    before = contents(target)
    prepare(own, target, **SMALL)
    assert contents(target) == before
    picture(50, 60, 7).save(own / "train/dog/003.jpg")  # image 11, of the third shard
    times = {path.name: path.stat().st_mtime_ns for path in (target / "train").glob("*.u8")}
    prepare(own, target, **SMALL)
    assert [name for name, t in sorted(times.items()) if (target / "train" / name).stat().st_mtime_ns != t] == [
        "00002.u8"
    ]
    prepare(own, tmp_path / "fresh", **SMALL)
    assert contents(target) == contents(tmp_path / "fresh")
    for number in range(3, 8):  # the last shard has no source left
        (own / f"train/dog/{number:03}.jpg").unlink()
    prepare(own, target, **SMALL)
    assert problems(target, 1)[1] == []
    assert len(open_data(str(target)).train) == 11


def test_pictures_are_turned_as_asked_also_in_a_folder_that_was_made_otherwise(own: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    picture(48, 64).save(own / "train/cat/000.jpg", exif=exif)
    options = {**SMALL, "size": 64}
    target, upright, stored = tmp_path / "out", tmp_path / "upright", tmp_path / "stored"
    prepare(own, upright, **options)
    prepare(own, stored, **options, exif=False)
    assert (upright / "train/00000.u8").read_bytes() != (stored / "train/00000.u8").read_bytes()
    for exif, wanted in ((True, upright), (False, stored), (True, upright)):
        prepare(own, target, **options, exif=exif)
        assert contents(target) == contents(wanted)
        given = {"data": str(target), "out": str(tmp_path / "run"), "image_size": 63, "nproc": 1}
        config = resolve({**given, "exif": exif}, 2)
        assert len(open_run_data(config).train) == 16
        with pytest.raises(InputError, match=f"was prepared with --{'' if exif else 'no-'}exif"):
            open_run_data(dataclasses.replace(config, exif=not exif))


# ---- Bad files -----------------------------------------------------------------------------------------------------


def test_bad_files_are_named_counted_capped_and_taken_once_mended(own: Path, tmp_path: Path):
    bad = {"cat/002.jpg": "not an image in a known", "dog/001.jpg": "not an image in a known"}
    good = (own / "train/cat/002.jpg").read_bytes()
    (own / "train/cat/002.jpg").write_bytes(good[::-1])  # its length stays
    (own / "train/dog/001.jpg").write_text("no picture")
    with pytest.raises(
        InputError, match=r"1 of 16 train files are unusable, .* --max-bad 0.05; the first: train/cat/002"
    ):
        prepare(own, tmp_path / "out", **SMALL)
    told: dict[str, str] = {}
    index = prepare(own, tmp_path / "out", **SMALL, max_bad=0.2, tell=lambda done, total, found: told.update(found))
    assert index["bad"] == {"train": 2, "val": 0}
    assert told.keys() <= bad.keys()
    lists = [json.loads(path.read_text())["bad"] for path in sorted((tmp_path / "out/train").glob("*.json"))]
    rows = [row for part in lists for row in part]
    assert [row[0] for row in rows] == list(bad)
    assert all(bad[row[0]] in row[4] for row in rows)
    data = open_data(str(tmp_path / "out"))
    assert len(data.train) == 14
    assert data.train.labels.tolist() == [0] * 7 + [1] * 7
    times = (own / "train/cat/002.jpg").stat()
    (own / "train/cat/002.jpg").write_bytes(good)
    os.utime(own / "train/cat/002.jpg", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert prepare(own, tmp_path / "out", **SMALL, max_bad=0.2)["images"]["train"] == 15


# ---- Refusals: one line, exit code 2 -------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_what_is_whole_is_kept(source: Path, tmp_path: Path):
    def limit() -> None:  # files of two pictures at most: the kernel refuses the third as it would on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 32 * 32 * 3 + 100, resource.RLIM_INFINITY))

    process = start(source, tmp_path / "out", "--workers", 2, preexec_fn=limit)
    error = process.communicate()[1]
    assert process.returncode == 2
    assert error.count("\n") == 1
    assert "cannot write" in error
    assert "File too large; whole shards are kept" in error
    assert not (tmp_path / "out/index.json").exists()
    prepare(source, tmp_path / "out", **SMALL)
    assert problems(tmp_path / "out", 1)[1] == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_decoded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(making.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 9, 9))
    monkeypatch.setattr(making, "_make", None)
    with pytest.raises(InputError, match=r"the pictures take 0.00 GB, and the disk has 0.00 GB free"):
        prepare(source, tmp_path / "out", **SMALL)


def test_a_read_only_folder_is_one_line(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root, as which tests may run, writes where modes forbid it
    with pytest.raises(InputError, match=r"^cannot write \S*out: Read-only file system; whole shards are kept$"):
        prepare(source, tmp_path / "out", **SMALL)


def test_a_folder_of_someone_elses_is_refused(source: Path, tmp_path: Path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/notes.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected an empty folder or one that prepare wrote, found .*notes.json"):
        prepare(source, tmp_path, **SMALL)
    assert (tmp_path / "train/notes.json").exists()


def test_two_at_once_are_refused(source: Path, tmp_path: Path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another process is preparing it"):
        prepare(source, tmp_path, **SMALL)
    os.close(handle)


@pytest.mark.parametrize("option", ["size", "shard_size", "workers"])
def test_numbers_are_checked(source: Path, tmp_path: Path, option: str):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: expected from 1 to"):
        prepare(source, tmp_path / "out", **{**SMALL, option: 0})


# ---- Verification --------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped byte": (lambda t: flip(t / "train/00001.u8"), "train/00001.u8: sha256 differs"),
    "truncated": (lambda t: os.truncate(t / "train/00002.u8", 9), "train/00002.u8: sha256 differs"),
    "missing": (lambda t: (t / "val/00001.u8").unlink(), "val/00001.u8: No such file"),
    "list": (lambda t: flip(t / "val/00000.json"), "val/00000.json: sha256 differs"),
    "sum": (lambda t: flip(t / "train/00000.sum"), "train/00000.sum: sha256 differs"),
    "mean": (lambda t: flip(t / "mean.npy"), "mean.npy: sha256 differs"),
    "foreign": (lambda t: (t / "train/00009.u8").touch(), "train/00009.u8: not in index.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_names_what_is_wrong_and_only_that(source: Path, tmp_path: Path, fault: str):
    prepare(source, tmp_path / "out", **SMALL)
    spoil, said = FAULTS[fault]
    spoil(tmp_path / "out")
    (line,) = problems(tmp_path / "out", 2)[1]
    assert said in line


@pytest.mark.parametrize("fault", ["flipped byte", "missing"])
def test_a_damaged_index_is_named(source: Path, tmp_path: Path, fault: str):
    prepare(source, tmp_path / "out", **SMALL)
    index = tmp_path / "out/index.json"
    flip(index) if fault == "flipped byte" else index.unlink()
    with pytest.raises(InputError, match=r"index.json: (damaged|missing)"):
        problems(tmp_path / "out", 1)


@pytest.mark.parametrize("fault", ["truncated", "missing"])
def test_training_refuses_a_shard_of_the_wrong_length(source: Path, tmp_path: Path, fault: str):
    prepare(source, tmp_path / "out", **SMALL)
    FAULTS[fault][0](tmp_path / "out")
    with pytest.raises(InputError, match=r"0000\d.u8: damaged shard"):
        open_data(str(tmp_path / "out"))


def test_the_command_says_what_it_made_and_what_is_wrong(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["alexnet-fast", "prepare", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capfd.readouterr()

    target = tmp_path / "out"
    code, out, _ = command(source, target, "--size", 32, "--shard-size", 5, "-j", 1)
    assert code == 0
    assert "train 16 images of 2 classes in 4 shards" in out
    code, out, _ = command("--check", target)
    assert (code, out) == (0, f"{target}: 16 train images and 6 val images, all whole\n")
    flip(target / "train/00001.u8")
    code, out, err = command("--check", target)
    assert code == 2
    assert "train/00001.u8: sha256 differs" in out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert command(source)[::2] == (2, "error: prepare: expected SRC and DST, or --check DST\n")


@pytest.mark.parametrize("inside", [".", "train/x"])
def test_shards_are_not_written_into_their_source(source: Path, inside: str):
    with pytest.raises(InputError, match="neither inside the other"):
        prepare(source, source / inside)
    assert not (source / "train" / "x").exists()
