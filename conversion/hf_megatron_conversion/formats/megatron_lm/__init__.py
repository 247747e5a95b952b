"""``megatron-lm``: the directories of Megatron-LM's legacy checkpoints and of Megatron-core's ``torch`` format.

    latest_checkpointed_iteration.txt               an iteration, or the word "release"
    iter_0001000/mp_rank_00/model_optim_rng.pt      one directory per tensor rank, or mp_rank_00_000 with the stage

Read: ``ranks`` opens the files, ``stages`` puts them together, ``arguments`` and ``config`` say what model it is,
``reader`` makes the stock model's tensors of it. Written: ``writer``. Names are in ``names``.
"""

from __future__ import annotations

from hf_megatron_conversion.formats.megatron_lm.format import MegatronLmFormat
from hf_megatron_conversion.formats.megatron_lm.reader import Opened

__all__ = ["MegatronLmFormat", "Opened"]
