"""Data for the paper's training.

- Pretraining BERT: ``sentence_order`` makes pairs of segments, and ``masking`` masked batches of them.
- Pretraining GPT-2: ``packing`` cuts documents into full sequences, of lists or of ``token_files``, which Megatron-LM
  has too and ``tokenizing`` writes; ``blending`` shuffles and mixes them.
- Fine-tuning BERT: ``squad``, ``race`` and ``glue`` (MNLI, QQP), one module per task.
"""

from hf_megatron.paper.data.blending import ShuffledBlend, open_token_files
from hf_megatron.paper.data.glue import PAIR_TASKS, PairTask, SentencePair, read_sentence_pairs, sentence_pairs_from_hub
from hf_megatron.paper.data.masking import DataCollatorForMegatronBertPretraining, NgramMasking
from hf_megatron.paper.data.packing import PackedDocuments
from hf_megatron.paper.data.race import RaceQuestion, RaceQuestions, read_race
from hf_megatron.paper.data.sentence_order import sentence_order_pairs, tokenize_sentences
from hf_megatron.paper.data.squad import Answer, Answers, Question, QuestionWindows, Window, find_answers, read_squad
from hf_megatron.paper.data.token_files import TokenFile

__all__ = [
    "PAIR_TASKS",
    "Answer",
    "Answers",
    "DataCollatorForMegatronBertPretraining",
    "NgramMasking",
    "PackedDocuments",
    "PairTask",
    "Question",
    "QuestionWindows",
    "RaceQuestion",
    "RaceQuestions",
    "SentencePair",
    "ShuffledBlend",
    "TokenFile",
    "Window",
    "find_answers",
    "open_token_files",
    "read_race",
    "read_sentence_pairs",
    "read_squad",
    "sentence_order_pairs",
    "sentence_pairs_from_hub",
    "tokenize_sentences",
]
