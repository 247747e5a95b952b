"""Which destinations a conversion refuses, beyond one that exists."""

from __future__ import annotations

from pathlib import Path

from hf_megatron.errors import DestinationError


def check_overlap(destination: Path, source: Path) -> None:
    """Raise DestinationError if one of the two directories is the other one or lies in it."""
    destination, source = destination.resolve(), source.resolve()
    if destination == source or destination in source.parents or source in destination.parents:
        raise DestinationError(
            f"The destination {destination} and the source {source} overlap, which could destroy the source; choose a "
            "destination outside of it."
        )


def check_content(destination: Path) -> None:
    """Raise DestinationError if replacing a directory would delete more than a checkpoint."""
    directories = [path for path in destination.iterdir() if path.is_dir()] if destination.exists() else []
    kept = sorted(path.name for path in directories if not _is_release(path))
    if kept:
        raise DestinationError(
            f"The destination {destination} holds directories ({', '.join(kept[:5])}), which no checkpoint written "
            "here does, and will not be overwritten. Remove it yourself if nothing in it is needed."
        )


def _is_release(directory: Path) -> bool:
    """Whether this is the directory of a megatron-lm checkpoint, the only one in what is written here."""
    is_named = directory.name == "release" and directory.with_name("latest_checkpointed_iteration.txt").is_file()
    return is_named and all(path.name.startswith("mp_rank_") for path in directory.iterdir())
