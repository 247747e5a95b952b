"""``SHA256SUMS``, which a converted directory has for all its files, in the format of ``sha256sum``.

``sha256sum -c SHA256SUMS`` checks it without this package.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_megatron.errors import CheckpointFormatError, UnsupportedError

SHA256SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MAX_BYTES = 16 * 2**20


def sums_size(names: Iterable[str]) -> int:
    """Bytes of the file for these names; UnsupportedError for one that its format has to quote."""
    size = 0
    for name in names:
        if not name.isprintable() or "\\" in name:
            raise UnsupportedError(f"The file name {name!r} has a control character or a backslash in it; rename it.")
        size += 64 + 2 + len(name.encode()) + 1
    return size


def write_sums(directory: Path, digests: Mapping[str, str]) -> None:
    """Write the file, which must not exist."""
    with (directory / SHA256SUMS).open("x", encoding="utf-8") as file:
        file.writelines(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))


def read_sums(directory: Path) -> dict[str, str]:
    """SHA-256 by file name; empty if there is no such file, CheckpointFormatError if it is not of this format."""
    path = directory / SHA256SUMS
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointFormatError(f"{path} has more than {_MAX_BYTES:,} bytes; it is no list of checksums.")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not all(found):
        raise CheckpointFormatError(f"{path} is damaged. If the other files are known to be right, delete it.")
    return {line[2]: line[1] for line in found if line is not None}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
