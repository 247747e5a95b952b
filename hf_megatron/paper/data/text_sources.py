"""Where texts come from: files, lines of JSON, and data sets of ``datasets``; each can be read from any text on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from hf_megatron.checkpoint import budgets
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import DataError, shown

_ROWS = 1000  # of a data set that are read at a time
# Never goes back to where it was, so that it takes the same time whatever the line.
_JSON_VALUES = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{,]', re.DOTALL)


class Source(Protocol):
    """Texts in a fixed order."""

    name: str
    size: int  # the last position
    num_bytes: int  # of all texts, about
    identity: list[Any]  # what changes when the texts do

    def texts(self, start: int) -> Iterator[tuple[str, int]]:
        """Texts from a position on, 0 or one that was given before, each with the position behind it."""


class _File:
    """A file of texts; what it says of itself."""

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, str(path)
        status = path.stat()
        self.size = self.num_bytes = status.st_size
        self.identity = [str(path.resolve()), status.st_size, status.st_mtime_ns]


class TextFile(_File):
    """A file of UTF-8 that is one text."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        _require_small(self.size, self.name, "files")

    def texts(self, start: int) -> Iterator[tuple[str, int]]:
        if start < self.size:
            with open_regular(self._path) as file:
                yield _decoded(file.read(self.size), self.name), self.size


class JsonLines(_File):
    """A file that has an object with a text in each line; empty lines are skipped."""

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path)
        self._column = column
        self.identity.append(column)

    def texts(self, start: int) -> Iterator[tuple[str, int]]:
        with open_regular(self._path) as file:
            file.seek(start)
            while line := file.readline(budgets.MAX_DOCUMENT_BYTES + 1):
                place, start = f"{self.name}, in the line at byte {start:,}", start + len(line)
                _require_small(len(line), place, "lines")
                if line.strip():
                    yield self._text_of(line, place), start

    def _text_of(self, line: bytes, place: str) -> str:
        _require_few_values(line, place)
        try:
            record = json.loads(_decoded(line, place))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}, has no JSON: {error}") from error
        if not isinstance(record, dict) or self._column not in record:
            raise DataError(f"{place}, has no object with {self._column!r}; name the text's column with --column.")
        return _text(record[self._column], place)


class Rows:
    """A column of a data set, from the Hub, from a directory of its files, or saved with ``save_to_disk``."""

    def __init__(self, name: str, column: str, split: str, configuration: str | None) -> None:
        import datasets

        try:
            _require_files(Path(name))
            if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
                budgets.require_files_within(budgets.MAX_JSON_BYTES, Path(name).rglob("*.json"))
                data = datasets.load_from_disk(name)
                data = data[split] if isinstance(data, datasets.DatasetDict) else data
            else:
                data = datasets.load_dataset(name, configuration, split=split)
        except Exception as error:  # of many kinds, some from other libraries
            raise DataError(f"{name} is no file, and no data set that can be read: {error}") from error
        if column not in data.column_names:
            raise DataError(
                f"{name} has no column {column!r}; name the text's with --column: {', '.join(data.column_names)}."
            )
        self.name, self.size, self.num_bytes = name, len(data), int(data.data.nbytes)
        self._column, self._data = column, data.select_columns([column]).with_format("arrow")
        self.identity = [data._fingerprint, column]

    def texts(self, start: int) -> Iterator[tuple[str, int]]:
        for begin in range(start, self.size, _ROWS):
            for i, value in enumerate(self._read(begin), start=begin):
                yield self._text_of(value, f"{self.name}, in row {i:,}"), i + 1

    def _read(self, begin: int) -> Any:
        """Rows that stay where they are, in Arrow's memory, and are sound."""
        try:
            rows = self._data[begin : begin + _ROWS]
            rows.validate(full=True)
        except Exception as error:  # of many kinds, as above
            raise DataError(f"{self.name}, from row {begin:,} on, cannot be read: {error}") from error
        return rows.column(self._column)

    def _text_of(self, value: Any, place: str) -> str:
        if value.is_valid and hasattr(value, "as_buffer"):
            _require_small(value.as_buffer().size, place, "rows")
        return _text(value.as_py(), place)


def open_sources(
    names: Sequence[str], *, column: str = "text", split: str = "train", configuration: str | None = None
) -> list[Source]:
    """Text files (.txt), files of JSON lines (.json, .jsonl), or one data set; DataError for anything else."""
    paths = [Path(name) for name in names]
    sources: list[Source] = []
    if len(names) == 1 and not paths[0].is_file() and paths[0].suffix != ".txt":
        return [Rows(names[0], column, split, configuration)]
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is no file; several sources have to be files, and a data set comes alone.")
        if path.suffix not in (".txt", ".json", ".jsonl"):
            raise DataError(f"{path} ends with none of .txt, .json and .jsonl, so that nobody can say what it holds.")
        sources.append(TextFile(path) if path.suffix == ".txt" else JsonLines(path, column))
    return sources


def _require_files(directory: Path) -> None:
    """CheckpointFormatError for a pipe or a device in it, which would be waited for."""
    for path in directory.rglob("*"):
        if path.exists() and not path.is_dir():
            open_regular(path).close()


def _require_small(num_bytes: int, place: str, parts: str) -> None:
    """DataError for a text of more bytes than the limit; of a line, no more than that have been read."""
    if num_bytes > (limit := budgets.MAX_DOCUMENT_BYTES):
        raise DataError(
            f"{place}, has at least {num_bytes:,} bytes, and the limit for a text is {limit:,}. Cut it into several "
            f"{parts}."
        )


def _require_few_values(line: bytes, place: str) -> None:
    """DataError if a line would become more objects than its bytes let expect."""
    limit = budgets.MAX_DOCUMENT_VALUES
    if len(line) > limit and sum(1 for _ in islice(_JSON_VALUES.finditer(line), limit + 1)) > limit:
        raise DataError(f"{place}, has more than {limit:,} values beside its text, which is the limit. Leave them out.")


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}, is no UTF-8 text: {error}.") from error


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}, has {shown(value)} in the place of a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place}, has half a character, which is no text: {error}.") from error
    return value
