"""``hub``: the directory of a stock model, as ``save_pretrained`` writes it and the Hub keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import prod
from pathlib import Path

from hf_megatron.checkpoint import itemsize, read_json
from hf_megatron.partition import Box
from hf_megatron_conversion.files import CopiedFile, OutputFile, Part, SafetensorsFile, TextFile
from hf_megatron_conversion.formats import FormatName
from hf_megatron_conversion.formats.base import Model, ModelType, SourceOptions, Target, read_transformers_directory
from hf_megatron_conversion.memory import parse_size
from hf_megatron_conversion.tensors import Readable

_INDEX = "model.safetensors.index.json"
# save_pretrained's own default in transformers 5.23.
_MAX_SHARD_SIZE = "50GB"


class HubFormat:
    """Whole tensors in ``model.safetensors``, or in several such files and an index."""

    name: FormatName = "hub"
    default_model_type: ModelType = "stock"
    is_cut = False
    has_config = True

    def recognises(self, directory: Path) -> bool:
        return True  # what is no other format is read as this one, whose reader says what is wrong

    def read(self, directory: Path, given: SourceOptions) -> Model:
        return read_transformers_directory(directory, given)

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        """One file, or several and their index, cut where ``save_pretrained`` would cut them."""
        model = target.model
        if model.format == self.name and model.is_canonical and not target.is_cast and target.max_shard_size is None:
            kept = _loadable(model)
            if kept:
                return [CopiedFile.of(path) for path in kept]
        weight_map, total_size = _split(target.tensors, target.max_shard_size or _MAX_SHARD_SIZE)
        names = sorted(set(weight_map.values()))
        files: list[OutputFile] = [
            SafetensorsFile(
                name,
                [
                    Part(tensor_name, tensor, Box.whole(tensor.shape))
                    for tensor_name, tensor in target.tensors.items()
                    if weight_map[tensor_name] == name
                ],
                {"format": "pt"},
            )
            for name in names
        ]
        if len(names) > 1:
            parameters = sum(prod(tensor.shape) for tensor in target.tensors.values())
            metadata = {"total_parameters": parameters, "total_size": total_size}
            files.append(TextFile.json(_INDEX, {"metadata": metadata, "weight_map": weight_map}))
        return files


def _loadable(model: Model) -> list[Path]:
    """The source's weight files and their index, if stock transformers loads them as they are; else none."""
    if [path.name for path in model.files] == ["model.safetensors"]:
        return list(model.files)
    index = model.directory / _INDEX
    is_whole = index.is_file() and isinstance(read_json(index).get("metadata"), dict)
    return [*model.files, index] if is_whole else []


def _split(tensors: Mapping[str, Readable], max_shard_size: str | int) -> tuple[dict[str, str], int]:
    """File name of each tensor, and the bytes of all of them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in _layer_by_layer(tensors)},
        get_storage_size=lambda tensor: prod(tensor.shape) * itemsize(tensor.dtype),
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size, "max_shard_size"),
    )
    return split.tensor_to_filename, split.metadata["total_size"]


def _layer_by_layer(names: Iterable[str]) -> Iterator[str]:
    """The names in the order of the stock state dict; the table has them rule by rule."""

    def layer(name: str) -> int:
        number = re.search(r"\.(\d+)\.", name)
        return -1 if number is None else int(number[1])

    for _, group in groupby(names, key=lambda name: layer(name) >= 0):
        yield from sorted(group, key=layer)
