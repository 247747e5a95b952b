"""How much memory a conversion takes: sizes in words, what the process has, and what that leaves for its threads."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterable
from pathlib import Path

from hf_megatron.errors import UnsupportedError
from hf_megatron.partition import Box
from hf_megatron_conversion import tensors as bounds
from hf_megatron_conversion.files import Writing
from hf_megatron_conversion.tensors import CAST_BYTES, Cast, Readable, bounded

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)
_MAX_THREADS = 4
# What a thread has besides its slice, and the smallest slice that is worth a system call.
_FIXED_BYTES, _MIN_SLICE_BYTES = 4 * 2**20, 2**18
_MEGABYTES_TO_SPARE = 1  # since no two processes have the same in use
_FIXED_BYTES_OF_CAST = 2 * CAST_BYTES  # a part of the source, and what its comparisons and the allocator keep


def parse_size(value: str | int, name: str) -> int:
    """Bytes in ``500MB`` (10**6 each), ``5GiB`` (2**30 each) or ``1000``; UnsupportedError if it is no such size."""
    found = _SIZE.fullmatch(str(value).strip())
    size = 0
    if found is not None:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " "))
    if not 0 < size < 2**63:
        raise UnsupportedError(f"{name}={value!r} is not a size such as 500MB or 5GB.")
    return size


def writing_within(limit: int | None, tensors: Iterable[Readable], weights_mode: int) -> Writing:
    """As many threads, and as large slices, as ``limit`` bytes allow; UnsupportedError if that is too little.

    What writing needs of libraries is loaded before it is looked at.
    """
    import numpy as np  # noqa: F401

    casts = [tensor for tensor in tensors if isinstance(tensor, Cast)]
    for tensor in casts[:1]:  # for which torch loads several megabytes beside those of its import
        tensor.read(next(bounded(Box.whole(tensor.shape), tensor.dtype, 1)))
    fixed_bytes = _FIXED_BYTES + (_FIXED_BYTES_OF_CAST if casts else 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = min(_MAX_THREADS, cores)
    if limit is None:
        return Writing(threads=threads, slice_bytes=bounds.SLICE_BYTES, weights_mode=weights_mode)
    used = peak_rss_bytes()
    while True:
        slice_bytes = min((limit - used) // threads - fixed_bytes, bounds.SLICE_BYTES)
        if slice_bytes >= _MIN_SLICE_BYTES:
            return Writing(threads=threads, slice_bytes=slice_bytes, weights_mode=weights_mode)
        if threads == 1:
            least = used + fixed_bytes + _MIN_SLICE_BYTES
            raise UnsupportedError(
                f"max_memory={limit:,}: {used:,} bytes are in use before a weight is read; give at least "
                f"{-(-least // 10**6) + _MEGABYTES_TO_SPARE}MB."
            )
        threads -= 1


def peak_rss_bytes() -> int:
    """The most memory that this process has had so far."""
    # On Linux, getrusage counts what the parent had in memory when it started this process.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
