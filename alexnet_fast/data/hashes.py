"""Hashes by which prepared data and checkpoints tell that a file, or a record, is still what was written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def record_sha256(record: dict[str, Any]) -> str:
    """SHA-256 of ``record`` as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()
