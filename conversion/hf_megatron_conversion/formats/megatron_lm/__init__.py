"""``megatron-lm``: the directories of Megatron-LM's legacy checkpoints and of Megatron-core's ``torch`` format.

    latest_checkpointed_iteration.txt               an iteration, or the word "release"
    iter_0001000/mp_rank_00/model_optim_rng.pt      one directory per tensor rank, or mp_rank_00_000 with the stage

Read: ``ranks`` opens the files, ``stages`` puts them together, ``arguments`` and ``config`` say what model it is,
``reader`` makes the stock model's tensors of it. Written: ``writer``. Names are in ``names``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_megatron.checkpoint import read_json
from hf_megatron_conversion.files import OutputFile
from hf_megatron_conversion.formats import FormatName
from hf_megatron_conversion.formats.base import Model, ModelType, SourceOptions, Target
from hf_megatron_conversion.formats.megatron_lm.config import ExternalFacts
from hf_megatron_conversion.formats.megatron_lm.ranks import is_megatron_lm
from hf_megatron_conversion.formats.megatron_lm.reader import MegatronCheckpoint, open_megatron_lm
from hf_megatron_conversion.tokenizer_files import tokenizer_facts

__all__ = ["MegatronCheckpoint", "MegatronLmFormat", "external_facts"]


class MegatronLmFormat:
    """One pickle per rank, with Megatron-LM's names, order of queries, keys and values, and padded vocabulary."""

    name: FormatName = "megatron-lm"
    default_model_type: ModelType = "stock"
    is_cut = True
    has_config = False

    def recognises(self, directory: Path) -> bool:
        return is_megatron_lm(directory)

    def read(self, directory: Path, given: SourceOptions) -> Model:
        return open_megatron_lm(directory, external_facts(directory, given))

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        from hf_megatron_conversion.formats.megatron_lm.writer import megatron_lm_files

        return megatron_lm_files(target)


def external_facts(directory: Path, given: SourceOptions) -> ExternalFacts:
    """What is known from outside of the files with the weights: from the user, or from files beside them."""
    beside = directory / "config.json"
    config = given.config
    if config is None:
        config = read_json(beside) if beside.is_file() else given.hint
    facts = tokenizer_facts(given.tokenizer or directory)
    return ExternalFacts(
        config=config,
        is_asked_for=given.config is not None,
        vocab_size=given.vocab_size,
        tokenizer_size=None if facts is None else facts.vocab_size,
        end_of_text=None if facts is None else facts.end_of_text,
        is_only_described=given.is_only_described,
    )
