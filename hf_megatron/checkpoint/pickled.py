"""``pytorch_model.bin``: torch pickles that hold nothing but named tensors."""

from __future__ import annotations

from pathlib import Path

from hf_megatron.checkpoint.lazy import LazyTensor
from hf_megatron.checkpoint.torch_file import StoredArray, open_torch_file
from hf_megatron.checkpoint.unpickle import Global
from hf_megatron.errors import CheckpointFormatError


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch pickle, by name; none is read.

    Raises:
        CheckpointFormatError: The pickle asks for anything but tensors and containers of them; nothing of what it
            asks for has been run. There is no way to allow it.
        CheckpointIncompleteError: The file is truncated.
    """
    state_dict = open_torch_file(path)
    if not isinstance(state_dict, dict):
        raise CheckpointFormatError(f"{path} holds a {type(state_dict).__name__}, not a dictionary of tensors.")
    return {name: _lazy(path, name, value) for name, value in state_dict.items()}


def _lazy(path: Path, name: object, value: object) -> LazyTensor:
    if not isinstance(name, str) or not isinstance(value, StoredArray):
        kind = value.name if isinstance(value, Global) else type(value).__name__
        raise CheckpointFormatError(
            f"{path}: {name!r} is a {kind}; only named tensors, of types that safetensors has, are expected."
        )
    return value.lazy(name)
