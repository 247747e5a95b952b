"""What a conversion will write, computed from headers alone. This is all that a dry run does."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from hf_megatron.architectures import Architecture
from hf_megatron.checkpoint import DTYPES
from hf_megatron.errors import CheckpointFormatError, PartitionError, UnsupportedError
from hf_megatron_conversion.card import model_card
from hf_megatron_conversion.files import CopiedFile, OutputFile, TextFile
from hf_megatron_conversion.formats import Container, FormatName, TransformerImpl, format_named
from hf_megatron_conversion.formats.base import Format, Model, ModelType, Target
from hf_megatron_conversion.memory import parse_size
from hf_megatron_conversion.sha256sums import SHA256SUMS, sums_size
from hf_megatron_conversion.source_files import is_inside
from hf_megatron_conversion.tensors import Readable, cast, dtype_code
from hf_megatron_conversion.tokenizer_files import TOKENIZER_FILES, tokenizer_facts, without_auto_map

_logger = logging.getLogger(__name__)

_GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_OTHER_SIDE_FILES = {_GENERATION_CONFIG, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt"}
# In config.json, what transformers runs with trust_remote_code; it may lie in any repository.
_NAMES_OF_CODE = ("auto_map", "custom_pipelines")
_LEFT_OUT = "%s is left out of %s: it names code that the source brings along, which is not converted."


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for; the names are those of ``convert``'s arguments."""

    to: FormatName
    container: Container | None = None
    tp_size: int | None = None
    pp_size: int | None = None
    transformer_impl: TransformerImpl | None = None
    dtype: str | None = None
    max_shard_size: str | int | None = None
    tokenizer: Path | None = None
    model_type: ModelType | None = None
    verify: bool = False

    @property
    def format(self) -> Format:
        """The format to write."""
        return format_named(self.to, self.container)


@dataclass(frozen=True)
class ConversionPlan:
    """What the destination will hold."""

    files: Sequence[OutputFile]  # in the order of writing; config.json is the last, because without it nothing loads
    tensors: Mapping[str, Readable]  # under canonical names
    container: Container | None  # of a megatron-core directory
    tp_size: int  # 1 if the format is not cut
    pp_size: int
    mismatch: str | None  # what the stock class named in the config.json computes differently

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, that of the checksums included."""
        sizes = {file.path: file.nbytes for file in self.files}
        return {**sizes, SHA256SUMS: sums_size(sizes)}

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def check_options(options: Options, config: Mapping[str, Any], table: Architecture) -> None:
    """Refuse what the configuration alone shows to be impossible, before a weight file is opened."""
    _check_container(options)
    if options.tp_size is not None:
        if not options.format.is_cut:
            raise PartitionError(f"tp_size={options.tp_size} was given, but a {options.to} directory is not cut.")
        table.check_degree(config, options.tp_size)
    if options.pp_size is not None:
        _check_stages(options.pp_size, table.sizes(config)["num_hidden_layers"])
    if options.dtype is not None:
        dtype_code(options.dtype)
    if options.max_shard_size is not None:
        parse_size(options.max_shard_size, "max_shard_size")
    table.check_numerics(config)


def _check_container(options: Options) -> None:
    """Refuse options that are not for the format, or not for the container."""
    names = ("container", "pp_size", "transformer_impl")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.to != "megatron-core":
        if given:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise UnsupportedError(f"{said} was given, which is for megatron-core directories, not for {options.to}.")
        return
    for name, known in (("container", Container), ("transformer_impl", TransformerImpl)):
        if name in given and given[name] not in get_args(known):
            raise UnsupportedError(f"{name}={given[name]!r} is not one of {', '.join(get_args(known))}.")
    cut = [name for name in ("tp_size", "pp_size", "transformer_impl") if getattr(options, name) is not None]
    if cut and not options.format.is_cut:
        said = ", ".join(f"{name}={getattr(options, name)}" for name in cut)
        raise PartitionError(
            f"{said} was given, but in the container torch_dist a megatron-core directory is the same for every degree "
            "and both implementations: Megatron-LM cuts it as it loads. Leave it out, or write the container torch."
        )


def _check_stages(pp_size: int, layers: int) -> None:
    if pp_size < 1 or layers % pp_size:
        fitting = ", ".join(str(number) for number in range(1, layers + 1) if layers % number == 0)
        raise PartitionError(
            f"num_hidden_layers={layers} cannot be divided into pp_size={pp_size} equal stages; choose one of "
            f"{fitting}."
        )


def make_plan(model: Model, options: Options, source_name: str) -> ConversionPlan:
    """Lay out the destination of a conversion of ``model``, which the card calls ``source_name``."""
    target_format = options.format
    code = None if options.dtype is None else dtype_code(options.dtype)
    tensors = {name: cast(name, tensor, code) for name, tensor in model.tensors.items()}
    tp_size = _degree(target_format, model, options.tp_size)
    if not target_format.has_config:
        tokenizer_facts(options.tokenizer or model.directory)  # which whoever reads the result goes by
    target = Target(
        model=model,
        tensors=tensors,
        tp_size=tp_size,
        pp_size=options.pp_size or 1,
        container=options.container or Target.container,
        transformer_impl=options.transformer_impl or Target.transformer_impl,
        max_shard_size=options.max_shard_size,
    )
    model_type = options.model_type or target_format.default_model_type
    config = model.table.config_of(model.config, model.model_class, stock=model_type == "stock")
    if code is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = DTYPES[code][1]
    for key in _NAMES_OF_CODE:
        if config.pop(key, None) is not None:
            _logger.warning(_LEFT_OUT, key, "config.json")
    layout = _described(target, options)
    mismatch = model.table.stock_mismatch(config) if model_type == "stock" and target_format.has_config else None
    files = [
        *target_format.weight_files(target),
        *_side_files(model, options.tokenizer),
        model_card(target, config, source=source_name, layout=layout, verified=options.verify, mismatch=mismatch),
        TextFile.json("config.json", config),
    ]
    container = target.container if options.to == "megatron-core" else None
    return ConversionPlan(files, tensors, container, target.tp_size, target.pp_size, mismatch)


def _described(target: Target, options: Options) -> str:
    """The destination's format, in words."""
    said: list[str] = [options.to]
    if options.to == "megatron-core":
        said.append(f"container {target.container}")
    if options.format.is_cut:
        said.append(f"tensor-parallel degree {target.tp_size}")
    if target.pp_size > 1:
        said.append(f"{target.pp_size} pipeline stages")
    return ", ".join(said)


def _degree(target_format: Format, model: Model, tp_size: int | None) -> int:
    if not target_format.is_cut:
        return 1
    if tp_size is not None:
        return tp_size
    if not format_named(model.format, model.container).is_cut:
        raise PartitionError(f"A {target_format.name} directory needs a degree: give tp_size (--tp N).")
    model.table.check_degree(model.config, model.tp_size)
    return model.tp_size


def _side_files(model: Model, tokenizer: Path | None) -> list[OutputFile]:
    """Tokenizer, generation settings and licence, as they are but for names of code.

    Of a source without generation settings, the model's.
    """
    wanted = _OTHER_SIDE_FILES if tokenizer is not None else _OTHER_SIDE_FILES | TOKENIZER_FILES
    files: list[OutputFile] = [*_named(model.directory, wanted)]
    if model.generation_config is not None and not (model.directory / _GENERATION_CONFIG).is_file():
        files.append(TextFile.json(_GENERATION_CONFIG, model.generation_config))
    if tokenizer is not None:
        found = _named(tokenizer, TOKENIZER_FILES)
        if not found:
            raise CheckpointFormatError(f"{tokenizer} holds no tokenizer (tokenizer.json, vocab.json, vocab.txt, ...).")
        files += found
    return files


def _named(directory: Path, names: Set[str]) -> list[CopiedFile | TextFile]:
    files = [directory / name for name in sorted(names) if (directory / name).is_file()]
    for path in files:
        if not is_inside(directory, path):
            _logger.warning("%s is a link to %s, out of its directory, and left out.", path, path.resolve())
    return [_taken_over(path) for path in files if is_inside(directory, path)]


def _taken_over(path: Path) -> CopiedFile | TextFile:
    copy = CopiedFile.of(path)
    data = without_auto_map(path) if path.name == _TOKENIZER_CONFIG else None
    if data is None:
        return copy
    _logger.warning(_LEFT_OUT, "auto_map", path.name)
    return TextFile(path.name, data, copy.mode, path)
