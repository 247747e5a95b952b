"""The ranks of the quickstart with a defect: the cache is lost on its way into the model. Started by a test."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_megatron.commands.quickstart.train import main
from hf_megatron.models import forward


def _without_cache(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in ("cache", "past_key_values")}


if __name__ == "__main__":
    forward.rename_cache = _without_cache  # type: ignore[attr-defined]
    main(Path(sys.argv[1]), int(sys.argv[2]))
