r"""Token files of Megatron-LM: ``NAME.bin`` has the token ids of all documents in a row, ``NAME.idx`` where each is.

An index is one of these, little-endian; n sequences, d entries that say where documents begin:

    MMIDIDX, from --dataset-impl mmap          TNTIDX, from --dataset-impl lazy and cached, until 2023
    "MMIDIDX\0\0"                                "TNTIDX\0\0"
    version 1           uint64                 version 1           uint64
    dtype code          uint8                  dtype code, bytes   2 x uint64
    n, d                2 x uint64             n, dimensions, d    3 x uint64
    lengths             n x int32              first dimensions    (n + 1) x int64
    starts, in bytes    n x int64              starts, in tokens   (n + 1) x int64
    first sequences     d x int64              lengths             n x int64
    modes, if any       n x int8               first sequences     d x int64

fairseq's have neither d nor first sequences. Files are read with ``pread`` instead of mapped: the pages in memory are
the same, shared by all processes of a node, but a process does not grow by what it has read, and a file that was cut is
an error and not the end of the process.

Source: ``megatron/core/datasets/indexed_dataset.py`` and the older ``megatron/data/indexed_dataset.py`` of Megatron-LM.
"""

from __future__ import annotations

import io
import os
import struct
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_megatron.checkpoint.file_identity import FileIdentity, open_unchanged
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.errors import CheckpointError, DataError

Array = np.ndarray[Any, np.dtype[Any]]

# 7 is float32 today and was float64; the length of NAME.bin tells which.
_DTYPES = {1: ("<u1",), 2: ("<i1",), 3: ("<i2",), 4: ("<i4",), 5: ("<i8",), 6: ("<f8",), 7: ("<f4", "<f8"), 8: ("<u2",)}
_CODES = {np.dtype("<u2"): 8, np.dtype("<i4"): 4}
_MAPPED, _LEGACY = b"MMIDIDX\0\0", b"TNTIDX\0\0"
_LARGEST_UINT16 = 65500  # vocabulary, by Megatron-LM
# At most so many blocks of an index are checked, spread over it: all of one up to a million sequences.
_BLOCKS, _BLOCK = 64, 16384
_SAMPLED_ENDS = 64
_COPIED = 1 << 20  # numbers of an index that are written at a time


@dataclass(frozen=True)
class _Column:
    """Numbers that lie one after the other in an index."""

    file: io.FileIO
    offset: int
    dtype: str
    count: int

    @property
    def end(self) -> int:
        return self.offset + self.count * np.dtype(self.dtype).itemsize

    def read(self, start: int, stop: int) -> Array:
        size = np.dtype(self.dtype).itemsize
        raw = os.pread(self.file.fileno(), (stop - start) * size, self.offset + start * size)
        if len(raw) != (stop - start) * size:
            raise ValueError("it became shorter while it was read")
        return np.frombuffer(raw, self.dtype).astype(np.int64)


@dataclass(frozen=True)
class _Index:
    dtype_code: int
    lengths: _Column
    starts: _Column
    documents: _Column  # the first sequence of each, and the number of sequences; empty in fairseq's files
    token_bytes: int | None  # that a start counts as one; None where starts are in bytes
    dimensions: _Column | None = None


class TokenFile:
    """The tokens of ``NAME.bin``, opened in the same time whatever their number. It can be pickled.

    Args:
        prefix: ``NAME``, ``NAME.bin``, ``NAME.idx``, or a directory that ``hf-megatron tokenize`` has written.

    Raises:
        DataError: The files are missing, damaged, or no token files. Of an index of more than a million sequences,
            parts spread over it are looked at.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        path = Path(prefix)
        if path.is_dir():
            path = path / "tokens"
        elif path.suffix in (".bin", ".idx"):
            path = path.with_suffix("")
        self.path = path.with_name(path.name + ".bin")
        index_path = path.with_name(path.name + ".idx")
        try:
            with open_regular(self.path):
                self._identity = FileIdentity.of(self.path)
            with open_regular(index_path):
                pass
            self._descriptor: int | None = None
            with io.FileIO(index_path) as file:
                self._open_index(index_path, file)
        except FileNotFoundError as error:
            raise DataError(
                f"{error.filename} is missing; token files are two, {self.path.name} and {index_path.name}."
            ) from error
        except (OSError, CheckpointError) as error:
            raise DataError(f"{prefix} cannot be read: {error}") from error

    def __len__(self) -> int:
        """Tokens."""
        return self._identity.size // self.dtype.itemsize

    def read(self, start: int, stop: int) -> Array:
        """Tokens ``start`` to ``stop`` as int64; DataError if the file is not what it was when it was opened."""
        try:
            if self._descriptor is None:
                with open_unchanged(self.path, self._identity) as file:
                    self._descriptor = os.dup(file.fileno())
                weakref.finalize(self, os.close, self._descriptor)
            size = self.dtype.itemsize
            raw = os.pread(self._descriptor, (stop - start) * size, start * size)
        except (OSError, CheckpointError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        if len(raw) != (stop - start) * size:
            raise DataError(f"{self.path} became shorter while it was read: it ends before token {stop:,}.")
        tokens = np.frombuffer(raw, self.dtype)
        with np.errstate(invalid="ignore"):
            ids = tokens.astype(np.int64)
        if self.dtype.kind == "f" and not np.array_equal(ids, tokens):
            raise DataError(f"{self.path} has numbers in {self.dtype} that are no token ids, from token {start:,} on.")
        return ids

    def require_ends(self, end_of_document: int) -> None:
        """Raise DataError unless the documents looked at end with this token."""
        without = [place for place in self._ends if self.read(place, place + 1)[0] != end_of_document]
        if without:
            raise DataError(
                f"{len(without)} of {len(self._ends)} documents of {self.path} that were looked at do not end with "
                f"token {end_of_document}, so that they cannot be kept apart: the first at token {without[0]:,}. Make "
                "the files with the same tokenizer and hf-megatron tokenize, or preprocess_data.py --append-eod."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": None}

    def _open_index(self, path: Path, file: io.FileIO) -> None:
        try:
            index = _read_header(file)
            self.dtype = _dtype_of(index, self._identity.size)
            self.num_sequences, self.num_documents = index.lengths.count, index.documents.count - 1
            if self.num_documents < 0:
                self.num_documents = self.num_sequences
            _check_sequences(index, self._identity.size, self.dtype.itemsize)
            _check_documents(index)
            self._ends = _sampled_ends(index, len(self), self.dtype.itemsize)
        except ValueError as error:
            raise DataError(f"{path} is refused: {error}.") from error


def _read_header(file: io.FileIO) -> _Index:
    """Find the columns, whose sizes have to add up to the file's; ValueError if they do not."""
    size = os.fstat(file.fileno()).st_size
    header = os.pread(file.fileno(), 64, 0)
    if header.startswith(_MAPPED) and len(header) >= 26:
        version, code, count = struct.unpack_from("<QBQ", header, 9)
        # Megatron-LM's with and without modes, and fairseq's: no size is that of two of them.
        documents = struct.unpack_from("<Q", header, 26)[0] if len(header) >= 34 else 0
        with_documents = size in (34 + 12 * count + 8 * documents, 34 + 13 * count + 8 * documents)
        lengths = _Column(file, 34 if with_documents else 26, "<i4", count)
        starts = _Column(file, lengths.end, "<i8", count)
        firsts = _Column(file, starts.end, "<i8", documents if with_documents else 0)
        index = _Index(code, lengths, starts, firsts, token_bytes=None)
        is_whole = with_documents or size == firsts.end
    elif header.startswith(_LEGACY) and len(header) >= 48:
        version, code, token_bytes, count, dimensions = struct.unpack_from("<5Q", header, 8)
        documents = struct.unpack_from("<Q", header, 48)[0] if len(header) >= 56 else 0
        with_documents = size == 56 + 8 * (2 * (count + 1) + dimensions + documents)
        dims = _Column(file, 56 if with_documents else 48, "<i8", count + 1)
        starts = _Column(file, dims.end, "<i8", count + 1)
        lengths = _Column(file, starts.end, "<i8", dimensions)
        firsts = _Column(file, lengths.end, "<i8", documents if with_documents else 0)
        index = _Index(code, lengths, starts, firsts, token_bytes, dims)
        is_whole = size == firsts.end
        if is_whole and dimensions != count:
            raise ValueError(f"it has {count:,} sequences of {dimensions:,} dimensions together, and tokens have one")
    else:
        raise ValueError(f"it begins with {header[:9]!r}, and an index with MMIDIDX or TNTIDX and a header")
    if version != 1:
        raise ValueError(f"its version is {version}, and only 1 is known")
    if not is_whole:
        raise ValueError(f"it has {size:,} bytes, which are not those of {count:,} sequences: it was cut or damaged")
    return index


def _dtype_of(index: _Index, num_bytes: int) -> np.dtype[Any]:
    if index.dtype_code not in _DTYPES:
        raise ValueError(f"its dtype has the code {index.dtype_code}, and known are 1 to 8")
    count = index.lengths.count
    if count == 0 or num_bytes == 0:
        raise ValueError("it has no tokens")
    last = int(index.starts.read(count - 1, count)[0]), int(index.lengths.read(count - 1, count)[0])
    ends = {}
    for dtype in map(np.dtype, _DTYPES[index.dtype_code]):
        ends[dtype] = last[0] * (index.token_bytes or 1) + last[1] * dtype.itemsize
        if ends[dtype] == num_bytes and index.token_bytes in (None, dtype.itemsize):
            return dtype
    raise ValueError(
        f"its last sequence ends at byte {next(iter(ends.values())):,}, and the .bin beside it has {num_bytes:,}: one "
        "of them is damaged, or of another pair"
    )


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    """Up to 64 ranges of 16,384 numbers, spread over all of them; they cover all if they can."""
    last = max(0, count - _BLOCK)
    num_blocks = min(_BLOCKS, -(-count // _BLOCK))
    for block in range(num_blocks):
        start = last * block // max(1, num_blocks - 1)
        yield start, min(start + _BLOCK, count)


def _check_sequences(index: _Index, num_bytes: int, itemsize: int) -> None:
    """ValueError unless the sequences follow one another, from the first byte to the last."""
    count, unit, dims = index.lengths.count, 1 if index.token_bytes is None else itemsize, index.dimensions
    last = num_bytes // unit
    for begin, end in _blocks(count):
        lengths, starts = index.lengths.read(begin, end), index.starts.read(begin, end)
        following = index.starts.read(begin + 1, min(end + 1, count))
        if end == count:
            following = np.append(following, last)
        # Numbers beyond the file could come back to one in it, as sums of 64 bits do.
        wrong = (lengths < 0) | (starts < 0) | (starts > last) | (lengths > last)
        wrong |= starts + lengths * (itemsize // unit) != following
        if begin == 0:
            wrong[0] |= starts[0] != 0
        if dims is not None:
            wrong |= dims.read(begin, end) != np.arange(begin, end)
        if dims is not None and end == count:
            wrong[-1] |= dims.read(count, count + 1)[0] != count
            wrong[-1] |= index.starts.read(count, count + 1)[0] != last
        if wrong.any():
            place = begin + int(wrong.argmax())
            raise ValueError(f"sequence {place:,} does not end where the next one begins: the index is damaged")


def _check_documents(index: _Index) -> None:
    """ValueError unless documents are consecutive sequences, from the first to the last."""
    firsts, count = index.documents, index.documents.count
    for begin, end in _blocks(count):
        numbers = firsts.read(begin, min(end + 1, count))
        bounds = (begin == 0 and numbers[0] != 0) or (end == count and numbers[-1] != index.lengths.count)
        outside = (numbers < 0) | (numbers > index.lengths.count)
        if bounds or outside.any() or (np.diff(numbers) < 0).any():
            raise ValueError(f"its documents {begin:,} to {end:,} do not follow one another: the index is damaged")


def _sampled_ends(index: _Index, num_tokens: int, itemsize: int) -> list[int]:
    """Where the last token of some documents is."""
    firsts, count = index.documents, index.documents.count
    ends = set()
    for i in range(_SAMPLED_ENDS):
        if count > 1:
            place = 1 + i * (count - 1) // _SAMPLED_ENDS
            sequence = int(firsts.read(place, place + 1)[0])
        else:
            sequence = 1 + i * index.lengths.count // _SAMPLED_ENDS
        if sequence == index.lengths.count:
            ends.add(num_tokens - 1)
        elif 0 < sequence < index.lengths.count:
            start = int(index.starts.read(sequence, sequence + 1)[0])
            ends.add((start if index.token_bytes else start // itemsize) - 1)
    return sorted(end for end in ends if 0 <= end < num_tokens)


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """What Megatron-LM would store tokens of this vocabulary in: uint16 or int32."""
    return np.dtype("<u2" if vocab_size < _LARGEST_UINT16 else "<i4")


def write_index(path: Path, lengths: Path, dtype: np.dtype[Any]) -> None:
    """Write the ``NAME.idx`` of documents of one sequence each, whose lengths are in a file of int32."""
    count = lengths.stat().st_size // 4
    blocks = [(start, min(start + _COPIED, count)) for start in range(0, count, _COPIED)]
    with path.open("wb") as index, io.FileIO(lengths) as file:
        column = _Column(file, 0, "<i4", count)
        index.write(_MAPPED + struct.pack("<QBQQ", 1, _CODES[dtype], count, count + 1))
        for start, stop in blocks:
            index.write(column.read(start, stop).astype("<i4").tobytes())
        begin = 0
        for start, stop in blocks:
            ends = begin + np.cumsum(column.read(start, stop)) * dtype.itemsize
            index.write(np.concatenate(([begin], ends[:-1])).astype("<i8").tobytes())
            begin = int(ends[-1])
        for start, stop in blocks:
            index.write(np.arange(start, stop, dtype="<i8").tobytes())
        index.write(struct.pack("<Q", count))
