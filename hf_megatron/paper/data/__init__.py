"""Data for the paper's training.

BERT is pretrained on sentence-order pairs with whole-word n-grams masked, GPT-2 on documents packed into sequences.
Fine-tuning answers questions on a text (SQuAD), chooses among options (RACE) and classifies pairs of sentences (MNLI,
QQP).
"""

from hf_megatron.paper.data.collator import DataCollatorForMegatronBertPretraining
from hf_megatron.paper.data.glue import PAIR_TASKS, PairTask, SentencePair, read_sentence_pairs, sentence_pairs_from_hub
from hf_megatron.paper.data.masking import NgramMasking
from hf_megatron.paper.data.packing import PackedDocuments
from hf_megatron.paper.data.question_answers import Answer, find_answers
from hf_megatron.paper.data.question_windows import QuestionWindows, Window
from hf_megatron.paper.data.race import RaceQuestion, RaceQuestions, read_race
from hf_megatron.paper.data.sentence_pairs import sentence_order_pairs, tokenize_sentences
from hf_megatron.paper.data.squad import Answers, Question, read_squad

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
    "Window",
    "find_answers",
    "read_race",
    "read_sentence_pairs",
    "read_squad",
    "sentence_order_pairs",
    "sentence_pairs_from_hub",
    "tokenize_sentences",
]
