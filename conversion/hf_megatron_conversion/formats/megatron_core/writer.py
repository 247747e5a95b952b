"""Lay out a stock model as a checkpoint of Megatron-core's GPTModel or BertModel, for Megatron-LM.

It is a ``release``, so that Megatron-LM starts from the weights without asking for an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_megatron.checkpoint import DTYPES
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.files import OutputFile, TextFile
from hf_megatron_conversion.formats.base import Target
from hf_megatron_conversion.formats.megatron_core.index import Chunk, Record, StoredObject, index
from hf_megatron_conversion.formats.megatron_core.layout import (
    EXTRA_STATE,
    HEAD,
    NO_STATE,
    body_of,
    name_in_layer,
    name_outside,
    states_in_layer,
)
from hf_megatron_conversion.formats.megatron_lm.export import core_arguments_of, require_expressible
from hf_megatron_conversion.formats.megatron_lm.layout import Layout
from hf_megatron_conversion.formats.megatron_lm.names import split_layer
from hf_megatron_conversion.memory import parse_size
from hf_megatron_conversion.tensors import Readable, Reshaped
from hf_megatron_conversion.torch_zip import ArchivesFile, torch_file

_RELEASE = TextFile("latest_checkpointed_iteration.txt", b"release")
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}
_MAX_FILE_SIZE = "5GB"


def megatron_core_files(target: Target) -> Sequence[OutputFile]:
    """The files of the container that is asked for, and the one that names the release.

    Raises:
        UnsupportedError: The model has something that Megatron-core has not; everything is listed.
        PartitionError: The degree does not divide the heads, or the MLP's size.
    """
    require_expressible(target.model, target.tensors, is_core=True)
    layout = Layout(target)
    common = {"args": core_arguments_of(target, layout), "checkpoint_version": 3.0, "iteration": 0}
    if target.container == "torch":
        return [_RELEASE, *_rank_files(target, layout, common)]
    return [_RELEASE, *_distributed_files(target, layout, common)]


def _distributed_files(target: Target, layout: Layout, common: dict[str, Any]) -> Iterator[OutputFile]:
    """The container ``torch_dist``: records in several files, and an index of them."""
    largest, size = parse_size(target.max_shard_size or _MAX_FILE_SIZE, "max_shard_size"), 0
    groups: list[list[Record]] = [[]]
    for record in _records(target, layout):
        size += record.archive.nbytes
        if size > largest and groups[-1]:
            groups.append([])
            size = record.archive.nbytes
        groups[-1].append(record)
    files = [(f"__0_{number}.distcp", group) for number, group in enumerate(groups)]
    for name, group in files:
        yield ArchivesFile(f"release/{name}", [record.archive for record in group])
    yield torch_file("release/common.pt", common)
    yield TextFile("release/.metadata", index(files))
    backends = _BACKENDS | {f"{name}_version": 1 for name in _BACKENDS}
    yield TextFile.json("release/metadata.json", backends)


def _records(target: Target, layout: Layout) -> Iterator[Record]:
    """Every tensor whole, those of the layers stacked, and all extra state that any version of Megatron-core asks for.

    The names are Transformer Engine's whatever the model is made of, and what it does not ask for is ignored.
    """
    table, body = target.model.table, body_of(target.model.table)
    num_layers = table.sizes(target.model.config)["num_hidden_layers"]
    dtypes: dict[str, str] = {}
    for name, tensor in layout.tensors(0):
        layer, rest = split_layer(name)
        if layer is None:
            key, size, offset = name_outside(name, body), tensor.shape, (0,) * len(tensor.shape)
            yield Chunk(key=key, tensor=tensor, size=size, offset=offset)
        else:
            key = f"{body}.layers.{name_in_layer(rest, 'transformer_engine')}"
            if dtypes.setdefault(key, tensor.dtype) != tensor.dtype:
                raise UnsupportedError(
                    f"{name} is {DTYPES[tensor.dtype][1]} and that of another layer {DTYPES[dtypes[key]][1]}: in the "
                    "container torch_dist the layers are one tensor. Convert to one dtype, with --dtype, or into the "
                    "container torch."
                )
            size, offset = (num_layers, *tensor.shape), (layer, *[0] * len(tensor.shape))
            yield Chunk(key=key, tensor=_of_stack(tensor), size=size, offset=offset)
    states = {f"{body}.layers.{module}": num_layers for module in states_in_layer("transformer_engine")}
    states[f"{body}.final_layernorm"] = 1
    if not table.is_causal:  # of which GPTModel does not ask for the output layer's
        states["output_layer"] = 1
    for module, count in states.items():
        for number in range(count):
            yield StoredObject(key=f"{module}.{EXTRA_STATE}", content=NO_STATE, number=number, count=count)


def _of_stack(tensor: Readable | Reshaped) -> Reshaped:
    """One layer's tensor as a part of all layers': with a dimension of 1 before the others."""
    return Reshaped(tensor.tensor if isinstance(tensor, Reshaped) else tensor, (1, *tensor.shape))


def _rank_files(target: Target, layout: Layout, common: dict[str, Any]) -> Iterator[OutputFile]:
    """The container ``torch``: one file per tensor rank and pipeline stage, in which layers are counted from 0."""
    if target.max_shard_size is not None:
        raise UnsupportedError(
            "max_shard_size is for hub directories and the container torch_dist; the container torch has one file per "
            "rank."
        )
    for rank in range(target.tp_size):
        for stage, model in enumerate(_stages(target, layout, rank)):
            directory = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if target.pp_size > 1 else "")
            yield torch_file(f"release/{directory}/model_optim_rng.pt", {**common, "model": model})


def _stages(target: Target, layout: Layout, rank: int) -> list[dict[str, Any]]:
    """Of each stage what a rank's file has under ``model``."""
    body, impl = body_of(target.model.table), target.transformer_impl
    layers = target.model.table.sizes(target.model.config)["num_hidden_layers"] // target.pp_size
    stages: list[dict[str, Any]] = [{} for _ in range(target.pp_size)]
    first, last = stages[0], stages[-1]
    tensors = dict(layout.tensors(rank))
    for name, tensor in tensors.items():
        layer, rest = split_layer(name)
        if layer is not None:
            key = f"{body}.layers.{layer % layers}.{name_in_layer(rest, impl)}"
            stages[layer // layers][key] = tensor
        else:
            key = name_outside(name, body)
            (first if key.startswith("embedding.") else last)[key] = tensor
    if target.pp_size > 1 and HEAD not in last:
        last[HEAD] = tensors["word_embeddings.weight"]
    is_local = impl == "local"
    for stage in stages:
        modules = [f"{body}.layers.{layer}.{module}" for layer in range(layers) for module in states_in_layer(impl)]
        modules += [f"{body}.final_layernorm"] if stage is last and not is_local else []
        stage |= {f"{module}.{EXTRA_STATE}": None if is_local else NO_STATE for module in modules}
    last[f"output_layer.{EXTRA_STATE}"] = None  # Megatron-core's own layer with either implementation
    return stages
