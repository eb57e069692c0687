"""Files that could not be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from alexnet_fast.data import BadImage, read_image
from alexnet_fast.errors import InputError
from alexnet_fast.parallel import Ranks
from alexnet_fast.train.report import Report

SETS = "training", "held-out"


class BadFiles:
    """``known`` holds the bad files of each set, as path: reason, and is the same on all ranks. ``new`` holds those
    that this rank has met in training and the others have not been told of.

    ``sizes`` counts the files of each set; a share of ``most`` of them may be bad.
    """

    def __init__(self, ranks: Ranks, sizes: dict[str, int], most: float) -> None:
        self.ranks, self.sizes, self.most = ranks, sizes, most
        self.known: dict[str, dict[str, str]] = {kind: {} for kind in SETS}
        self.new: dict[str, str] = {}

    def restore(self, rows: Iterable[dict[str, Any]]) -> None:
        """Knows again what the main rank finds in its ``rows`` of metrics.jsonl, except files that can be read by
        now."""
        for row in rows:
            if row["kind"] == "bad file" and not _readable(row["path"]):
                self.known[row["set"]][row["path"]] = row["reason"]
        self.known = self.ranks.gather(self.known)[0]
        for kind in SETS:
            self._check(kind)

    def meet(self, files: Iterable[tuple[str, str]]) -> None:
        self.new.update({path: reason for path, reason in files if path not in self.known["training"]})

    def share_new(self, report: Report | None, step: int) -> None:
        found, self.new = self.new, {}
        self.share(found, "training", report, step)

    def share(self, found: dict[str, str], kind: str, report: Report | None, step: int) -> None:
        """All ranks learn what each found; raises :class:`InputError` where that is more than --max-bad allows."""
        known = self.known[kind]
        shared = {
            path: reason for part in self.ranks.gather(found) for path, reason in part.items() if path not in known
        }
        known |= shared
        if report:
            report.bad_files(shared, kind, step)
        self._check(kind)

    def _check(self, kind: str) -> None:
        bad, files = self.known[kind], self.sizes[kind]
        if len(bad) > self.most * files:
            path, reason = next(iter(bad.items()))
            share = f"more than the share --max-bad {self.most:g}"
            raise InputError(f"{len(bad)} of {files} {kind} files are unusable, {share}; the first: {path}: {reason}")


def _readable(path: str) -> bool:
    try:
        read_image(path)
    except BadImage:
        return False
    return True
