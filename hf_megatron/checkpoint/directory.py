"""Open checkpoint directories and list their tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_megatron.architectures import table_for
from hf_megatron.checkpoint.budgets import (
    MAX_FILES,
    MAX_JSON_BYTES,
    MAX_NAME_LENGTH,
    MAX_TENSORS,
    BudgetError,
    require_within,
)
from hf_megatron.checkpoint.json_text import parse_json
from hf_megatron.checkpoint.lazy import LazyTensor, Piece
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.checkpoint.safetensors_header import read_header, require_headers_within_limit
from hf_megatron.checkpoint.sharded import SHARDING_INFO, is_shard, open_shards
from hf_megatron.checkpoint.spelling import listed, respelled
from hf_megatron.checkpoint.torch_file import open_state_dict
from hf_megatron.errors import CheckpointFormatError, CheckpointIncompleteError, shown
from hf_megatron.partition import Box

# In the order in which transformers prefers them where a directory holds several.
_HUB_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory; only headers have been read."""

    directory: Path
    format: Literal["hub", "tp"]  # stored as stock transformers stores a model, or one file per rank
    config: dict[str, Any]  # config.json as read
    tensors: dict[str, LazyTensor]  # the full tensors under their stored names
    files: tuple[Path, ...]  # the weight files, in order

    @property
    def tp_size(self) -> int:
        """Number of pieces the word embedding is cut into along the vocabulary; 1 in a Hub directory."""
        if self.format == "hub":
            return 1
        table = table_for(self.config)
        for name, tensor in self.tensors.items():
            if respelled(name, {table.word_embedding: None}, table.base_prefix):
                return len({piece.box.offset[0] for piece in tensor.pieces})
        raise AssertionError("open_shards refuses a directory without a word embedding")


def open_checkpoint(directory: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Open a Hub or ``tp`` directory and check that its files are complete and consistent.

    A ``config`` takes the place of the directory's config.json, which then need not exist.

    Raises:
        CheckpointFormatError: Not a directory, or one without a config.json or weights, with weights of both formats,
            or with a file that is not what its name says, or an unsafe pickle.
        CheckpointIncompleteError: A file is truncated or missing, or shards do not tile the tensors of their model.
        UnsupportedError: A ``tp`` directory of an architecture or class that is not offered here.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointFormatError(f"{directory} is not a directory.")
    config = read_json(directory / "config.json") if config is None else dict(config)
    shards = tuple(sorted(path for path in directory.iterdir() if is_shard(path)))
    hub = [name for name in _HUB_NAMES if (directory / name).exists()]
    if shards and hub:
        raise CheckpointFormatError(
            f"{directory} holds both the shards of a distributed checkpoint ({shards[0].name}, {len(shards)} in all) "
            f"and {hub[0]}; which of them is the model? Move one of the two away."
        )
    if shards:
        return Checkpoint(directory, "tp", config, open_shards(shards, config), shards)
    if not hub:
        raise CheckpointFormatError(
            f"{directory} holds no weights: none of {', '.join(_HUB_NAMES)} or shard-*-model-*-of-*.safetensors."
        )
    tensors, files = _open_hub(directory / hub[0])
    return Checkpoint(directory, "hub", config, tensors, files)


def open_files(files: Sequence[Path]) -> dict[str, LazyTensor]:
    """The tensors of whole-tensor weight files (``.safetensors`` or ``.bin``), by name.

    CheckpointFormatError if a file is of no known kind or a rank's shard, a pickle is unsafe, or two files hold a
    tensor of the same name; CheckpointIncompleteError if one is truncated.
    """
    files = list(map(Path, files))
    require_headers_within_limit(file for file in files if file.suffix == ".safetensors")
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        for name, tensor in _open_file(file).items():
            if name in tensors:
                raise CheckpointFormatError(
                    f"{name} is stored in both {tensors[name].pieces[0].path} and {file}; remove one of the two."
                )
            tensors[name] = tensor
        if len(tensors) > MAX_TENSORS:
            raise CheckpointFormatError(f"{file} is refused: with it there are more than {MAX_TENSORS:,} tensors.")
    return tensors


def _open_hub(path: Path) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    """Tensors and files behind a weight file or the index of several."""
    if path.suffix != ".json":
        return open_files([path]), (path,)
    weight_map = _weight_map(path)
    files = tuple(path.parent / name for name in sorted(set(weight_map.values())))
    if len(files) > MAX_FILES:
        raise CheckpointFormatError(f"{path} is refused: it names {len(files):,} files; the limit is {MAX_FILES:,}.")
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointIncompleteError(
            f"{path} names {len(files)} files, of which {len(missing)} are missing: {listed(missing)}. Fetch them."
        )
    tensors = open_files(files)
    places = {name: tensor.pieces[0].path.name for name, tensor in tensors.items()}
    if lost := [f"{name} ({file})" for name, file in weight_map.items() if places.get(name) != file]:
        raise CheckpointIncompleteError(
            f"{path} names {len(lost)} tensors that their files do not hold: {listed(lost)}. Index and files are not "
            "from one save; fetch all of them again."
        )
    return tensors, files


def _open_file(path: Path) -> dict[str, LazyTensor]:
    if path.suffix == ".bin":
        return open_state_dict(path)
    if path.suffix != ".safetensors":
        raise CheckpointFormatError(f"{path} is neither a .safetensors nor a .bin file.")
    header = read_header(path)
    if SHARDING_INFO in header.metadata:
        raise CheckpointFormatError(
            f"{path} is one rank's part of a distributed checkpoint; open the directory with all of them instead."
        )
    return {
        name: LazyTensor(name, dtype, shape, (Piece(path, Box.whole(shape), start, stop, identity=header.identity),))
        for name, (dtype, shape, start, stop) in header.tensors.items()
    }


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file such as config.json; CheckpointFormatError if there is no such file or object.

    It is refused too if it has more than ``max_bytes``, an integer of more than 64 bits, or a name twice.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(max_bytes + 1)
            require_within(max_bytes, max(len(raw), os.fstat(file.fileno()).st_size), "bytes")
            content = parse_json(raw)
    except FileNotFoundError:
        raise CheckpointFormatError(f"{path.parent} holds no {path.name}.") from None
    except OSError as error:
        raise CheckpointFormatError(f"{path} cannot be read: {error.strerror}.") from error
    except BudgetError as error:
        raise CheckpointFormatError(f"{path} is refused: {error}.") from error
    except UnicodeError:
        raise CheckpointFormatError(f"{path} is not valid JSON: it is not UTF-8.") from None
    except ValueError as error:
        if isinstance(error, CheckpointFormatError):
            raise
        raise CheckpointFormatError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path} holds a {type(content).__name__} where an object is expected.")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointFormatError(f"{index} has no weight_map.")
    for file in weight_map.values():
        # A file name with a directory part could point outside of the checkpoint.
        is_name = isinstance(file, str) and Path(file).name == file and len(file.encode()) <= MAX_NAME_LENGTH
        if not is_name or "\0" in file or not file.endswith((".safetensors", ".bin")):
            raise CheckpointFormatError(f"{index} names {shown(file)}, which is not the name of a weight file.")
    return weight_map
