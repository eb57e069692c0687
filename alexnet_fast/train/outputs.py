"""Files that commands write: refused before any work is done, then written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from alexnet_fast.errors import InputError
from alexnet_fast.train.checkpoint import check_writable


def check_kind(out: Path) -> None:
    """Raises :class:`InputError` where ``out`` is there and no file: :func:`written` would put a file in the place of a
    device, such as /dev/null, or of a pipe."""
    if out.is_dir():
        raise InputError(f"--out: expected a file, got the folder {out}")
    if out.exists() and not out.is_file():
        raise InputError(f"--out: expected a file, got the device or pipe {out}")


def check_out(out: Path, suffix: str, overwrite: bool) -> None:
    """Raises :class:`InputError` where ``out`` cannot be the file that a command writes."""
    if out.suffix != suffix:
        raise InputError(f"--out: expected a file that ends in {suffix}, got {out}")
    check_kind(out)
    if out.exists() and not overwrite:
        raise InputError(f"--out: {out} is there already (--overwrite replaces it)")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out: there is no folder {out.absolute().parent}")
    check_writable(out.absolute().parent, "--out")


@contextlib.contextmanager
def written(out: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to ``out`` when the block ends well, and removed when it does not."""
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".unfinished-") as folder:
        file = Path(folder, out.name)
        yield file
        os.replace(file, out)
