"""A fingerprint of the sources that ``_C`` is made of: setup.py compiles it in, and the package compares it."""

from __future__ import annotations

import hashlib
from pathlib import Path

KINDS = (".cpp", ".h", ".cu", ".cuh")


def fingerprint(root: Path) -> str:
    """The fingerprint of ``root``/setup.py and the native sources below ``root``/csrc; '' where there are none.

    csrc/host_simt is left out: the module that is installed holds nothing of it.
    """
    csrc = root / "csrc"
    files = [path for path in csrc.rglob("*") if path.suffix in KINDS and csrc / "host_simt" not in path.parents]
    setup = root / "setup.py"
    if not files or not setup.is_file():
        return ""
    digest = hashlib.sha256()
    for path in (setup, *sorted(files)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
