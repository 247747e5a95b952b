"""MNLI and QQP in their official files."""

import json
from pathlib import Path

import pytest

from hf_megatron.errors import DataError
from hf_megatron.paper.data import PAIR_TASKS, read_sentence_pairs, sentence_pairs_from_hub

_MNLI, _QQP = PAIR_TASKS["mnli"], PAIR_TASKS["qqp"]


def test_mnli_tables(tmp_path: Path) -> None:
    """Catches quotes taken for quoting, other line ends than a line feed, other classes, pairs without a class."""
    rows = [
        "index\tpairID\tsentence1\tsentence2\tlabel1\tgold_label",
        '0\t1e\tHe said "no.\tHe did not agree.\tneutral\tentailment',
        '1\t2n\tOne\u2028line\x85here\rtoo\tAnother"\tneutral\tneutral',
        "2\t3c\tFirst\tSecond\tneutral\tcontradiction",
        "3\t4x\tFirst\tSecond\tneutral\t-",
    ]
    file = tmp_path / "dev_matched.tsv"
    file.write_bytes("\r\n".join(rows).encode() + b"\n")
    assert read_sentence_pairs(_MNLI, file) == [
        {"first": 'He said "no.', "second": "He did not agree.", "label": 0},
        {"first": "One\u2028line\x85here\rtoo", "second": 'Another"', "label": 1},
        {"first": "First", "second": "Second", "label": 2},
    ]


def test_mnli_json_lines(tmp_path: Path) -> None:
    """Catches the other official form of MultiNLI refused."""
    rows = [{"gold_label": label, "sentence1": "Up", "sentence2": "Down"} for label in ("contradiction", "-")]
    file = tmp_path / "multinli_1.0_dev_matched.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert read_sentence_pairs(_MNLI, file) == [{"first": "Up", "second": "Down", "label": 2}]


def test_qqp_and_its_broken_rows(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    """Catches a class that is not a number, and a crash at the rows that lack columns, or silence about them."""
    file = tmp_path / "train.tsv"
    file.write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tHow?\tWhy?\t1\n4\t5\t6\tHow?\n")
    assert read_sentence_pairs(_QQP, file) == [{"first": "How?", "second": "Why?", "label": 1}]
    assert "1 of 2 rows have too few columns" in told.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.tsv", "index\tsentence1\tsentence2\n0\ta\tb\n", "has no column 'gold_label'; it needs sentence1, "),
        ("dev.tsv", "sentence1\tsentence2\tgold_label\na\tb\tmaybe\n", "has the class 'maybe'; the classes are entail"),
        ("dev.tsv", "", "holds no pairs of sentences"),
        ("dev.jsonl", "sentence1\tsentence2\n", "does not hold a JSON object in each line"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    """Catches an empty data set, a class made up, and errors without the file's name."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_sentence_pairs(_MNLI, tmp_path / name)


@pytest.mark.parametrize(("task", "names"), [("mnli", ("premise", "hypothesis")), ("qqp", ("question1", "question2"))])
def test_rows_from_the_hub(task: str, names: tuple[str, str]) -> None:
    """Catches the sentences of a pair swapped."""
    row = {**dict(zip(names, "ab", strict=True)), "label": 0, "idx": 0}
    assert sentence_pairs_from_hub(PAIR_TASKS[task], [row]) == [{"first": "a", "second": "b", "label": 0}]
