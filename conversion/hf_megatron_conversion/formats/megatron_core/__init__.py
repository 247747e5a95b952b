"""``megatron-core``: what Megatron-LM has saved by default since 2024, with Megatron-core's names.

    latest_checkpointed_iteration.txt       an iteration, or the word "release"
    iter_0001000/metadata.json              says that the container is ``torch_dist``
    iter_0001000/.metadata                  every tensor's shape, and in which file each chunk of it lies
    iter_0001000/__0_0.distcp               chunks, one file of torch.save after the other
    iter_0001000/common.pt                  Megatron-LM's arguments, until core 0.18

In the container ``torch`` the same tensors lie in one file per rank, in directories that ``megatron_lm`` reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_megatron_conversion.files import OutputFile
from hf_megatron_conversion.formats import Container, FormatName
from hf_megatron_conversion.formats.base import Model, ModelType, SourceOptions, Target
from hf_megatron_conversion.formats.megatron_core.containers import is_distributed
from hf_megatron_conversion.formats.megatron_core.reader import open_torch_dist
from hf_megatron_conversion.formats.megatron_lm import external_facts


@dataclass(frozen=True)
class MegatronCoreFormat:
    """Megatron-core's names, the vocabulary padded, in one of its containers."""

    container: Container = "torch_dist"

    name: FormatName = "megatron-core"
    default_model_type: ModelType = "stock"
    has_config = False

    @property
    def is_cut(self) -> bool:
        return self.container == "torch"  # the other is the same for every degree

    def recognises(self, directory: Path) -> bool:
        return is_distributed(directory)

    def read(self, directory: Path, given: SourceOptions) -> Model:
        return open_torch_dist(directory, external_facts(directory, given))

    def weight_files(self, target: Target) -> Sequence[OutputFile]:
        from hf_megatron_conversion.formats.megatron_core.writer import megatron_core_files

        return megatron_core_files(target)
