"""The formats, by name.

A new one is a module or package beside this file, with a class in it that has the interface of ``base.Format``, and a
line here.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from hf_megatron_conversion.formats.base import Format, Model, SourceOptions

__all__ = ["Container", "FormatName", "TransformerImpl", "format_named", "format_of", "read_model"]

FormatName = Literal["hub", "tp", "megatron-lm", "megatron-core"]
Container = Literal["torch_dist", "torch"]
"""How Megatron-core's tensors lie in files, as Megatron-LM's ``--ckpt-format`` calls it."""
TransformerImpl = Literal["local", "transformer_engine"]
"""Whose names Megatron-core gives to a layer's tensors in the ``torch`` container, as Megatron-LM calls it."""

# In the order in which a directory is asked whether it is one of them; the last one takes, and refuses, all others.
_CLASSES: dict[FormatName, tuple[str, str]] = {
    "megatron-core": ("hf_megatron_conversion.formats.megatron_core", "MegatronCoreFormat"),
    "megatron-lm": ("hf_megatron_conversion.formats.megatron_lm", "MegatronLmFormat"),
    "tp": ("hf_megatron_conversion.formats.tp", "TpFormat"),
    "hub": ("hf_megatron_conversion.formats.hub", "HubFormat"),
}
assert set(_CLASSES) == set(get_args(FormatName))


def format_named(name: FormatName, container: Container | None = None) -> Format:
    """The format of this name, in a ``container`` if it has several; its module is imported only now."""
    module, class_name = _CLASSES[name]
    of_class = getattr(import_module(module), class_name)
    result: Format = of_class() if container is None else of_class(container)
    return result


def read_model(directory: Path, given: SourceOptions | None = None) -> Model:
    """Open a checkpoint of any format; headers only, no weights.

    Raises:
        CheckpointError: The directory is no checkpoint, or not a complete one.
        UnsupportedError: A model that is not offered here.
    """
    if given is None:
        given = import_module("hf_megatron_conversion.formats.base").SourceOptions()
    model = format_of(directory).read(directory, given)
    model.table.check_numerics(model.config)
    return model


def format_of(directory: Path) -> Format:
    """The format that a directory is in, by the names of its files."""
    formats = (format_named(name) for name in _CLASSES)
    return next(found for found in formats if found.recognises(directory))
