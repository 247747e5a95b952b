"""All ranks and stages as one set of shards, or what does not fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from hf_megatron.checkpoint import DTYPES, LazyTensor, listed
from hf_megatron_conversion.formats.megatron_lm.arguments import Arguments
from hf_megatron_conversion.formats.megatron_lm.names import split_layer
from hf_megatron_conversion.formats.megatron_lm.pickled import value_of
from hf_megatron_conversion.formats.megatron_lm.ranks import Rank

_VERSIONS = (0.0, 1.0, 2.0, 3.0)
# Of the arguments those that would show that the files are not of one model.
_COMPARED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "layernorm_epsilon",
    "norm_epsilon",
    "openai_gelu",
    "onnx_safe",
    "bias_gelu_fusion",
    "apply_residual_connection_post_layernorm",
    "tensor_model_parallel_size",
    "model_parallel_size",
    "pipeline_model_parallel_size",
)

Shards = dict[str, list[LazyTensor]]
"""Megatron's tensors by name, each as one shard per tensor rank."""


def common(ranks: Sequence[Rank], problems: list[str]) -> tuple[float, Arguments | None]:
    """``checkpoint_version`` (0 if absent) and arguments, on which all of at least one rank have to agree.

    ``problems`` is extended by what they do not agree on or what is not known.
    """
    for what, values in (
        ("checkpoint_version", [rank.version for rank in ranks]),
        ("iteration", [rank.iteration for rank in ranks]),
    ):
        if len(counts := Counter(map(value_of, values))) > 1:
            said = ", ".join(f"{value} in {count} files" for value, count in counts.most_common(5))
            problems.append(f"the ranks are not of one save: {what} is {said}")
    known = [rank.arguments for rank in ranks if rank.arguments is not None]
    for name in _COMPARED:
        if len(stated := {value_of(arguments.get(name)) for arguments in known}) > 1:
            problems.append(f"the ranks are not of one save: {name} is {' and '.join(sorted(stated))}")
    if unmapped := list(dict.fromkeys(name for rank in ranks for name in rank.unmapped)):
        problems.append(f"{len(unmapped)} stored names are not known: {listed(unmapped)}")
    version = 0.0
    for rank in ranks:
        stored = 0 if rank.version is None else rank.version
        if isinstance(stored, (int, float)) and not isinstance(stored, bool) and stored in _VERSIONS:
            version = float(stored)
        else:
            problems.append(f"checkpoint_version={value_of(stored)} is not known (absent, 0, 1.0, 2.0, 3.0)")
    return version, known[0] if known else None


def merged_stages(ranks: Mapping[tuple[int, int], Rank], problems: list[str]) -> Shards:
    """The tensors of all stages with their layers counted through: chunk by chunk, and in a chunk stage by stage.

    ``problems`` is extended by what the ranks of a stage do not have alike.
    """
    shards: Shards = {}
    first_layer = 0
    for chunk in range(max(len(rank.chunks) for rank in ranks.values())):
        for stage in sorted({pp for _, pp in ranks}):
            group = [rank for (_, pp), rank in sorted(ranks.items()) if pp == stage and chunk < len(rank.chunks)]
            merged = _alike(group, chunk, problems)
            layers = [layer for layer, _ in map(split_layer, merged) if layer is not None]
            for name, tensors in merged.items():
                layer, rest = split_layer(name)
                counted = name if layer is None else f"layers.{first_layer + layer}.{rest}"
                if counted in shards:
                    problems.append(f"{counted} is stored in two pipeline stages")
                shards[counted] = tensors
            first_layer += max(layers, default=-1) + 1
    return shards


def _alike(group: Sequence[Rank], chunk: int, problems: list[str]) -> Shards:
    """The shards of a stage; every rank has to have the same names, shapes and dtypes."""
    names = dict.fromkeys(name for rank in group for name in rank.chunks[chunk])
    merged: Shards = {}
    lacking: dict[str, list[str]] = {}
    differing = []
    for name in names:
        tensors = {rank.tp: rank.chunks[chunk][name] for rank in group if name in rank.chunks[chunk]}
        if without := [str(rank.tp) for rank in group if rank.tp not in tensors]:
            lacking.setdefault(listed(without), []).append(name)
        kinds = {tp: f"{DTYPES[tensor.dtype][1]} {list(tensor.shape)}" for tp, tensor in tensors.items()}
        if len(set(kinds.values())) > 1:
            differing.append(f"{name} is " + listed([f"{kind} on rank {tp}" for tp, kind in kinds.items()]))
        merged[name] = list(tensors.values())
    problems += [f"missing in rank {ranks}: {listed(tensors)}" for ranks, tensors in lacking.items()]
    if differing:
        problems.append(f"{len(differing)} tensors differ between ranks: {listed(differing, '; ')}")
    return merged
