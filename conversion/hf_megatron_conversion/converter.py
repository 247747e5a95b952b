"""Convert a checkpoint: change its format, its tensor-parallel degree, its dtype or its model type."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import and_
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_megatron.architectures import table_for
from hf_megatron.checkpoint import AtomicDirectory, read_json
from hf_megatron.checkpoint.atomic_directory import directories_in, leftovers
from hf_megatron.errors import DestinationError
from hf_megatron_conversion.card import source_card
from hf_megatron_conversion.comparison import compare, finite
from hf_megatron_conversion.conversion_plan import ConversionPlan, Options, check_options, make_plan
from hf_megatron_conversion.files import CopiedFile, OutputFile, Progress, Silent, TextFile, Writing, write_files
from hf_megatron_conversion.formats import Container, FormatName, TransformerImpl, format_of, read_model
from hf_megatron_conversion.formats.base import Model, ModelType, SourceOptions, warn_of_padding
from hf_megatron_conversion.journal import Journal, fingerprint
from hf_megatron_conversion.memory import parse_size, peak_rss_bytes, writing_within
from hf_megatron_conversion.sha256sums import write_sums
from hf_megatron_conversion.source import source_directory
from hf_megatron_conversion.source_files import SourceFiles, identities
from hf_megatron_conversion.tensors import dtype_code

if TYPE_CHECKING:
    from hf_megatron_conversion.logits import Agreement


_logger = logging.getLogger(__name__)

# What lies there.
_IN_RELEASE = re.compile(r"mp_rank_[0-9_]+|__0_[0-9]+\.distcp|\.metadata|metadata\.json|common\.pt")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion did, or with ``dry_run`` would do.

    Attributes:
        source: As it was given.
        destination: As it was given.
        format: The destination's format.
        container: The destination's container, of a megatron-core directory.
        tp_size: The destination's degree; 1 for a format that is not cut.
        pp_size: Its number of pipeline stages.
        tensors: Number of tensors.
        bytes_written: Bytes of all files of the destination.
        files: Size of each of them, by name.
        sha256: SHA-256 of each of them except for SHA256SUMS, which holds the same. Empty with ``dry_run``.
        source_sha256: SHA-256 of each file that was read, by its name in the source.
        dropped: Names of stored tensors that the model does not need.
        seconds: Time it took.
        peak_rss_bytes: The process's peak resident memory so far.
        verified: Whether the result, read back, equals the source and computes the same; if not, nothing was left. None
            if that was not asked for.
        dry_run: Whether nothing was written.
        max_logit_diff: Largest difference of the outputs of source and result; None if they were not run.
        loss_source: The source's loss on the token ids it was run on, of a language model.
        loss_destination: The result's.
        argmax_agreement: Share of the positions at which both find the same word the most likely.
    """

    source: str
    destination: str
    format: FormatName
    container: Container | None
    tp_size: int
    pp_size: int
    tensors: int
    bytes_written: int
    files: Mapping[str, int]
    sha256: Mapping[str, str]
    source_sha256: Mapping[str, str]
    dropped: tuple[str, ...]
    seconds: float
    peak_rss_bytes: int
    verified: bool | None
    dry_run: bool
    max_logit_diff: float | None = None
    loss_source: float | None = None
    loss_destination: float | None = None
    argmax_agreement: float | None = None


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: FormatName,
    container: Container | None = None,
    tp_size: int | None = None,
    pp_size: int | None = None,
    transformer_impl: TransformerImpl | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    vocab_size: int | None = None,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    model_type: ModelType | None = None,
    revision: str | None = None,
    max_memory: str | int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint, bit for bit unless a dtype is asked for, a bounded slice of one tensor at a time.

    The destination appears complete or not at all. Where the weight files would not change (same format, degree, dtype
    and names), they are taken over as they are.

    Args:
        source: A directory, or the id of a repository on the Hub.
        destination: The directory to write; it must not exist, nor overlap the source.
        to: Format to write.
        container: Of a megatron-core directory: ``"torch_dist"`` (default), which Megatron-LM loads at any degree, or
            ``"torch"``, one file per rank.
        tp_size: Degree to write; by default the source's, if that is cut.
        pp_size: Number of pipeline stages of the container ``torch``; by default 1.
        transformer_impl: Whose names the container ``torch`` has for a layer's norms, ``"transformer_engine"``
            (default) or ``"local"``, as Megatron-LM's argument of that name.
        dtype: Cast floating-point tensors to this one (``"bfloat16"``); by default every tensor keeps its own.
        max_shard_size: Largest size of a weight file, in bytes or like ``"5GB"``, of a hub directory or of the
            container ``torch_dist``.
        vocab_size: Size of the vocabulary without the padding that Megatron-LM adds; by default what the tokenizer or
            the files beside the source say, and if nothing does, the padding is kept.
        config: A config.json in place of the source's. A Megatron-LM checkpoint without arguments needs one, of which
            the number of attention heads is enough.
        tokenizer: Directory of a tokenizer in place of the source's.
        model_type: Whose ``model_type`` to write, the stock library's (default for hub) or this package's (for tp).
        revision: Branch, tag or commit of a repository on the Hub.
        max_memory: What the process may take, in bytes or like ``"500MB"``, by fewer threads and smaller slices. It
            does not count for running the models (``verify``).
        overwrite: Replace an existing destination.
        resume: Go on with a conversion of the same source and options that was interrupted: its complete files are kept
            if they still are as they were written. If this one is interrupted, leave them for another.
        dry_run: Only plan; write nothing.
        verify: Before the result is put in place, compare every tensor with the source, and run both on the CPU on the
            same token ids, which holds one whole model in memory at a time.
        progress: Told how far it is.

    Raises:
        PartitionError: The model cannot be cut for ``tp_size``.
        CheckpointError: The source is incomplete or damaged, or changes meanwhile.
        DestinationError: The destination is taken, overlaps the source, or cannot be written.
        UnsupportedError: A model, dtype or option that is not offered here.
    """
    started = time.perf_counter()
    options = Options(
        to=to,
        container=container,
        tp_size=tp_size,
        pp_size=pp_size,
        transformer_impl=transformer_impl,
        dtype=dtype,
        max_shard_size=max_shard_size,
        tokenizer=None if tokenizer is None else Path(tokenizer),
        model_type=model_type,
        verify=verify,
    )
    given = SourceOptions(
        config=None if config is None else read_json(Path(config)), vocab_size=vocab_size, tokenizer=options.tokenizer
    )
    limit = None if max_memory is None else parse_size(max_memory, "max_memory")
    target = AtomicDirectory(destination, replace=overwrite, resume=resume)
    _check_content(target.destination)
    directory = _directory(source, revision, target.destination, options, given)
    name = os.fsencode(directory.resolve().name if Path(source).is_dir() else source).decode(errors="replace")
    model, plan, sources = _planned(directory, name, options, given)
    written = _Written()
    if not dry_run:
        how = writing_within(limit, plan.tensors.values(), _weights_mode(model))
        written = _write(model, plan, sources, target, options, how, progress or Silent())
    return Conversion(
        source=str(source),
        destination=str(destination),
        format=to,
        dropped=tuple(model.dropped),
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=dry_run,
        **_figures(plan, written),
    )


def _figures(plan: ConversionPlan, written: _Written) -> dict[str, Any]:
    """What a conversion's result says of the plan, and of what became of it."""
    figures: dict[str, Any] = {
        "container": plan.container,
        "tp_size": plan.tp_size,
        "pp_size": plan.pp_size,
        "tensors": len(plan.tensors),
        "bytes_written": plan.nbytes,
        "files": plan.sizes,
        "sha256": written.digests,
        "source_sha256": written.source_digests,
        "verified": written.is_verified,
    }
    if (ran := written.agreement) is None:
        return figures
    return figures | {
        "max_logit_diff": finite(ran.max_logit_diff),
        "loss_source": finite(ran.losses[0]),
        "loss_destination": finite(ran.losses[1]),
        "argmax_agreement": ran.argmax_agreement,
    }


def _directory(source: str | Path, revision: str | None, target: Path, options: Options, given: SourceOptions) -> Path:
    """The source's directory, after refusing what can be refused without its weights."""
    directory = source_directory(source, revision=revision, config_only=True)
    resolved = directory.resolve()
    places = (target, *leftovers(target))
    if resolved in target.parents or any(place == resolved or place in resolved.parents for place in places):
        raise DestinationError(
            f"The destination {target} and the source {resolved} overlap, which could destroy the source; choose a "
            "destination outside of it."
        )
    if format_of(directory).has_config:
        config = given.config or read_json(directory / "config.json")
        check_options(options, config, table_for(config))
    return source_directory(source, revision=revision)


def _planned(
    directory: Path, name: str, options: Options, given: SourceOptions
) -> tuple[Model, ConversionPlan, SourceFiles]:
    """Open the source, and plan what becomes of it; the card calls it ``name``."""
    before = identities(directory)
    model = read_model(directory, given)
    check_options(options, model.config, model.table)
    warn_of_padding(model)
    if model.dropped:
        _logger.info("Not needed by the model and left out: %s.", ", ".join(model.dropped))
    plan = make_plan(model, options, name)
    if plan.mismatch is not None:
        _logger.warning("%s --model-type megatron writes a config.json that says both.", plan.mismatch)
    return model, plan, SourceFiles.of(model.directory, before, _read_by(model, plan), model.archives)


def _read_by(model: Model, plan: ConversionPlan) -> list[Path]:
    """The files that a conversion reads, of which some may be missing."""
    names = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
    copied = [file.source for file in plan.files if isinstance(file, CopiedFile | TextFile) and file.source is not None]
    card = filter(None, [source_card(model.directory)])
    return [*model.files, *copied, *card, *(model.directory / name for name in names)]


def _weights_mode(model: Model) -> int:
    """What everybody may do with every file of the source's weights."""
    return reduce(and_, (path.stat().st_mode for path in model.files), 0o666)


def _check_content(destination: Path) -> None:
    """Raise DestinationError if replacing a directory would delete more than a checkpoint."""
    if kept := [path.name for path in directories_in(destination) if not _is_release(path)]:
        raise DestinationError(
            f"The destination {destination} holds directories ({', '.join(kept[:5])}), which no checkpoint written "
            "here does, and will not be overwritten. Remove it yourself if nothing in it is needed."
        )


def _is_release(directory: Path) -> bool:
    """Whether this is the directory of a checkpoint for Megatron-LM, the only one in what is written here."""
    is_named = directory.name == "release" and directory.with_name("latest_checkpointed_iteration.txt").is_file()
    return is_named and all(_IN_RELEASE.fullmatch(path.name) for path in directory.iterdir())


@dataclass(frozen=True, kw_only=True)
class _Written:
    """What was written; nothing of it is there if ``is_verified`` is False."""

    digests: Mapping[str, str] = field(default_factory=dict)
    source_digests: Mapping[str, str] = field(default_factory=dict)
    is_verified: bool | None = None
    agreement: Agreement | None = None


def _write(
    model: Model,
    plan: ConversionPlan,
    sources: SourceFiles,
    target: AtomicDirectory,
    options: Options,
    how: Writing,
    progress: Progress,
) -> _Written:
    """Write, check if that is asked for, and publish if nothing is wrong."""
    try:
        with target:
            journal = Journal(target.container / "journal", fingerprint(options, plan.files, sources.files))
            try:
                kept = journal.kept(target.path)
                files = [file for file in plan.files if file.path not in kept]
                target.require_space(sum(file.nbytes for file in files), len(files))
                written = _write_files(files, plan, sources, target.path, how, progress, journal.add)
                written = replace(written, digests={**kept, **written.digests})
                write_sums(target.path, written.digests)
                if options.verify:
                    is_verified, agreement = _verify(model, plan, read_model(target.path), options, progress)
                    written = replace(written, is_verified=is_verified, agreement=agreement)
                sources.require_unchanged()
            except (OSError, DestinationError, KeyboardInterrupt):
                if target.resumes and journal.has_files():
                    target.is_to_remove = False
                    _logger.warning("What is complete is left in %s for --resume.", target.container)
                raise
            if written.is_verified is not False:
                _check_content(target.destination)  # which may have got more than a checkpoint since
                target.publish()
    except OSError as error:
        raise target.failure(error) from error
    return written


def _write_files(
    files: Sequence[OutputFile],
    plan: ConversionPlan,
    sources: SourceFiles,
    directory: Path,
    how: Writing,
    progress: Progress,
    done: Callable[[str, str], None],
) -> _Written:
    """Write files, and check those that they are made from."""
    copies = {file.source: file.path for file in plan.files if isinstance(file, CopiedFile)}
    found: dict[Path, str] = {}

    def check(path: Path, stop: threading.Event) -> None:
        found[path] = sources.digest(path, stop)

    beside = [partial(check, path) for path in sources.files if path not in copies]
    digests = write_files(files, directory, progress, how, beside=beside, done=done)
    found |= {path: digests[name] for path, name in copies.items() if name in digests}
    sources.require_listed(found)
    return _Written(digests=digests, source_digests={sources.name(path): found[path] for path in sorted(found)})


def _verify(
    model: Model, plan: ConversionPlan, written: Model, options: Options, progress: Progress
) -> tuple[bool, Agreement]:
    """Whether what was written equals the source, tensor by tensor and as it runs, and how both ran."""
    from hf_megatron_conversion.logits import agreement, stock_gap

    differences, _ = compare(plan.tensors, written.tensors, progress)
    dtype = None if options.dtype is None else dtype_code(options.dtype)
    result = agreement(model, written, tensors=plan.tensors, dtype=dtype, tokenizer=options.tokenizer)
    if result.difference is not None:
        differences["logits"] = result.difference
    for name, reason in differences.items():
        _logger.error("%s: %s", name, reason)
    if plan.mismatch is not None and not differences:
        gap = stock_gap(written, options.tokenizer)
        _logger.warning("Run as the stock class, the result's logits differ by up to %.2g.", gap)
    return not differences, result
