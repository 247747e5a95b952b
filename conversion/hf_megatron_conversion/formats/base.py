"""What a format is: it reads a directory into a ``Model``, and lays out the weight files of a ``Target``.

Between the two stand nothing but the tensors of the model under their canonical names (those of the stock model's
state dict), each readable by slices. Formats therefore know nothing of each other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from hf_megatron.architectures import Architecture, ModelClass, table_for
from hf_megatron.checkpoint import model_class_of, open_checkpoint, read_header, require_complete, stored_model
from hf_megatron.errors import UnsupportedError
from hf_megatron_conversion.files import OutputFile
from hf_megatron_conversion.formats import Container, FormatName, TransformerImpl
from hf_megatron_conversion.tensors import Readable

_logger = logging.getLogger(__name__)

ModelType = Literal["stock", "megatron"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What is known of a checkpoint from outside of its directory."""

    config: Mapping[str, Any] | None = None  # a config.json from the user, which takes the place of the directory's
    # The config.json of a checkpoint that should be the same model; it fills in what is not known otherwise.
    hint: Mapping[str, Any] | None = None
    vocab_size: int | None = None  # without padding
    tokenizer: Path | None = None  # its directory
    is_only_described: bool = False  # whether no tensor will be read: what only matters for that may be unknown


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint, opened: what model it is, and its tensors, none of which has been read."""

    directory: Path
    format: FormatName
    config: Mapping[str, Any]  # its config.json
    table: Architecture
    model_class: ModelClass
    tensors: Mapping[str, Readable]  # exactly those of the class, under their canonical names
    tp_size: int  # number of pieces its word embedding is cut into
    files: Sequence[Path]  # its weight files
    dropped: Sequence[str] = ()  # names of stored tensors that the model does not need
    # Whether the weight files hold exactly `tensors` under these names, as this package would write them, so that they
    # may be taken over as they are.
    is_canonical: bool = False
    checkpoint_version: float | None = None  # of formats that have one
    container: Container | None = None  # of Megatron-core's tensors
    core_version: str | None = None  # of Megatron-core, as far as it can be told: "0.14 to 0.18"
    has_known_vocab_size: bool = True  # False if the last rows of the vocabulary may be padding; they are kept
    generation_config: Mapping[str, Any] | None = None  # where the directory has no file that says so
    # Where files of torch.save lie in larger files, as (first byte, length): their CRCs are checked.
    archives: Mapping[Path, Sequence[tuple[int, int]]] = field(default_factory=dict)
    opened: object | None = None  # what the reader found, of formats whose models are run without being converted


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is to be written."""

    model: Model  # the source
    tensors: Mapping[str, Readable]  # cast if need be
    tp_size: int  # which fits the model; 1 for a format that is not cut
    pp_size: int = 1  # pipeline stages
    container: Container = "torch_dist"  # for Megatron-core
    transformer_impl: TransformerImpl = "transformer_engine"  # for Megatron-core
    max_shard_size: str | int | None = None  # largest size of a weight file ("5GB", or bytes)

    @property
    def is_cast(self) -> bool:
        """Whether any tensor changes its dtype."""
        return any(tensor is not self.model.tensors[name] for name, tensor in self.tensors.items())


class Format(Protocol):
    """A checkpoint format."""

    name: FormatName  # on the command line
    default_model_type: ModelType  # whose model_type a directory of this format carries unless asked otherwise
    is_cut: bool  # whether it is written for a tensor-parallel degree; of Megatron-core, in the container ``torch``
    has_config: bool  # whether a config.json in its directories says what model they hold; if not, it is worked out

    def recognises(self, directory: Path) -> bool:
        """Whether the directory is of this format, by the names of its files."""

    def read(self, directory: Path, given: SourceOptions) -> Model:
        """Open a directory of this format."""

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        """Lay out the weight files (and their index)."""


def warn_of_padding(model: Model) -> None:
    """Say so if padding may count as vocabulary."""
    if not model.has_known_vocab_size:
        _logger.warning(
            "Nothing says how much of the vocabulary of %d is padding, so all of it is kept; --vocab-size or "
            "--tokenizer would.",
            model.config["vocab_size"],
        )


def read_transformers_directory(directory: Path, given: SourceOptions) -> Model:
    """Open a directory in one of the two formats that are transformers' own, which hold no padding."""
    checkpoint = open_checkpoint(directory, given.config)
    table = table_for(checkpoint.config)
    vocab_size = table.sizes(checkpoint.config)["vocab_size"]
    if given.vocab_size not in (None, vocab_size):
        raise UnsupportedError(
            f"vocab_size={given.vocab_size} was given, but config.json of {directory} says {vocab_size}, and only "
            "Megatron-LM directories hold padding to be removed."
        )
    model_class, canonical = stored_model(checkpoint.tensors, table, checkpoint.config)
    require_complete(canonical)
    if model_class is not model_class_of(table, checkpoint.config):
        named = checkpoint.config.get("architectures")
        message = "%s is taken for a %s, which is all that is stored; config.json says %s."
        _logger.warning(message, directory, model_class.stock, named)
    return Model(
        directory=directory,
        format=checkpoint.format,
        config=checkpoint.config,
        table=table,
        model_class=model_class,
        tensors=canonical.tensors,
        tp_size=checkpoint.tp_size,
        files=checkpoint.files,
        dropped=canonical.dropped,
        is_canonical=set(canonical.tensors) == set(checkpoint.tensors) and _loads_in_transformers(checkpoint.files),
    )


def _loads_in_transformers(files: Sequence[Path]) -> bool:
    """Whether all are safetensors files that say, as transformers asks for, that they hold torch tensors."""
    return all(file.suffix == ".safetensors" and read_header(file).metadata.get("format") == "pt" for file in files)
