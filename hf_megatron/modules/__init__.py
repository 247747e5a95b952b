"""Parts of transformer models built on the parallel layers, shared by the architectures."""

from hf_megatron.modules.activations import activation
from hf_megatron.modules.attention import ParallelAttention
from hf_megatron.modules.heads import VocabParallelHead, causal_lm_loss, masked_lm_loss, next_token_labels, tied_weight

__all__ = [
    "ParallelAttention",
    "VocabParallelHead",
    "activation",
    "causal_lm_loss",
    "masked_lm_loss",
    "next_token_labels",
    "tied_weight",
]
