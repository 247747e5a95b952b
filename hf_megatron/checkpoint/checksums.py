"""File checksums of a directory, stored in ``checksums.json``, to detect damage.

``checksums.json`` maps the relative path of every other file to its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint.directory import read_json
from hf_megatron.errors import CheckpointFormatError, shown

CHECKSUMS = "checksums.json"
Checksums = Mapping[str, Mapping[str, Any]]


def compute_checksums(directory: Path, part: int = 0, num_parts: int = 1) -> dict[str, dict[str, Any]]:
    """Sizes and checksums of every ``num_parts``-th file, starting at ``part``, so that ranks can share the work."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {path.relative_to(directory).as_posix(): _of(path) for path in files[part::num_parts]}


def _of(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_checksums(directory: Path, checksums: Checksums) -> None:
    """Write ``checksums.json`` into the directory."""
    (directory / CHECKSUMS).write_text(json.dumps(checksums, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_checksums(directory: Path) -> Checksums | None:
    """Those of a directory, or None if it has none; CheckpointFormatError if the file is damaged."""
    path = directory / CHECKSUMS
    if not path.is_file():
        return None
    try:
        checksums = read_json(path)
        if all(isinstance(c["size"], int) and isinstance(c["sha256"], str) for c in checksums.values()):
            return checksums
    except (CheckpointFormatError, TypeError, KeyError):
        pass
    raise CheckpointFormatError(f"{path} is damaged. If the other files are known to be right, delete it.")


def damages(
    directory: Path, checksums: Checksums, part: int = 0, num_parts: int = 1, *, sizes_only: bool = False
) -> list[str]:
    """List missing or modified files among every ``num_parts``-th file, starting at ``part``."""
    found = []
    for name in sorted(checksums)[part::num_parts]:
        path, expected = directory / name, checksums[name]
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:  # as of a name that is too long
            found.append(f"{shown(name)} cannot be read: {error.strerror}")
            continue
        if size is None:
            found.append(f"{name} is missing")
        elif size != expected["size"]:
            found.append(f"{name} has {size} bytes, not the {expected['size']} that were written")
        elif not sizes_only and _of(path)["sha256"] != expected["sha256"]:
            found.append(f"{name} has other bytes than were written")
    return found
