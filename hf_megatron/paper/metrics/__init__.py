"""The metrics of the paper's fine-tuning tasks, as ``evaluate`` modules that need no network.

metric = evaluate.load(metric_path("squad"))
"""

from __future__ import annotations

from pathlib import Path

from hf_megatron.errors import DataError

__all__ = ["METRICS", "metric_path"]

METRICS = ("accuracy", "race", "squad", "squad_v2")


def metric_path(name: str) -> str:
    """The path of one of ``METRICS``, for ``evaluate.load``; DataError if it is none."""
    if name not in METRICS:
        raise DataError(f"there is no metric {name!r} in this package; choose one of {', '.join(METRICS)}.")
    return str(Path(__file__).with_name(f"{name}_metric.py"))
