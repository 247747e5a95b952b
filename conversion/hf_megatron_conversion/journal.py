"""Which files of an unfinished conversion are complete, so that ``--resume`` need not write them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_megatron_conversion.files import OutputFile, TextFile
from hf_megatron_conversion.sha256sums import sha256_of


class Journal:
    """A file next to those of the conversion: a line for what is converted, and one for each complete file.

    Args:
        path: The file.
        conversion: What is converted from what; the lines of another conversion do not count.
    """

    def __init__(self, path: Path, conversion: str) -> None:
        self._path, self._conversion = path, conversion
        self._is_resumed = path.is_file() and path.read_text(encoding="utf-8").split("\n", 1)[0] == conversion
        if not self._is_resumed:
            path.write_text(conversion + "\n", encoding="utf-8")

    def kept(self, directory: Path) -> dict[str, str]:
        """SHA-256 of the complete files that have it still; everything else in the directory is deleted."""
        digests: dict[str, str] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines()[1:]:
            digest, _, name = line.partition("  ")
            if (directory / name).is_file() and sha256_of(directory / name) == digest:
                digests[name] = digest
        for path in directory.rglob("*"):
            if not path.is_dir() and path.relative_to(directory).as_posix() not in digests:
                path.unlink()
        return digests

    def add(self, name: str, digest: str) -> None:
        """A file is complete; several threads may say so."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{digest}  {name}\n")

    def has_files(self) -> bool:
        """Whether anything is complete."""
        return self._path.is_file() and self._path.read_text(encoding="utf-8").count("\n") > 1


def fingerprint(options: object, files: Sequence[OutputFile], source: Mapping[Path, tuple[int, ...]]) -> str:
    """One line that two conversions share if they write the same bytes."""
    outputs = [(file.path, file.nbytes, file.data.hex() if isinstance(file, TextFile) else "") for file in files]
    content = [repr(options), outputs, sorted((str(path), *identity) for path, identity in source.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
