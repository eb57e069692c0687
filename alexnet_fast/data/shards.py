"""What the command prepare writes, its reading, and its verification.

    DST/
        index.json        classes, numbers of images, shards with the sha256 of their files, mean and principal
                          components of the training set's RGB in 0..1, sha256 of itself
        mean.npy          float32 (size, size, 3), the mean training picture in 0..255
        train/00000.u8    pictures one after the other, uint8 (images, size, size, 3)
        train/00000.json  for each picture its source below train/, its class, when the source was last changed in ns,
                          and its length in bytes; for sources that are no pictures the same with the reason; sums of
                          products of RGB; the pictures' side, and whether they were turned upright
        train/00000.sum   uint32 (size, size, 3), the sum of its pictures
        val/...

A shard belongs to a fixed stretch of the sources, in order of class and name, so each can be made and checked alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np

from alexnet_fast.data.hashes import file_sha256, record_sha256
from alexnet_fast.data.records import Count, Range, conform, read_json
from alexnet_fast.data.stored import StoredImages
from alexnet_fast.errors import InputError

FORMAT = 1
INDEX, MEAN = "index.json", "mean.npy"
PARTS = ("train", "val")
PICTURES, LIST, SUM = SUFFIXES = (".u8", ".json", ".sum")
UNFINISHED = ".unfinished-"
UNREADABLE = (OSError, ValueError)  # what reading damaged JSON raises
EARLIER = {"exif": True}  # files that do not say whether pictures were turned upright are of a version that always did
MAX_SIZE = 4096  # side of a picture, in pixels

Share = Annotated[float, Range(-1, 1)]
Size = Annotated[int, Range(1, MAX_SIZE)]


class Hashes(TypedDict):
    u8: str
    sum: str
    json: str


class Shard(TypedDict):
    name: str
    images: Count
    sha256: Hashes


class Parts(TypedDict):
    train: Count
    val: Count


class Shards(TypedDict):
    train: list[Shard]
    val: list[Shard]


class Index(TypedDict):
    format: Literal[1]
    size: Size
    exif: bool
    classes: Annotated[list[str], Range(1)]
    images: Parts
    bad: Parts
    shards: Shards
    mean_image: str
    mean: tuple[Share, Share, Share]
    components: Annotated[list[tuple[Share, Share, Share]], Range(3, 3)]
    deviations: tuple[Share, Share, Share]


Row = tuple[Annotated[str, Range(1)], Count, int, int]


class ListHashes(TypedDict):
    u8: str
    sum: str


class List(TypedDict):
    size: Size
    exif: bool
    rows: list[Row]
    bad: list[tuple[str, Count, int, int, str]]
    products: Annotated[list[tuple[int, int, int]], Range(3, 3)]
    sha256: ListHashes


def is_prepared(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> dict[str, Any]:
    """index.json's record; raises :class:`InputError` where it is missing, damaged or of another format."""
    path = folder / INDEX
    try:
        record = read_json(path)
        if not isinstance(record, dict) or record.pop("sha256", None) != record_sha256(record):
            raise ValueError("sha256 differs from the one recorded")
        if record.get("format") != FORMAT:
            raise ValueError(f"format {record.get('format')!r}; this version reads {FORMAT}")
        record = conform({**EARLIER, **record}, Index, INDEX)
        if len(set(record["classes"])) < len(record["classes"]):
            raise ValueError("two classes of one name")
        for shard in record["shards"]["train"] + record["shards"]["val"]:
            if not (shard["name"].isascii() and shard["name"].isdigit()):
                raise ValueError(f"{shard['name']!r} is no shard's name")
    except FileNotFoundError:
        raise InputError(f"{path}: missing: the command prepare did not write {folder}, or has not ended") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: damaged: {_reason(error)}") from None
    return record


class ShardImages(StoredImages):
    """The pictures of one part of a prepared folder, by memory map.

    Raises :class:`InputError` for a shard that is missing or of the wrong length. Hashes of pictures are compared by
    :func:`problems` alone.
    """

    def __init__(self, folder: Path, index: dict[str, Any], part: str):
        self.size, self.exif = index["size"], index["exif"]
        self.bytes = self.size * self.size * 3
        self.maps: list[mmap.mmap] = []
        labels, firsts = [], [0]
        for shard in index["shards"][part]:
            path = folder / part / (shard["name"] + PICTURES)
            try:
                listed, length = path.with_suffix(LIST), path.stat().st_size
                rows = rows_of(listed, index["classes"], shard["sha256"]["json"])
                if len(rows) != shard["images"] or length != len(rows) * self.bytes:
                    raise ValueError(f"{length} bytes and {len(rows)} names for {shard['images']} pictures")
                if rows:
                    with open(path, "rb") as file:
                        self.maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                    labels += [row[1] for row in rows]
                    firsts.append(len(labels))
            except UNREADABLE as error:
                raise InputError(f"{path}: damaged shard: {_reason(error)} (prepare it again)") from None
        if not labels:
            raise InputError(f"{folder / part}: holds no pictures (prepare it again)")
        self.labels, self.firsts = np.array(labels), np.array(firsts)
        self.arrays = [np.frombuffer(held, np.uint8).reshape(-1, self.size, self.size, 3) for held in self.maps]

    def _place(self, index: int) -> tuple[int, int]:
        """A picture's shard, and its number there."""
        shard = int(np.searchsorted(self.firsts, index, "right")) - 1
        return shard, int(index - self.firsts[shard])

    def pixels(self, index: int) -> np.ndarray:
        shard, number = self._place(index)
        return self.arrays[shard][number]

    def prefetch(self, indices: Sequence[int]) -> None:
        # A page fault reads only a little ahead; this asks the disk for the whole batch at once.
        for shard, number in map(self._place, indices):
            first = number * self.bytes // mmap.PAGESIZE * mmap.PAGESIZE
            self.maps[shard].madvise(mmap.MADV_WILLNEED, first, (number + 1) * self.bytes - first)


def names(folder: Path, index: dict[str, Any], part: str) -> list[str]:
    """Where the pictures of one part were, below the folder of that part; raises :class:`InputError`."""
    found = []
    for shard in index["shards"][part]:
        path = folder / part / (shard["name"] + LIST)
        try:
            found += [row[0] for row in rows_of(path, index["classes"], shard["sha256"]["json"])]
        except UNREADABLE as error:
            raise InputError(f"{path}: damaged shard: {_reason(error)} (prepare it again)") from None
    return found


def read_list(path: Path) -> dict[str, Any]:
    """A shard's list; raises OSError and ValueError."""
    record = read_json(path)
    if isinstance(record, dict):
        record = {**EARLIER, **record}
    return conform(record, List, path.name)


def rows_of(path: Path, classes: list[str], digest: str) -> list[Row]:
    """The rows of a shard's list, whose classes are those of their names; raises OSError and ValueError."""
    if file_sha256(path) != digest:
        raise ValueError(f"{path.name}: sha256 differs from index.json's")
    rows = read_list(path)["rows"]
    for name, label, *_ in rows:
        if label >= len(classes) or classes[label] != name.partition("/")[0]:
            raise ValueError(f"{path.name}: {name} is not of class {label}")
    return rows


def problems(
    folder: Path, workers: int, tell: Callable[[int, int], None] = lambda done, total: None
) -> tuple[dict[str, Any], list[str]]:
    """What is wrong with a prepared folder, a line for each file: damaged, missing, not in index.json; and the record
    of index.json, which names the rest. Raises :class:`InputError` where that is missing or damaged itself.
    """
    index = read_index(folder)
    shards = [(part, shard) for part in PARTS for shard in index["shards"][part]]
    wrong = []
    with ThreadPoolExecutor(workers) as pool:  # hashing and reading leave Python's lock free
        for done, found in enumerate(pool.map(lambda job: list(_shard_problems(folder, index, *job)), shards), 1):
            wrong += found
            tell(done, len(shards))
    for part in PARTS:
        if (count := sum(shard["images"] for shard in index["shards"][part])) != index["images"][part]:
            wrong.append(f"{folder / INDEX}: {index['images'][part]} {part} images, its shards hold {count}")
    try:
        if file_sha256(folder / MEAN) != index["mean_image"]:
            wrong.append(f"{folder / MEAN}: sha256 differs from index.json's")
    except OSError as error:
        wrong.append(f"{folder / MEAN}: {_reason(error)}")
    known = {folder / part / (shard["name"] + suffix) for part, shard in shards for suffix in SUFFIXES}
    known |= {folder / INDEX, folder / MEAN, *(folder / part for part in PARTS)}
    wrong += [f"{path}: not in index.json" for path in sorted(folder.rglob("*")) if path not in known]
    return index, wrong


def _shard_problems(folder: Path, index: dict[str, Any], part: str, shard: dict[str, Any]) -> Iterator[str]:
    for suffix in SUFFIXES:
        path = folder / part / (shard["name"] + suffix)
        try:
            if file_sha256(path) != shard["sha256"][suffix[1:]]:
                raise ValueError("sha256 differs from index.json's")
            if suffix == PICTURES:
                wanted = shard["images"] * index["size"] ** 2 * 3
                if path.stat().st_size != wanted:
                    raise ValueError(f"{path.stat().st_size} bytes, {shard['images']} pictures take {wanted}")
            if suffix == LIST:
                rows = rows_of(path, index["classes"], shard["sha256"]["json"])
                if len(rows) != shard["images"]:
                    raise ValueError(f"{len(rows)} names, index.json has {shard['images']} pictures")
        except UNREADABLE as error:
            yield f"{path}: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
