"""Read strided elements of a file into strided memory: few system calls, bounded memory, whatever the two layouts."""

from __future__ import annotations

import io
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_megatron.errors import CheckpointIncompleteError

Array = Any  # numpy's, which is imported to read tensors only

SCRATCH_BYTES = 2**20
"""What a gather holds in memory besides its result, two times at most; it fits a core's cache."""
# To read bytes that nobody wants costs less than another system call until there are this many of them.
_MAX_GAP_BYTES = 4096
# A matrix is transposed tile by tile, from memory whose rows do not all fall on the same lines of the cache.
_TILE_ROWS, _TILE_COLUMNS, _PADDING = 64, 512, 32


class FileReader:
    """An open file. If it may be mapped, rows with gaps between them are copied out of memory, not read one by one."""

    def __init__(self, path: Path, file: io.FileIO, *, may_map: bool = False) -> None:
        self.path, self._file, self._may_map = path, file, may_map

    def fileno(self) -> int:
        """Its descriptor."""
        return self._file.fileno()

    def read(self, position: int, memory: memoryview) -> None:
        """Fill memory from there on; CheckpointIncompleteError if the file ends before."""
        self._file.seek(position)
        while memory.nbytes:
            count = self._file.readinto(memory)  # the system reads 2 GB at a time at most
            if not count:
                raise CheckpointIncompleteError(f"{self.path} became shorter while it was read.")
            memory = memory[count:]

    def read_rows(self, position: int, stride: int, memory: memoryview, size: int) -> None:
        """Fill memory with ``size`` bytes from there on, as many ``stride`` bytes further, and so on."""
        if self._may_map and self._copy_rows(position, stride, memory, size):
            return
        seek, readinto = self._file.seek, self._file.readinto
        for start in range(0, len(memory), size):
            seek(position)
            if readinto(memory[start : start + size]) != size:
                self.read(position, memory[start : start + size])
            position += stride

    def _copy_rows(self, position: int, stride: int, memory: memoryview, size: int) -> bool:
        """``read_rows`` through a mapping that is gone afterwards; False if the file cannot be mapped."""
        import numpy as np

        target = np.frombuffer(memory, np.uint8).reshape(-1, size)
        offset = position % mmap.ALLOCATIONGRANULARITY
        length = offset + (len(target) - 1) * stride + size
        try:
            mapping = mmap.mmap(self.fileno(), length, access=mmap.ACCESS_READ, offset=position - offset)
        except (OSError, ValueError):  # of a file that has become shorter too, which reading reports
            return False
        with mapping:
            target[...] = np.ndarray(target.shape, np.uint8, mapping, offset, (stride, 1))
        return True

    def close(self) -> None:
        """Close it."""
        self._file.close()


def gather(file: FileReader, start: int, strides: Sequence[int], target: Array) -> None:
    """Fill ``target``, an array of any strides, with elements of a file.

    Args:
        file: The file.
        start: Where its first element is.
        strides: Bytes from one element to the next, in the file, along each of the target's dimensions.
        target: The array.
    """
    # In the order of the file, so that each step goes forwards, and without dimensions along which there is no step.
    dims = sorted((dim for dim in range(target.ndim) if target.shape[dim] > 1), key=lambda dim: -strides[dim])
    rest = [dim for dim in range(target.ndim) if target.shape[dim] == 1]
    target = target.transpose((*rest, *dims))[(*[0] * len(rest), ...)]
    if not dims:
        target = target.reshape(1)
    _gather(file, start, [strides[dim] for dim in dims] or [target.itemsize], target)


def _gather(file: FileReader, start: int, strides: Sequence[int], target: Array) -> None:
    import numpy as np

    item, shape = target.itemsize, target.shape
    inner = item + sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True))
    span = inner + (shape[0] - 1) * strides[0]  # from the first byte to the last
    run = _contiguous(strides, shape, item)
    if run == target.nbytes and target.flags.c_contiguous:
        file.read(start, _bytes(target))
        return
    is_dense = span - target.nbytes <= _MAX_GAP_BYTES * (target.nbytes // run)
    if not is_dense and run * shape[0] == target.nbytes and target.flags.c_contiguous:
        file.read_rows(start, strides[0], _bytes(target), run)
        return
    rows = 0  # to read at once; none means one by one, each on its own terms
    if is_dense and inner <= SCRATCH_BYTES:
        rows = 1 + (SCRATCH_BYTES - inner) // strides[0] if strides[0] else shape[0]
    elif not is_dense and target.strides[-1] != item:
        rows = SCRATCH_BYTES // (target.nbytes // shape[0])
    if is_dense and rows >= shape[0]:
        scratch = np.empty(span, np.uint8)
        file.read(start, _bytes(scratch))
        _copy(target, np.ndarray(shape, target.dtype, scratch, strides=tuple(strides)))
        return
    for index in range(0, shape[0], rows or 1):
        position = start + index * strides[0]
        if rows == 0:
            row, steps = (target[index], strides[1:]) if target.ndim > 1 else (target[index : index + 1], [item])
            _gather(file, position, steps, row)
        elif is_dense:
            _gather(file, position, strides, target[index : index + rows])
        else:  # first in the file's order, then in the target's
            part = target[index : index + rows]
            ordered = np.empty(part.shape, target.dtype)
            _gather(file, position, strides, ordered)
            _copy(part, ordered)


def _bytes(array: Array) -> memoryview:
    import numpy as np

    return memoryview(array.reshape(-1).view(np.uint8))


def _contiguous(strides: Sequence[int], shape: Sequence[int], item: int) -> int:
    """Bytes that lie without a gap, of all that dimensions of this shape reach."""
    size = item
    for stride, length in zip(reversed(strides), reversed(shape), strict=True):
        if stride != size:
            break
        size *= length
    return size


def _copy(target: Array, source: Array) -> None:
    """As ``target[...] = source``, and fast for matrices in the opposite order too."""
    import numpy as np

    if target.ndim < 2 or target.strides[-1] <= min(target.strides[:-1]):
        target[...] = source
    elif target.ndim > 2:
        for index in range(target.shape[1]):
            _copy(target[:, index], source[:, index])
    else:
        rows, columns = target.shape
        for row in range(0, rows, _TILE_ROWS):
            for column in range(0, columns, _TILE_COLUMNS):
                place = np.s_[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
                part = source[place]
                tile = np.empty((len(part), part.shape[1] + _PADDING), target.dtype)[:, : part.shape[1]]
                tile[...] = part
                target.T[place[::-1]] = tile.T
