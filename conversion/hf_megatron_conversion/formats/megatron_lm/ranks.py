"""The files of a Megatron-LM checkpoint: which there are, and what each of them holds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_megatron.checkpoint import LazyTensor, listed
from hf_megatron.checkpoint.budgets import MAX_FILES, MAX_KEY_LENGTH, MAX_TENSORS
from hf_megatron.checkpoint.torch_file import StoredArray, open_torch_file
from hf_megatron.errors import CheckpointError, CheckpointFormatError, CheckpointIncompleteError
from hf_megatron_conversion.formats.megatron_lm.iterations import has_iterations, latest_iteration
from hf_megatron_conversion.formats.megatron_lm.names import own_name
from hf_megatron_conversion.formats.megatron_lm.pickled import MEGATRON_GLOBALS, attributes, plain

_FILE_NAMES = ("model_optim_rng.pt", "model_rng.pt")
# Tensor rank, pipeline stage, and in some versions the data-parallel or expert rank.
_RANK = re.compile(r"mp_rank_([0-9]{2,5})(?:_([0-9]{3,5}))?(?:_([0-9]{3,5}))?")
# What the arguments called the number of ranks, and of stages, over the years.
_TP_SIZE = ("tensor_model_parallel_size", "intra_layer_model_parallel_size", "model_parallel_size")
_PP_SIZE = ("pipeline_model_parallel_size", "inter_layer_model_parallel_size")


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One file."""

    path: Path
    tp: int  # tensor-parallel rank
    pp: int  # pipeline stage
    arguments: dict[str, Any] | None  # Megatron's command line arguments, None in files that have none
    version: object  # checkpoint_version as stored; None if absent
    iteration: object  # as stored
    chunks: tuple[dict[str, LazyTensor], ...]  # tensors by name; only interleaved pipelines have several in a stage
    unmapped: tuple[str, ...]  # names of what is stored and not known here
    is_core: bool  # whether the names are Megatron-core's


def is_megatron_lm(directory: Path) -> bool:
    """Whether the directory has the form of a Megatron-LM checkpoint, or is one iteration or one rank of one."""
    if not directory.is_dir():
        return False
    if _is_rank(directory):
        return True
    return has_iterations(directory) or bool(_rank_directories(directory))


def iteration_directory(directory: Path) -> Path:
    """The directory with the ranks' directories: the latest iteration, or the given directory itself.

    Raises:
        CheckpointError: It is not there, or nothing says which iteration is meant.
    """
    if _rank_directories(directory):
        return directory
    if _is_rank(directory):
        raise CheckpointIncompleteError(
            f"{directory} is the part of one rank; give the directory that holds those of all ranks."
        )
    chosen = latest_iteration(directory)
    if not _rank_directories(chosen):
        raise CheckpointIncompleteError(f"{chosen} holds no mp_rank_XX/{_FILE_NAMES[0]}.")
    return chosen


def open_ranks(directory: Path, problems: list[str]) -> dict[tuple[int, int], Rank]:
    """Open every rank's file, by (tensor rank, pipeline stage).

    ``problems`` is extended by a line for each thing that is wrong with the set of files, or with one of them.
    """
    ranks: dict[tuple[int, int], Rank] = {}
    found = _rank_directories(directory)
    stages = 1
    for numbers, path in found:
        try:
            rank = _open_rank(path, numbers[0], 0)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        arguments = rank.arguments or {}
        stages = max(stages, _first_size(arguments, _PP_SIZE) or 1)
        is_data_parallel = path.name == "model_rng.pt" and (len(numbers) == 3 or stages == 1)
        if is_data_parallel and len(numbers) > 1 and numbers[-1]:
            continue  # another copy of the same weights
        if len(numbers) == 3 and numbers[2] and not is_data_parallel:
            problems.append(f"{path.parent.name} is the part of an expert-parallel rank; experts are not supported")
            continue
        pp = 0 if len(numbers) == 1 or (is_data_parallel and len(numbers) == 2) else numbers[1]
        ranks[numbers[0], pp] = replace(rank, pp=pp)
    problems += _missing(ranks, directory)
    return ranks


def _is_rank(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _FILE_NAMES)


def _rank_directories(directory: Path) -> list[tuple[tuple[int, ...], Path]]:
    """Numbers of each rank's directory, and the file in it with the weights."""
    result = []
    for entry in sorted(directory.iterdir()):
        if (match := _RANK.fullmatch(entry.name)) is None:
            continue
        files = [entry / name for name in _FILE_NAMES if (entry / name).exists()]
        if files:
            result.append((tuple(int(number) for number in match.groups() if number is not None), files[0]))
    return result


def _missing(ranks: dict[tuple[int, int], Rank], directory: Path) -> Iterator[str]:
    """Ranks that the arguments, or the numbers of the others, say there are."""
    if not ranks:
        return
    arguments = [rank.arguments for rank in ranks.values() if rank.arguments is not None]
    known_tp, known_pp = ([_first_size(stated, names) for stated in arguments] for names in (_TP_SIZE, _PP_SIZE))
    tp_size = max([size for size in known_tp if size] or [1 + max(tp for tp, _ in ranks)])
    pp_size = max([size for size in known_pp if size] or [1 + max(pp for _, pp in ranks)])
    if tp_size * pp_size > MAX_FILES:
        yield f"{tp_size} x {pp_size} ranks and stages are more than {MAX_FILES:,}, which is the limit"
        return
    expected = dict.fromkeys((tp, pp) for tp in range(tp_size) for pp in range(pp_size))
    whole = f"of {tp_size} x {pp_size} ranks and stages"
    if missing := [_named(place, pp_size) for place in expected if place not in ranks]:
        yield f"{whole}, missing in {directory}: {listed(missing)}"
    if left_over := [_named(place, 2) for place in ranks if place not in expected]:
        yield f"{whole}, left over in {directory}: {listed(left_over)}"


def _named(place: tuple[int, int], num_stages: int) -> str:
    return f"rank {place[0]}" + (f" stage {place[1]}" if num_stages > 1 else "")


def _first_size(arguments: dict[str, Any], names: Sequence[str]) -> int | None:
    values = (arguments.get(name) for name in names)
    # What is not a number of ranks is nothing to enumerate.
    return next((value for value in values if isinstance(value, int) and 0 < value <= 1024), None)


def _open_rank(path: Path, tp: int, pp: int) -> Rank:
    content = open_torch_file(path, MEGATRON_GLOBALS)
    if not isinstance(content, dict):
        raise CheckpointFormatError(f"{path} holds a {type(content).__name__} where a dictionary is expected.")
    keys = [key for key in content if isinstance(key, str) and re.fullmatch(r"model\d{0,4}", key)]
    keys.sort(key=lambda key: int(key.removeprefix("model") or 0))
    if not keys:
        raise CheckpointFormatError(f"{path} has no 'model' in it, which a checkpoint of Megatron-LM has.")
    chunks: list[dict[str, LazyTensor]] = []
    unmapped: list[str] = []
    is_core = False
    for key in keys:
        tensors: dict[str, LazyTensor] = {}
        for count, (stored, value) in enumerate(_leaves(content[key], "")):
            if count >= MAX_TENSORS:
                raise CheckpointFormatError(f"{path} is refused: it has more than {MAX_TENSORS:,} tensors.")
            is_core |= ".linear_qkv." in stored
            name = own_name(stored)
            if name is not None and isinstance(value, StoredArray) and name not in tensors:
                tensors[name] = value.lazy(name)
            elif not stored.endswith("._extra_state") and value != {}:  # transformer-engine's, without weights
                unmapped.append(stored)
        chunks.append(tensors)
    return Rank(
        path=path,
        tp=tp,
        pp=pp,
        arguments=attributes(content.get("args")),
        version=plain(content.get("checkpoint_version")),
        iteration=plain(content.get("iteration", content.get("total_iters"))),
        chunks=tuple(chunks),
        unmapped=tuple(unmapped),
        is_core=is_core,
    )


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries, under dotted names that are cut short; empty ones are leaves."""
    if not isinstance(value, dict) or not value:
        yield prefix.removesuffix("."), value
        return
    for key, item in value.items():
        name = key if isinstance(key, str) else str(plain(key.value))
        yield from _leaves(item, f"{prefix}{name}."[:MAX_KEY_LENGTH])
