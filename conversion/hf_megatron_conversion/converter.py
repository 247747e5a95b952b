"""Convert a checkpoint: change its format, its tensor-parallel degree, its dtype or its model type."""

from __future__ import annotations

import logging
import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hf_megatron.errors import DestinationError
from hf_megatron.partition import table_for
from hf_megatron_conversion.comparison import compare
from hf_megatron_conversion.execute import execute
from hf_megatron_conversion.formats import FormatName, read_model
from hf_megatron_conversion.formats.base import ModelType, load_config
from hf_megatron_conversion.plan import Options, Plan, check_options, make_plan
from hf_megatron_conversion.progress import Progress, Silent
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.staging import Staging, check_destination, check_overlap

__all__ = ["Conversion", "convert"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: As it was given.
        destination: As it was given.
        format: The destination's format.
        tp_size: The destination's degree; 1 for a format that is not cut.
        tensors: Number of tensors.
        bytes_written: Bytes of all files of the destination.
        files: Size of each of them, by name.
        dropped: Names of stored tensors that the model does not need.
        seconds: Time it took.
        peak_rss_bytes: The process's peak resident memory so far.
        verified: Whether the result was read back and equals the source; None if that was not asked for. If False,
            nothing was left at the destination.
        dry_run: Whether nothing was written.
    """

    source: str
    destination: str
    format: FormatName
    tp_size: int
    tensors: int
    bytes_written: int
    files: Mapping[str, int]
    dropped: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    verified: bool | None
    dry_run: bool


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: FormatName,
    tp_size: int | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    model_type: ModelType | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint, bit for bit unless a dtype is asked for, a bounded slice of one tensor at a time.

    The destination appears complete or not at all. Where the weight files would not change (same format, degree, dtype
    and names), they are taken over as they are.

    Args:
        source: A directory, or the id of a repository on the Hub.
        destination: The directory to write; it must not exist, nor overlap the source.
        to: Format to write.
        tp_size: Degree to write; defaults to the source's, if that is cut.
        dtype: Cast floating-point tensors to this one (``"bfloat16"``); by default every tensor keeps its own.
        max_shard_size: Largest size of a weight file of a hub directory, in bytes or like ``"5GB"``.
        config: A config.json that takes the place of the source's.
        tokenizer: Directory of a tokenizer that takes the place of the source's.
        model_type: Whose ``model_type`` the result carries, the stock library's (default for hub) or this package's
            (default for tp).
        overwrite: Replace an existing destination.
        dry_run: Only plan; write nothing.
        verify: Read the result back before it is put in place, and compare every tensor with the source.
        progress: Told how far it is.

    Raises:
        PartitionError: The model cannot be cut for ``tp_size``.
        CheckpointError: The source is incomplete or damaged.
        DestinationError: The destination is taken, overlaps the source, or cannot be written.
        UnsupportedError: A model, dtype or option that is not offered here.
    """
    started = time.perf_counter()
    options = Options(
        to=to,
        tp_size=tp_size,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        model_type=model_type,
        verify=verify,
    )
    target = check_destination(Path(destination), overwrite=overwrite)
    directory = source_directory(source, config_only=True)
    check_overlap(target, directory)
    source_config = load_config(directory / "config.json" if config is None else Path(config))
    check_options(options, source_config, table_for(source_config))
    directory = source_directory(source)
    model = read_model(directory, source_config)
    if model.dropped:
        _logger.info("Not needed by the model and left out: %s.", ", ".join(model.dropped))
    plan = make_plan(model, options, directory.resolve().name if Path(source).is_dir() else str(source))
    verified = None if dry_run else _write(plan, target, overwrite, verify, progress or Silent())
    return Conversion(
        source=str(source),
        destination=str(destination),
        format=to,
        tp_size=plan.tp_size,
        tensors=len(plan.tensors),
        bytes_written=plan.nbytes,
        files={file.path: file.nbytes for file in plan.files},
        dropped=tuple(model.dropped),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=_peak_rss_bytes(),
        verified=verified,
        dry_run=dry_run,
    )


def _write(plan: Plan, destination: Path, overwrite: bool, verify: bool, progress: Progress) -> bool | None:
    """Write and publish; returns whether the result equals the source, or None if that is not asked for."""
    try:
        with Staging(destination, plan.nbytes, overwrite=overwrite) as staging:
            execute(plan, staging.directory, progress)
            if verify:
                differences, _ = compare(plan.tensors, read_model(staging.directory).tensors, progress)
                for name, reason in differences.items():
                    _logger.error("%s: %s", name, reason)
                if differences:
                    return False
            staging.publish()
    except OSError as error:
        raise DestinationError(f"{destination} cannot be written: {error}. Nothing was left behind.") from error
    return True if verify else None


def _peak_rss_bytes() -> int:
    # On Linux, getrusage counts what the parent had in memory when it started this process.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
