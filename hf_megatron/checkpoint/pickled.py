"""``pytorch_model.bin``: torch pickles, opened so that they can hold nothing but tensors."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.safetensors_header import DTYPES
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError
from hf_megatron.partition import Box

if TYPE_CHECKING:
    import torch

__all__ = ["open_pickle"]


def open_pickle(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a torch pickle, mapped from the file rather than read.

    Files in torch's format from before version 1.6 cannot be mapped and are read whole.

    Raises:
        CheckpointFormatError: The pickle asks for anything but tensors and containers of them; nothing of what it
            asks for has been run. There is no way to allow it.
        CheckpointIncompleteError: The file is truncated.
    """
    state_dict = _load(path)
    if not isinstance(state_dict, dict):
        raise CheckpointFormatError(f"{path} holds a {type(state_dict).__name__}, not a dictionary of tensors.")
    return {name: _lazy(path, name, value) for name, value in state_dict.items()}


def _load(path: Path) -> object:
    import torch

    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and _is_torchscript(path):
            raise CheckpointFormatError(f"{path} is a TorchScript program, not a dictionary of tensors.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointFormatError:
        raise
    except pickle.UnpicklingError as error:
        # The text of torch goes on to tell how to switch the check off, so it is not chained.
        raise CheckpointFormatError(_refusal(path, str(error))) from None
    except Exception as error:
        # On damaged bytes the readers raise what they run into: IndexError, BadZipFile, UnicodeDecodeError, ...
        raise CheckpointIncompleteError(f"{path} cannot be read; is it truncated? {error!r}") from error


def _is_torchscript(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _refusal(path: Path, reason: str) -> str:
    names = re.findall(r"GLOBAL ([\w.]+)", reason)
    if not names:
        return f"{path} is not a pickle of tensors; it may be truncated, or a Git LFS pointer that was never fetched."
    return (
        f"{path} is refused: its pickle asks for {names[0]}, and loading it could run any code. Convert it to "
        "safetensors where its source is trusted."
    )


def _lazy(path: Path, name: object, value: object) -> LazyTensor:
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        raise CheckpointFormatError(f"{path}: {name!r} is a {type(value).__name__}; only named tensors are expected.")
    shape = tuple(value.shape)
    piece = Piece(path, Box.whole(shape), 0, value.nbytes)
    return LazyTensor(name, _dtype_name(path, name, value.dtype), shape, (piece,), source=value.detach())


def _dtype_name(path: Path, name: str, dtype: torch.dtype) -> str:
    for spelling, (_, torch_name) in DTYPES.items():
        if str(dtype) == f"torch.{torch_name}":
            return spelling
    raise CheckpointFormatError(f"{path}: {name} has dtype {dtype}, which safetensors cannot hold.")
