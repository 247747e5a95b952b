"""The paper's sentence-pair tasks, MNLI and QQP, in their official files.

Source: Wang et al. 2018, arXiv:1804.07461 (GLUE); Williams et al. 2017, arXiv:1704.05426 (MultiNLI).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from transformers.utils import logging

from hf_megatron.errors import DataError

logger = logging.get_logger(__name__)


class SentencePair(TypedDict):
    """Two sentences and the number of their class."""

    first: str
    second: str
    label: int


@dataclass(frozen=True)
class PairTask:
    """The classes of a task, and the columns of the two sentences and of the class."""

    labels: tuple[str, ...]  # names of the classes; their numbers are those of the Hub
    columns: tuple[str, str, str]  # in the official files
    classes: tuple[str, ...]  # what a file says for each class
    hub_columns: tuple[str, str, str]  # in the rows of nyu-mll/glue


_MNLI_CLASSES = ("entailment", "neutral", "contradiction")
PAIR_TASKS: Mapping[str, PairTask] = {
    "mnli": PairTask(
        labels=_MNLI_CLASSES,
        columns=("sentence1", "sentence2", "gold_label"),
        classes=_MNLI_CLASSES,
        hub_columns=("premise", "hypothesis", "label"),
    ),
    "qqp": PairTask(
        labels=("not_duplicate", "duplicate"),
        columns=("question1", "question2", "is_duplicate"),
        classes=("0", "1"),
        hub_columns=("question1", "question2", "label"),
    ),
}
_NO_GOLD_LABEL = "-"  # MultiNLI's mark where the annotators did not agree


def read_sentence_pairs(task: PairTask, file: Path) -> list[SentencePair]:
    """Read an official file: a table with tabs between its columns and a header, or one JSON object a line (.jsonl).

    Pairs of MNLI without a gold label are left out, and so are rows with too few columns, of which QQP has some; a
    warning counts the latter. DataError if a column is missing, a class unknown, the form another one, or no pair left.
    """
    # Lines end at "\n" alone: some sentences hold other characters that Python takes for the end of a line.
    with file.open(encoding="utf-8", newline="\n") as lines:
        rows = _json_rows(file, lines) if file.suffix == ".jsonl" else _table_rows(file, lines)
    numbers = {name: number for number, name in enumerate(task.classes)}
    pairs = []
    for row in rows:
        try:
            first, second, name = (row[column] for column in task.columns)
        except KeyError as error:
            raise DataError(f"{file} has no column {error}; it needs {', '.join(task.columns)}.") from error
        if name in numbers:
            pairs.append(SentencePair(first=first, second=second, label=numbers[name]))
        elif name != _NO_GOLD_LABEL:
            raise DataError(f"{file} has the class {name!r}; the classes are {', '.join(task.classes)}.")
    if not pairs:
        raise DataError(f"{file} holds no pairs of sentences.")
    return pairs


def sentence_pairs_from_hub(task: PairTask, rows: Iterable[Mapping[str, Any]]) -> list[SentencePair]:
    """The pairs of a split of ``datasets.load_dataset("nyu-mll/glue", ...)``."""
    first, second, label = task.hub_columns
    return [SentencePair(first=row[first], second=row[second], label=row[label]) for row in rows]


def _json_rows(file: Path, lines: Iterable[str]) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise DataError(f"{file} does not hold a JSON object in each line ({error}).") from error


def _table_rows(file: Path, lines: Iterable[str]) -> list[dict[str, str]]:
    header, *cells = [line.rstrip("\r\n").split("\t") for line in lines] or [[]]
    rows = [dict(zip(header, row, strict=False)) for row in cells if len(row) >= len(header)]
    if len(rows) < len(cells):
        logger.warning(f"{file}: {len(cells) - len(rows)} of {len(cells)} rows have too few columns and are left out.")
    return rows
