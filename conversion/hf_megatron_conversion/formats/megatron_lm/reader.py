"""Read a Megatron checkpoint, of whatever container, as one stock model, or say everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_megatron.architectures import Architecture, ModelClass, Tensor
from hf_megatron.checkpoint import DTYPES, LazyTensor, listed
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError
from hf_megatron_conversion.formats import Container
from hf_megatron_conversion.formats.base import Model
from hf_megatron_conversion.formats.megatron_lm.arguments import (
    Arguments,
    architecture_of,
    megatron_of,
    stored_layers,
    unsupported,
)
from hf_megatron_conversion.formats.megatron_lm.config import DetectedModel, ExternalFacts, config_of
from hf_megatron_conversion.formats.megatron_lm.merge import fused_qkv, joined, one_of_qkv
from hf_megatron_conversion.formats.megatron_lm.names import COLUMN, ROW, VOCABULARY, megatron_names, split_layer
from hf_megatron_conversion.formats.megatron_lm.ranks import iteration_directory, open_ranks
from hf_megatron_conversion.formats.megatron_lm.stages import Shards, common, merged_stages
from hf_megatron_conversion.formats.megatron_lm.views import Filled, transposed
from hf_megatron_conversion.tensors import Readable, have_same_bytes

_WORDS, _POSITIONS, _TOKEN_TYPES = (f"{kind}_embeddings.weight" for kind in ("word", "position", "tokentype"))
_HEAD, _HEAD_COPY = "output_layer.weight", "word_embeddings_for_head.weight"
_FIRST_QKV, _FIRST_UP = (f"layers.0.{name}" for name in COLUMN if name.endswith(".weight"))
_SECOND_HEAD = ("pooler.dense.weight", "pooler.dense.bias", "binary_head.weight", "binary_head.bias")


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A Megatron-LM checkpoint as it is stored."""

    config: dict[str, Any]  # a config.json of the stock library
    table: Architecture
    model_class: ModelClass
    version: float  # checkpoint_version, 0 if absent
    shards: Shards  # Megatron's tensors, layers counted through all stages
    arguments: Arguments | None  # Megatron's training arguments
    is_core: bool  # whether Megatron-core saved it


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the files of a checkpoint hold, before anything is made of it."""

    place: Path  # the directory of one iteration
    shards: Shards  # one per tensor rank, or a single one that is the whole tensor; layers counted through all stages
    tp_size: int  # the degree it was saved at
    is_core: bool  # whether the names are Megatron-core's
    files: Sequence[Path]
    version: float = 3.0  # checkpoint_version, 0 if absent
    arguments: Arguments | None = None  # Megatron's training arguments
    container: Container | None = None  # of Megatron-core's tensors
    core_version: str | None = None  # of Megatron-core, as far as it can be told
    archives: Mapping[Path, Sequence[tuple[int, int]]] = field(default_factory=dict)  # as Model has it
    problems: list[str] = field(default_factory=list)  # what is wrong with them


def open_megatron_lm(directory: Path, given: ExternalFacts) -> Model:
    """Open a checkpoint of one file per rank as a stock model; nothing but the pickles in its files is read.

    Raises:
        CheckpointError: It is incomplete, damaged, of an unknown version, unsafe, or of a model that the stock classes
            do not have; one message lists everything that was found.
    """
    place = iteration_directory(directory)
    problems: list[str] = []
    ranks = open_ranks(place, problems)
    if not ranks:
        raise _refusal(place, problems)
    version, arguments = common(list(ranks.values()), problems)
    is_core = any(rank.is_core for rank in ranks.values())
    stored = Stored(
        place=place,
        shards=merged_stages(ranks, problems),
        tp_size=1 + max(tp for tp, _ in ranks),
        is_core=is_core,
        files=[rank.path for rank in ranks.values()],
        version=version,
        arguments=arguments,
        container="torch" if is_core else None,
        problems=problems,
    )
    return stock_model(directory, stored, given)


def stock_model(directory: Path, stored: Stored, given: ExternalFacts) -> Model:
    """What is stored in ``directory`` as a stock model; raises as :func:`open_megatron_lm` does."""
    arguments, problems, place = stored.arguments, stored.problems, stored.place
    problems += unsupported(arguments or {})
    found = _found(stored, arguments or {}, problems)
    if problems or found is None:
        raise _refusal(place, problems)
    config, table, has_known_vocab_size = config_of(found, arguments, given, problems)
    if problems:
        raise _refusal(place, problems)
    model_class = table.model_class(config["architectures"][0])
    shards = _each_layer(stored.shards, arguments or {})
    assembly = _Assembly(shards, config, table, stored.version, problems)
    tensors = assembly.tensors(table.tensors(config, model_class))
    dropped = _left_over(shards, assembly.used, config["vocab_size"], problems, table)
    if problems:
        raise _refusal(place, problems)
    return Model(
        directory=directory,
        format="megatron-core" if stored.is_core else "megatron-lm",
        config=config,
        table=table,
        model_class=model_class,
        tensors=tensors,
        tp_size=found.tp_size,
        files=stored.files,
        dropped=dropped,
        checkpoint_version=stored.version,
        container=stored.container,
        core_version=stored.core_version,
        archives=stored.archives,
        has_known_vocab_size=has_known_vocab_size,
        # Where generation stops, null if nobody knows it.
        generation_config={n: config[n] for n in ("bos_token_id", "eos_token_id")} if table.is_causal else None,
        opened=MegatronCheckpoint(config, table, model_class, stored.version, shards, arguments, stored.is_core),
    )


def _refusal(directory: Path, problems: Sequence[str]) -> CheckpointError:
    kind = CheckpointIncompleteError if any("missing" in problem for problem in problems) else CheckpointFormatError
    lines = "\n  ".join(dict.fromkeys(problems))
    return kind(f"{directory} cannot be read as a Megatron-LM checkpoint:\n  {lines}")


def _found(stored: Stored, arguments: Arguments, problems: list[str]) -> DetectedModel | None:
    """What the tensors show; None if those that show it are not there."""
    shards = stored.shards
    table = architecture_of(shards, arguments, problems, is_core=stored.is_core)
    needed = (_WORDS, _POSITIONS, _FIRST_QKV, _FIRST_UP)
    if missing := [name for name in needed if name not in shards or len(shards[name][0].shape) != 2]:
        problems.append(f"missing: {listed(missing)}")
        return None
    words, positions, qkv, up = (shards[name][0].shape for name in needed)
    parts, hidden = 1 if stored.container == "torch_dist" else stored.tp_size, words[1]
    if qkv[0] * parts != 3 * hidden:
        problems.append(
            f"{_FIRST_QKV} has {qkv[0]} rows on each of {parts} ranks, where {3 * hidden} are needed in all: ranks "
            "are missing, or heads share their keys"
        )
    count = 1 + max(layer for layer, _ in map(split_layer, shards) if layer is not None)
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": len(stored_layers(arguments, count)),
        "num_positions": positions[0],
        "intermediate_size": up[0] * parts,
    }
    if _TOKEN_TYPES in shards:
        sizes["num_token_types"] = shards[_TOKEN_TYPES][0].shape[0]
    return DetectedModel(
        table=table,
        is_core=stored.is_core,
        sizes=sizes,
        padded_vocab_size=words[0] * parts,
        tp_size=stored.tp_size,
        has_binary_head="binary_head.weight" in shards,
        is_tied=(megatron_of(table).ties_head and not stored.is_core) or _is_tied(shards, arguments),
        dtype=DTYPES[shards[_WORDS][0].dtype][1],
    )


def _is_tied(stored: Shards, arguments: Arguments) -> bool:
    untied = arguments.get("untie_embeddings_and_output_weights")
    if isinstance(untied, bool):
        return not untied
    return _HEAD not in stored or _have_same_words(stored[_HEAD], stored)


def _each_layer(stored: Shards, arguments: Arguments) -> Shards:
    """The shards of every layer, also where several share what is stored once."""
    layers: dict[int, Shards] = {}
    shards: Shards = {}
    for name, tensors in stored.items():
        layer, rest = split_layer(name)
        (shards if layer is None else layers.setdefault(layer, {}))[rest] = tensors
    for layer, source in enumerate(stored_layers(arguments, max(layers) + 1)):
        shards |= {f"layers.{layer}.{rest}": tensors for rest, tensors in layers.get(source, {}).items()}
    return shards


def _left_over(shards: Shards, used: set[str], vocab_size: int, problems: list[str], table: Architecture) -> list[str]:
    """Names of what the model does not need; anything but copies of the embedding and a second head is a problem."""
    dropped, surplus = [], []
    for name in sorted(set(shards) - used):
        is_copy = name in (_HEAD, _HEAD_COPY)
        if (
            is_copy
            and not (megatron_of(table).ties_head and name == _HEAD)
            and not _have_same_words(shards[name], shards, vocab_size)
        ):
            problems.append(f"{name} should be a copy of {_WORDS}, and differs from it")
        elif is_copy or name in _SECOND_HEAD:
            dropped.append(name)
        else:
            surplus.append(name)
    if surplus:
        problems.append(f"not a part of the model: {listed(surplus)}")
    return dropped


def _have_same_words(head: Sequence[LazyTensor], stored: Shards, vocab_size: int | None = None) -> bool:
    """Whether a head has the values of the word embedding, up to the padding."""
    if {shard.shape[1:] for shard in head} != {shard.shape[1:] for shard in stored[_WORDS]}:
        return False
    a, b = (joined(shards, 0, vocab_size) for shards in (head, stored[_WORDS]))
    return have_same_bytes(a, b)


class _Assembly:
    """Full tensors of the stock model from Megatron's shards; ``used`` are the names of those that were needed."""

    def __init__(
        self, shards: Shards, config: Mapping[str, Any], table: Architecture, version: float, problems: list[str]
    ) -> None:
        self.used: set[str] = set()
        self._shards, self._table, self._version, self._problems = shards, table, version, problems
        self._sizes = table.sizes(config)
        self._head_dim = self._sizes["hidden_size"] // self._sizes["num_attention_heads"]

    def tensors(self, expected: Mapping[str, Tensor]) -> dict[str, Readable]:
        """Every tensor of the model by its stock name; those that cannot be had are problems."""
        names = megatron_names(self._table, expected, self._sizes["num_hidden_layers"])
        result: dict[str, Readable] = {}
        missing: dict[str, None] = {}
        unexpected = []
        for stock, name in names.items():
            shape = expected[stock].shape
            tensor = self._tensor(stock, name, shape)
            if tensor is None:
                missing[name] = None
            elif tensor.shape != shape:
                unexpected.append(f"{name} is {list(tensor.shape)} in all, expected {list(shape)}")
            else:
                result[stock] = tensor
        if missing:
            self._problems.append(f"missing: {listed(list(missing))}")
        if unexpected:
            self._problems.append(listed(unexpected))
        return result

    def _tensor(self, stock: str, name: str, shape: tuple[int, ...]) -> Readable | None:
        """The full tensor in the stock model's layout."""
        shards = self._shards.get(name)
        if shards is None and name == _TOKEN_TYPES:
            # Megatron's BERT without the second head adds no token types; rows of zeros do not either.
            return Filled(self._shards[_WORDS][0].dtype, shape)
        if shards is None or any(len(shard.shape) != len(shape) for shard in shards):
            return None
        self.used.add(name)
        layer, rest = split_layer(name)
        if layer is None:
            limit = self._sizes["vocab_size"] if name in VOCABULARY else None
            return joined(shards if name in VOCABULARY else shards[:1], 0, limit)
        rule = self._table.rule_of(stock)
        if rule.qkv is not None:
            full = one_of_qkv(shards, rule.qkv, self._head_dim, self._version)
        elif rest.startswith("self_attention.query_key_value"):
            full = fused_qkv(shards, self._head_dim, self._version)
        elif rest in COLUMN:
            full = joined(shards, 0)
        else:
            full = joined(shards, 1) if rest in ROW else joined(shards[:1], 0)
        return transposed(full) if rule.is_transposed else full
