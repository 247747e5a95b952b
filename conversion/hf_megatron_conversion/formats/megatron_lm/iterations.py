"""Which of the iterations in a directory is the latest: what Megatron-LM, and Megatron-Bridge, write down about it."""

from __future__ import annotations

import re
from pathlib import Path

from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.checkpoint.torch_file import StoredArray, open_torch_file
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron.partition import Box

_TRACKER = "latest_checkpointed_iteration.txt"
_BRIDGE_TRACKER = "latest_train_state.pt"
_ITERATION = re.compile(r"iter_\d{7,}|release")


def has_iterations(directory: Path) -> bool:
    """Whether it is the root of a training run, by the names of what is in it."""
    if (directory / _TRACKER).exists() or (directory / _BRIDGE_TRACKER).exists():
        return True
    return any(_ITERATION.fullmatch(path.name) and path.is_dir() for path in directory.iterdir())


def latest_iteration(directory: Path) -> Path:
    """The directory of the latest iteration.

    Raises:
        CheckpointFormatError: What should say which one it is says something else.
        CheckpointIncompleteError: Nothing says it, or it is not there.
    """
    tracker, bridge = directory / _TRACKER, directory / _BRIDGE_TRACKER
    if tracker.is_file():
        with open_regular(tracker) as file:
            latest = file.read(32).decode(errors="replace").strip()
        if latest != "release" and not latest.isdecimal():
            raise CheckpointFormatError(f"{tracker} holds {shown(latest)} where an iteration or 'release' is expected.")
        chosen = directory / (latest if latest == "release" else f"iter_{int(latest):07d}")
    elif bridge.is_file():
        tracker, chosen = bridge, directory / f"iter_{_step(bridge):07d}"
    else:
        found = sorted(path for path in directory.iterdir() if _ITERATION.fullmatch(path.name))
        if len(found) != 1:
            names = ", ".join(path.name for path in found[-5:])
            raise CheckpointIncompleteError(f"{directory} has no {_TRACKER}; give one of its iterations: {names}.")
        (chosen,) = found
    if not chosen.is_dir():
        raise CheckpointIncompleteError(f"{chosen} is missing, which {tracker} names.")
    return chosen


def _step(path: Path) -> int:
    """The iteration in Megatron-Bridge's training state, a dictionary of scalar tensors."""
    content = open_torch_file(path)
    step = content.get("step") if isinstance(content, dict) else None
    if not isinstance(step, StoredArray) or step.shape or step.dtype not in ("I32", "I64"):
        raise CheckpointFormatError(f"{path} has no integer 'step' in it, which says what the latest iteration is.")
    memory = bytearray(4 if step.dtype == "I32" else 8)
    step.lazy("step").read_into(memoryview(memory), Box((), ()))
    return int.from_bytes(memory, "little", signed=True)
