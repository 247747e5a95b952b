"""A writer of Megatron-LM's token files, made from the description of the format and from no other code here."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
_LETTERS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float64": "d", "float32": "f"}
_LETTERS |= {"uint16": "H"}
Sequences = Sequence[Sequence[int]]


def write_pair(
    prefix: Path,
    sequences: Sequences,
    dtype: str = "uint16",
    *,
    kind: str = "MMIDIDX",
    documents: Sequence[int] | None = None,
    modes: Sequence[int] | None = None,
    code: int | None = None,
) -> None:
    """Write ``prefix.bin`` and ``prefix.idx``; without ``documents`` each sequence is one, and () leaves them out."""
    letter, size = _LETTERS[dtype], struct.calcsize(_LETTERS[dtype])
    with Path(f"{prefix}.bin").open("wb") as data:
        for sequence in sequences:
            data.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    number, count = CODES[dtype] if code is None else code, len(sequences)
    firsts = list(range(count + 1)) if documents is None else list(documents)
    lengths = [len(sequence) for sequence in sequences]
    starts = [sum(lengths[:i]) for i in range(count + 1)]
    with Path(f"{prefix}.idx").open("wb") as index:
        if kind == "MMIDIDX":
            index.write(b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + bytes([number]) + struct.pack("<Q", count))
            if firsts:
                index.write(struct.pack("<Q", len(firsts)))
            index.write(struct.pack(f"<{count}i", *lengths))
            index.write(struct.pack(f"<{count}q", *(size * start for start in starts[:-1])))
            index.write(struct.pack(f"<{len(firsts)}q", *firsts))
            if modes is not None:
                index.write(struct.pack(f"<{count}b", *modes))
        else:
            index.write(b"TNTIDX\x00\x00" + struct.pack("<QQQQQ", 1, number, size, count, count))
            if firsts:
                index.write(struct.pack("<Q", len(firsts)))
            index.write(struct.pack(f"<{count + 1}q", *range(count + 1)))
            index.write(struct.pack(f"<{count + 1}q", *starts))
            index.write(struct.pack(f"<{count}q", *lengths))
            index.write(struct.pack(f"<{len(firsts)}q", *firsts))
