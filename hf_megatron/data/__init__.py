"""Data for the paper's BERT pretraining: sentence-order pairs, and whole-word n-gram masking."""

from hf_megatron.data.collator import DataCollatorForMegatronBertPretraining
from hf_megatron.data.masking import NgramMasking
from hf_megatron.data.sentence_pairs import sentence_order_pairs, tokenize_sentences

__all__ = [
    "DataCollatorForMegatronBertPretraining",
    "NgramMasking",
    "sentence_order_pairs",
    "tokenize_sentences",
]
