"""Write a plan's files, one after the other, and make sure that they are on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hf_megatron.errors import DestinationError
from hf_megatron_conversion.conversion_plan import Plan
from hf_megatron_conversion.files import OutputFile
from hf_megatron_conversion.progress import Progress

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def execute(plan: Plan, directory: Path, progress: Progress) -> None:
    """Write the plan's files into ``directory``, in the plan's order; no file is read back.

    Raises:
        DestinationError: The disk is full.
        OSError: A file cannot be written for another reason.
    """
    progress.begin("Writing", plan.nbytes)
    for file in plan.files:
        try:
            _write(file, directory / file.path, progress)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise DestinationError(
                f"There is no space left to write {file.path} of {file.nbytes:,} bytes ({error.strerror}); "
                f"{plan.nbytes:,} bytes are needed in all. Nothing was left behind."
            ) from error


def _write(file: OutputFile, path: Path, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as stream:
        file.write(stream, progress.advance)
        stream.flush()
        os.fsync(stream.fileno())
        size = os.fstat(stream.fileno()).st_size
    assert size == file.nbytes, f"{file.path}: {file.nbytes} bytes were planned, {size} written"
