"""Token files to damage, and what holds of those that are accepted."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from hf_megatron.errors import HfMegatronError
from hf_megatron.paper.data import PackedDocuments, ShuffledBlend, TokenFile
from tests.data.indexed import CODES
from tests.fuzz.checks import FindError
from tests.fuzz.conversions import attempt, written
from tests.fuzz.damages import SPECIALS, flipped
from tests.fuzz.directories import Files, Special
from tests.fuzz.pickles import INTEGERS, Draw, pick, rarely

_MAGIC = {"MMIDIDX": b"MMIDIDX\0\0", "TNTIDX": b"TNTIDX\0\0"}
_SIZES = {number: np.dtype(name).itemsize for name, number in CODES.items()}
# Steps from 0 that come back to a small number in 64 bits, and are none of them negative there.
_AROUND = [0, 2**63 - 1, -(2**63), -1]
_LENGTHS = [4, 2, 0, 7, 2]


@dataclass
class Index:
    """What an index says, true or not; None is what fits the columns."""

    kind: str = "MMIDIDX"
    code: int = 8
    version: int = 1
    counts: dict[str, int] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: _LENGTHS)
    starts: list[int] | None = None
    firsts: list[int] | None = None
    modes: list[int] = field(default_factory=list)

    def build(self) -> bytes:
        size, count = _SIZES.get(self.code, 2), len(self.lengths)
        starts = [sum(self.lengths[:i]) for i in range(count + 1)] if self.starts is None else self.starts
        firsts = list(range(count + 1)) if self.firsts is None else self.firsts
        numbers = {"sequences": count, "dimensions": count, "documents": len(firsts), "bytes": size, **self.counts}
        header = _MAGIC[self.kind] + _packed("Q", [self.version])
        if self.kind == "MMIDIDX":
            header += _packed("B", [self.code]) + _packed("Q", [numbers["sequences"]])
            columns = _packed("i", self.lengths) + _packed("q", [size * start for start in starts[:count]])
        else:
            header += _packed("Q", [self.code, numbers["bytes"], numbers["sequences"], numbers["dimensions"]])
            columns = _packed("q", [*range(count + 1), *starts, *self.lengths])
        if firsts:
            header += _packed("Q", [numbers["documents"]])
        return header + columns + _packed("q", firsts) + _packed("b", self.modes)


def _packed(letter: str, numbers: list[int]) -> bytes:
    """Numbers in so many bits, whatever they are."""
    size = struct.calcsize("<" + letter)
    return b"".join((number % 256**size).to_bytes(size, "little") for number in numbers)


def pair(index: Index, num_tokens: int = sum(_LENGTHS)) -> Files:
    """The two files."""
    return {"t.idx": index.build(), "t.bin": (b"\1" + bytes(_SIZES.get(index.code, 2) - 1)) * num_tokens}


@st.composite
def pairs(draw: Draw) -> Files:
    """Token files with one to three things wrong."""
    if rarely(draw, 50):
        return {"t.idx": Index("TNTIDX", lengths=[2**39]).build(), "t.bin": Special("zeros", size=2**40)}
    index = Index(pick(draw, sorted(_MAGIC)), pick(draw, sorted(_SIZES)))
    if rarely(draw, 3):
        index.firsts = pick(draw, [[], [0, 2, 5]])
    for _ in range(draw(st.integers(0, 2))):
        index = _changed(draw, index)
    files = pair(index)
    for _ in range(draw(st.integers(0, 1))):
        name = pick(draw, sorted(files))
        files[name] = wrong_file(draw, files[name])
    return files


def _changed(draw: Draw, index: Index) -> Index:
    """One thing in it is another."""
    columns = {
        "lengths": index.lengths,
        "starts": index.starts or [sum(index.lengths[:i]) for i in range(len(index.lengths) + 1)],
        "firsts": list(range(len(index.lengths) + 1)) if index.firsts is None else index.firsts,
    }
    name = pick(draw, [*columns, *columns, "around", "counts", "code", "version", "modes", "kind"])
    number = draw(INTEGERS)
    match name:
        case "counts":
            which = pick(draw, ["sequences", "dimensions", "documents", "bytes"])
            index.counts[which] = number
        case "code" | "version":
            setattr(index, name, number)
        case "modes":
            index.modes = [number] * len(index.lengths)
        case "kind":
            index.kind = pick(draw, sorted(_MAGIC))
        case "around":
            return pick(draw, [documents_around(index.kind), sequences_around(index.kind)])
        case _:
            setattr(index, name, _column(draw, list(columns[name]), number))
    return index


def _column(draw: Draw, column: list[int], number: int) -> list[int]:
    """One of its numbers is another, missing or there twice."""
    at = draw(st.integers(0, max(len(column) - 1, 0)))
    match pick(draw, ["set", "set", "drop", "twice"]):
        case "set" if column:
            column[at] = number
        case "drop":
            del column[at : at + 1]
        case _:
            column[at:at] = column[at : at + 1]
    return column


def documents_around(kind: str = "MMIDIDX") -> Index:
    """Documents of which each begins after the one before it, if numbers are taken modulo 2**64."""
    return Index(kind, firsts=[*_AROUND, len(_LENGTHS)])


def sequences_around(kind: str) -> Index:
    """Sequences of which each ends where the next begins, if numbers are taken modulo 2**64."""
    size, code = (1, 1) if kind == "MMIDIDX" else (2, 8)
    steps = [*_AROUND, sum(_LENGTHS)]
    lengths = [(after - before) % 2**64 for before, after in pairwise(steps)]
    return Index(kind, code, counts={"bytes": size}, lengths=lengths, starts=steps)


def wrong_file(draw: Draw, content: bytes | Special) -> bytes | Special:
    """A file that was cut, lengthened, changed or replaced."""
    if not isinstance(content, bytes) or rarely(draw, 4):
        return pick(draw, SPECIALS)
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    changes = [content[:at], content + content[at:], content[at:], flipped(draw, content), content + b"\0" * 8]
    return pick(draw, changes)


def check_token_files(files: Files, directory: Path) -> bool:
    """What is accepted has the tokens of its file, and sequences and documents that lie in it."""
    source = written(files, directory)
    tokens = attempt(directory, lambda: TokenFile(source / "t"))
    if isinstance(tokens, HfMegatronError):
        return False
    require_sound(tokens, source / "t.idx")
    return not isinstance(attempt(directory, lambda: _read(tokens)), HfMegatronError)


def _read(tokens: TokenFile) -> None:
    size = len(tokens)
    for start in {0, max(0, size - 4)}:
        tokens.read(start, min(size, start + 4))
    packed = PackedDocuments(tokens, length=4, end_of_document=1, separate_documents=True, vocab_size=300)
    ShuffledBlend([packed], seed=0)[0]
    packed[len(packed) - 1]


def require_sound(tokens: TokenFile, path: Path) -> None:
    """FindError unless all that the index says, read in another way, lies in the tokens."""
    content, count, size = path.read_bytes(), tokens.num_sequences, tokens.dtype.itemsize
    is_mapped = content.startswith(_MAGIC["MMIDIDX"])
    if tokens.path.stat().st_size != len(tokens) * size:
        raise FindError("bytes that are no whole token", str(tokens.path.stat()))
    has_documents = len(content) != (26 + 12 * count if is_mapped else 48 + 8 * (3 * count + 2))
    at = (26 if is_mapped else 48) + 8 * has_documents
    if is_mapped:
        lengths = struct.unpack_from(f"<{count}i", content, at)
        starts = [start / size for start in struct.unpack_from(f"<{count}q", content, at + 4 * count)]
        at += 12 * count
    else:
        starts = list(struct.unpack_from(f"<{count}q", content, at + 8 * (count + 1)))
        lengths = struct.unpack_from(f"<{count}q", content, at + 16 * (count + 1))
        at += 8 * (3 * count + 2)
    if not all(0 <= start <= start + length <= len(tokens) for start, length in zip(starts, lengths, strict=True)):
        raise FindError("a sequence that is not in the file", f"{starts} {lengths} {len(tokens)}")
    firsts = struct.unpack_from(f"<{tokens.num_documents + 1 if has_documents else 0}q", content, at)
    if list(firsts) != sorted(firsts) or any(not 0 <= first <= count for first in firsts):
        raise FindError("documents that are not of the sequences", f"{firsts} of {count}")
