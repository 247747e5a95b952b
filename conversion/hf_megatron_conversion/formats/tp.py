"""``tp``: transformers' own distributed checkpoint, one file of contiguous boxes per tensor-parallel rank.

Source: ``HuggingFaceStorageWriter`` in ``torch.distributed.checkpoint.hf_storage``, as ``save_pretrained(...,
distributed_checkpoint=True)`` uses it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hf_megatron.checkpoint import SHARDING_INFO, LazyTensor
from hf_megatron.checkpoint.sharded import is_shard
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.files import CopiedFile, OutputFile, Part, SafetensorsFile
from hf_megatron_conversion.formats import FormatName
from hf_megatron_conversion.formats.base import Model, ModelType, SourceOptions, Target, read_transformers_directory


class TpFormat:
    """``shard-0000R-model-00001-of-00001.safetensors`` for each rank; the metadata says where each box starts."""

    name: FormatName = "tp"
    default_model_type: ModelType = "megatron"
    is_cut = True
    has_config = True

    def recognises(self, directory: Path) -> bool:
        return directory.is_dir() and any(is_shard(path) for path in directory.iterdir())

    def read(self, directory: Path, given: SourceOptions) -> Model:
        return read_transformers_directory(directory, given)

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        """One file per rank; what is not cut lies in the first one only, as a distributed save keeps one copy."""
        if target.max_shard_size is not None:
            raise UnsupportedError("max_shard_size is for hub directories; a tp directory has one file per rank.")
        model = target.model
        parts: list[list[Part]] = [[] for _ in range(target.tp_size)]
        for name, tensor in target.tensors.items():
            boxes = model.table.spec_of(name).stored_boxes(tensor.shape, target.tp_size)
            for rank, box in enumerate(boxes):
                parts[rank].append(Part(name, tensor, box))
        if model.format == self.name and model.is_canonical and _is_cut_like(parts):
            return [CopiedFile.of(path) for path in model.files]
        return [_shard(rank, of_rank) for rank, of_rank in enumerate(parts, start=1)]


def _is_cut_like(parts: Sequence[Sequence[Part]]) -> bool:
    """Whether the source's files hold exactly these boxes, uncast."""
    wanted = {(part.name, part.box) for of_rank in parts for part in of_rank}
    tensors = {part.name: part.tensor for of_rank in parts for part in of_rank}
    stored = {
        (name, piece.box)
        for name, tensor in tensors.items()
        if isinstance(tensor, LazyTensor)
        for piece in tensor.pieces
    }
    return stored == wanted


def _shard(number: int, parts: Sequence[Part]) -> SafetensorsFile:
    offsets = {part.name: {"saved_offsets": list(part.box.offset)} for part in parts}
    return SafetensorsFile(
        f"shard-{number:05d}-model-00001-of-00001.safetensors",
        parts,
        {"format": "pt", "DCP_VERSION": "1.0", SHARDING_INFO: json.dumps(offsets)},
        alignment=64,  # a rank's weights can stay in its file then; see hf_megatron.checkpoint.mapping
    )
