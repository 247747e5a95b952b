"""Parts of transformer models built on the parallel layers, shared by the architectures."""

from hf_megatron.modules.attention import ParallelAttention, gathers_attentions
from hf_megatron.modules.heads import VocabParallelHead, causal_lm_loss, masked_lm_loss, next_token_labels

__all__ = [
    "ParallelAttention",
    "VocabParallelHead",
    "causal_lm_loss",
    "gathers_attentions",
    "masked_lm_loss",
    "next_token_labels",
]
