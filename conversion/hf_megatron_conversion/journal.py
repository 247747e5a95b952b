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
        self._path = path
        if self._lines()[:1] != [conversion]:
            path.unlink(missing_ok=True)  # it may be a link, or a pipe
            path.write_text(conversion + "\n", encoding="utf-8")

    def kept(self, directory: Path) -> dict[str, str]:
        """SHA-256 of the complete files that have it still; everything else in the directory is deleted."""
        complete = {name: digest for digest, _, name in (line.partition("  ") for line in self._lines()[1:])}
        digests: dict[str, str] = {}
        for path in sorted(directory.rglob("*"), reverse=True):  # a directory comes after what is in it
            name = path.relative_to(directory).as_posix()
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif _is_file(path) and complete.get(name) == sha256_of(path):
                digests[name] = complete[name]
            else:
                path.unlink()
        return digests

    def add(self, name: str, digest: str) -> None:
        """A file is complete; several threads may say so."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{digest}  {name}\n")

    def has_files(self) -> bool:
        """Whether anything is complete."""
        return len(self._lines()) > 1

    def _lines(self) -> list[str]:
        """Its lines; damaged ones are those of no conversion and of no file."""
        return self._path.read_text(encoding="utf-8", errors="replace").splitlines() if _is_file(self._path) else []


def _is_file(path: Path) -> bool:
    """Whether it is a file itself, and no link to one."""
    return path.is_file() and not path.is_symlink()


def fingerprint(options: object, files: Sequence[OutputFile], source: Mapping[Path, tuple[int, ...]]) -> str:
    """One line that two conversions share if they write the same bytes."""
    outputs = [(file.path, file.nbytes, file.data.hex() if isinstance(file, TextFile) else "") for file in files]
    content = [repr(options), outputs, sorted((str(path), *identity) for path, identity in source.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
