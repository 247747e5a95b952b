"""Files of results: JSON with the raw samples, Markdown made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "read", "write"]

RESULTS = Path(__file__).resolve().parent.parent / "results"


def read(file: Path) -> dict[str, Any]:
    """What was measured before; nothing if there is no file."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def write(file: Path, results: dict[str, Any]) -> None:
    """Write with six digits, for a file that people look into."""
    file.write_text(json.dumps(_rounded(results)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
