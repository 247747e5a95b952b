"""The format's class: what the converter sees of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_megatron_conversion.files import OutputFile
from hf_megatron_conversion.formats import FormatName
from hf_megatron_conversion.formats.base import Given, Model, ModelType, Target, load_config
from hf_megatron_conversion.formats.megatron_lm.config import Outside
from hf_megatron_conversion.formats.megatron_lm.ranks import is_megatron_lm
from hf_megatron_conversion.formats.megatron_lm.reader import Opened, open_megatron_lm
from hf_megatron_conversion.tokenizer_files import tokenizer_facts


class MegatronLmFormat:
    """One pickle per rank, with Megatron-LM's names, order of queries, keys and values, and padded vocabulary."""

    name: FormatName = "megatron-lm"
    default_model_type: ModelType = "stock"
    is_cut = True
    has_config = False

    def recognises(self, directory: Path) -> bool:
        """Whether there are iterations, or ranks of one."""
        return is_megatron_lm(directory)

    def read(self, directory: Path, given: Given) -> Model:
        """Open the directory, or one iteration in it."""
        opened = open_megatron_lm(directory, _outside(directory, given))
        return Model(
            directory=directory,
            format=self.name,
            config=opened.config,
            table=opened.table,
            model_class=opened.model_class,
            tensors=opened.tensors,
            tp_size=opened.tp_size,
            files=opened.files,
            dropped=opened.dropped,
            checkpoint_version=opened.version,
            has_known_vocab_size=opened.has_known_vocab_size,
            opened=opened,
            generation_config=_generation_config(opened),
        )

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        """One file per rank, and the one that names the iteration."""
        from hf_megatron_conversion.formats.megatron_lm.writer import megatron_lm_files

        return megatron_lm_files(target)


def _generation_config(opened: Opened) -> dict[str, Any] | None:
    """For a model that can generate: the token at which it stops, null if nobody knows it."""
    if not opened.table.is_causal:
        return None
    return {name: opened.config[name] for name in ("bos_token_id", "eos_token_id")}


def _outside(directory: Path, given: Given) -> Outside:
    """What is known from outside of the ranks' files: from the user, or from files beside them."""
    beside = directory / "config.json"
    config = given.config
    if config is None:
        config = load_config(beside) if beside.is_file() else given.hint
    facts = tokenizer_facts(given.tokenizer or directory)
    return Outside(
        config=config,
        is_asked_for=given.config is not None,
        vocab_size=given.vocab_size,
        tokenizer_size=None if facts is None else facts.vocab_size,
        end_of_text=None if facts is None else facts.end_of_text,
        is_only_described=given.is_only_described,
    )
