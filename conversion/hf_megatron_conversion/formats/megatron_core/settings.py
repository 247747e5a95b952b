"""The sizes of a model that was saved without Megatron-LM's arguments: those of Megatron-Bridge and NeMo."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def arguments_beside(place: Path) -> dict[str, Any] | None:
    """What a YAML file beside the tensors says, as Megatron-LM's arguments; None if there is none."""
    return None
