"""Megatron checkpoints, tensor-parallel shards and the Hub: convert, inspect and verify, without a process group.

    from hf_megatron_conversion import convert, inspect, verify

The functions are imported when they are first asked for, so that the command line can print its help before anything
heavy is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_megatron_conversion.comparison import Verification as Verification
    from hf_megatron_conversion.comparison import verify as verify
    from hf_megatron_conversion.converter import Conversion as Conversion
    from hf_megatron_conversion.converter import convert as convert
    from hf_megatron_conversion.inspection import Inspection as Inspection
    from hf_megatron_conversion.inspection import inspect as inspect

__all__ = ["Conversion", "Inspection", "Verification", "convert", "inspect", "verify"]

# No module has the name of a function: importing a submodule would put the module in the function's place.
_MODULES = {
    "Conversion": "converter",
    "Inspection": "inspection",
    "Verification": "comparison",
    "convert": "converter",
    "inspect": "inspection",
    "verify": "comparison",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
