"""Weights that stay in their files: private mappings, as stock transformers makes them.

A mapped weight takes memory of its own page by page, when it is written to; the file is never changed. It keeps its
values when the file is deleted or replaced by another of its name, which is how safetensors, this package and most
programs write. A program that writes into the file itself changes the weight, and one that cuts the file off ends the
process that reads the weight (SIGBUS).
"""

from __future__ import annotations

import mmap
from pathlib import Path
from weakref import WeakValueDictionary

from hf_megatron.checkpoint.gather import FileReader

ALIGNMENT = 16
"""Bytes. The product of a single row and a matrix that lies elsewhere differs in its last bits from that of a copy."""


class MappedFiles:
    """The files of one load, each mapped once, for as long as a weight is left in it.

    Two loads must not share one: each model trains its own weights.
    """

    def __init__(self) -> None:
        self._mappings: WeakValueDictionary[Path, mmap.mmap] = WeakValueDictionary()

    def of(self, file: FileReader) -> mmap.mmap | None:
        """The mapping of an open file; None if it cannot be mapped."""
        mapping = self._mappings.get(file.path)
        if mapping is None:
            try:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:  # no memory for so large a file, or a file system that maps nothing
                return None
            self._mappings[file.path] = mapping
        return mapping
