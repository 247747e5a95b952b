"""Files of results: what was measured, where, and with what."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "environment", "read", "write"]

RESULTS = Path(__file__).resolve().parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """What the numbers were measured on, and the installed versions of these packages."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def read(file: Path) -> dict[str, Any]:
    """What was measured before; nothing if there is no file."""
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def write(file: Path, record: dict[str, Any]) -> None:
    """Write a record for people to look into: numbers with six digits, and each curve on one line."""
    file.write_text(f"{_text(record)}\n", encoding="utf-8")


def _text(value: Any, margin: str = "\n") -> str:
    """JSON, in which a list or an object without another in it takes one line; ``margin`` begins a line."""
    if isinstance(value, dict):
        parts = [f"{json.dumps(key)}: {_text(item, margin + ' ')}" for key, item in value.items()]
        items, brackets = list(value.values()), "{}"
    elif isinstance(value, list | tuple):
        parts = [_text(item, margin + " ") for item in value]
        items, brackets = list(value), "[]"
    else:
        return json.dumps(float(f"{value:.6g}") if isinstance(value, float) else value)
    if not any(isinstance(item, dict | list | tuple) for item in items):
        return f"{brackets[0]}{', '.join(parts)}{brackets[1]}"
    return f"{brackets[0]}{margin} {f',{margin} '.join(parts)}{margin}{brackets[1]}"
