"""Questions on a text: reading them, cutting them into windows, and finding the answers in logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from hf_megatron.errors import DataError
from hf_megatron.paper.data import Question, QuestionWindows, find_answers, read_squad
from hf_megatron.paper.data.squad import Answer

_TEXT = (
    "The import statement finds a module. Then it binds a name in the local scope, which is what the assert statement "
    "does not do: it evaluates an expression, and raises an exception where that is false. Both are simple statements."
)


def _question(*answers: str, context: str = _TEXT, number: int = 0) -> Question:
    return Question(
        id=f"q{number}",
        title="",
        context=context,
        question="What does the import statement bind?",
        answers={"text": list(answers), "answer_start": [context.index(text) for text in answers]},
    )


def _windows(questions: list[Question], tokenizer: PreTrainedTokenizerBase, **options: Any) -> QuestionWindows:
    options = {"max_length": 48, "doc_stride": 16, "max_question_length": 20, **options}
    return QuestionWindows(questions, tokenizer, **options)


def test_reading_both_versions(tmp_path: Path) -> None:
    """Catches answers of one question given to another, and questions without an answer lost."""
    answers = [{"text": "a module", "answer_start": 27}, {"text": "module", "answer_start": 29}]
    questions = [
        {"id": "1", "question": "What?", "answers": answers},
        {"id": "2", "question": "Why?", "answers": [], "is_impossible": True},
    ]
    article = {"title": "Python", "paragraphs": [{"context": _TEXT, "qas": questions}]}
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"version": "2.0", "data": [article]}))
    first, second = read_squad(file)
    expected = {"text": ["a module", "module"], "answer_start": [27, 29]}
    assert first == {"id": "1", "title": "Python", "context": _TEXT, "question": "What?", "answers": expected}
    assert (second["id"], second["answers"]) == ("2", {"text": [], "answer_start": []})


@pytest.mark.parametrize("content", ["[]", "{", '{"data": [{"paragraphs": [{"qas": []}, {}]}]}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    """Catches a KeyError without the file's name."""
    file = tmp_path / "dev.json"
    file.write_text(content)
    with pytest.raises(DataError, match=r"dev\.json is not in SQuAD's format"):
        read_squad(file)


def test_windows_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches special tokens or token types in other places than a BERT tokenizer puts them."""
    question = _question("a name")
    windows = QuestionWindows([question], tokenizer)
    expected = tokenizer(question["question"], question["context"], return_tensors="pt")
    assert len(windows) == 1
    assert all(torch.equal(windows[0][name], tensor[0]) for name, tensor in expected.items())


@pytest.mark.parametrize("stride", [1, 16, 1000])
def test_windows_cover_the_text(tokenizer: PreTrainedTokenizerBase, stride: int) -> None:
    """Catches tokens between windows that none has, windows that end too early, are too long, or come in excess."""
    windows = _windows([_question("a name")], tokenizer, doc_stride=stride)
    tokens = tokenizer(_TEXT, add_special_tokens=False)["input_ids"]
    places = [range(window.first, window.first + window.size) for window in windows.windows]
    assert {token for place in places for token in place} == set(range(len(tokens)))
    assert [place.stop == len(tokens) for place in places] == [False] * (len(places) - 1) + [True]
    room = len(places[0])
    assert [place.start for place in places] == [min(stride, room) * i for i in range(len(places))]
    for i, place in enumerate(places):
        ids = windows[i]["input_ids"].tolist()
        assert len(ids) == 48 or i == len(places) - 1
        assert ids[-1 - len(place) : -1] == tokens[place.start : place.stop]


def _labelled(windows: QuestionWindows) -> list[str | None]:
    """What the labels of each window mark."""
    marked: list[str | None] = []
    for i, window in enumerate(windows.windows):
        start, end = (int(windows[i][name]) for name in ("start_positions", "end_positions"))
        marked.append(None if (start, end) == (0, 0) else windows.text(window, start, end))
    return marked


@pytest.mark.parametrize("answer", ["a name in the local scope", "The import", "simple statements.", "where"])
def test_labels_mark_the_answer(tokenizer: PreTrainedTokenizerBase, answer: str) -> None:
    """Catches labels that are off by a token, forget the window's shift, or mark the part of an answer in a window."""
    windows = _windows([_question(answer)], tokenizer)
    marked = _labelled(windows)
    assert answer in marked
    assert set(marked) <= {answer, None}
    assert None in marked
    # Only windows that lack the answer, or cut it, do not mark it.
    for text, window in zip(marked, windows.windows, strict=True):
        inside = windows.text(window, window.offset, window.offset + window.size - 1)
        assert (answer in inside) == (text is not None)


def test_what_is_marked_of_odd_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches answers inside a token taken for none, the last reference learnt, and a place made up for no answer."""
    questions = [_question("odul"), _question("a name", "a module"), _question()]
    assert _labelled(QuestionWindows(questions, tokenizer)) == ["module", "a name", None]


def test_answers_out_of_place_are_told(tokenizer: PreTrainedTokenizerBase, told: pytest.LogCaptureFixture) -> None:
    """Catches training on whatever stands where the answer should."""
    wrong = _question("a name")
    wrong["answers"]["answer_start"][0] += 1
    QuestionWindows([_question("a name"), wrong], tokenizer)
    assert "1 of 2 questions have an answer that does not stand in the text where answer_start says" in told.text


@pytest.mark.parametrize("options", [{"max_length": 23}, {"doc_stride": 0}])
def test_lengths_without_room_are_refused(tokenizer: PreTrainedTokenizerBase, options: dict[str, int]) -> None:
    """Catches windows without text, and a loop that does not advance."""
    with pytest.raises(DataError, match="max_length over 23 and a doc_stride of at least 1"):
        _windows([_question("a name")], tokenizer, **options)


def _slow_answers(
    windows: QuestionWindows, starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], most: int, longest: int
) -> list[Answer]:
    """Every span of every window, one by one."""
    answers = []
    for number, question in enumerate(windows.questions):
        spans: dict[str, float] = {}
        none = []
        for i, window in enumerate(windows.windows):
            if window.question != number:
                continue
            none.append(float(starts[i][0]) + float(ends[i][0]))
            text_tokens = range(window.offset, window.offset + window.size)
            for start in text_tokens:
                for end in text_tokens:
                    if start <= end < start + longest:
                        text = windows.text(window, start, end)
                        spans[text] = max(spans.get(text, -np.inf), float(starts[i][start]) + float(ends[i][end]))
        best = sorted(spans.items(), key=lambda item: -item[1])[:most]
        answers.append(Answer(question["id"], best[0][0], min(none) - best[0][1], tuple(best)))
    return answers


@pytest.fixture(scope="module")
def several_windows(tokenizer: PreTrainedTokenizerBase) -> QuestionWindows:
    """Questions with five windows and with one."""
    questions = [_question("a name"), _question("word", context="A word.", number=1), _question(number=2)]
    return _windows(questions, tokenizer)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), longest=st.sampled_from([1, 3, 30, 100]), most=st.sampled_from([1, 5, 20]))
def test_answers_equal_a_full_search(several_windows: QuestionWindows, seed: int, longest: int, most: int) -> None:
    """Catches spans that end before they start or outside of the text, and a no-answer score of the wrong window."""
    generator = np.random.default_rng(seed)
    shape = (len(several_windows), 60)  # wider than the windows, as a batch with a longer one makes them
    starts, ends = generator.normal(size=(2, *shape)) * 3
    found = find_answers(several_windows, starts, ends, num_candidates=most, max_answer_length=longest)
    expected = _slow_answers(several_windows, starts, ends, most, longest)
    for answer, wanted in zip(found, expected, strict=True):
        assert (answer.id, answer.text) == (wanted.id, wanted.text)
        assert answer.no_answer_score == pytest.approx(wanted.no_answer_score)
        assert [text for text, _ in answer.candidates] == [text for text, _ in wanted.candidates]
        assert [score for _, score in answer.candidates] == pytest.approx([score for _, score in wanted.candidates])


def test_labels_as_logits_give_the_answers_back(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches a shift between the places that labels mean and those that logits are read at."""
    wanted = ["a name", "evaluates an expression", None, "simple statements."]
    windows = _windows([_question(*filter(None, [answer]), number=i) for i, answer in enumerate(wanted)], tokenizer)
    starts, ends = np.zeros((2, len(windows), 48), dtype=np.float32)
    for i in range(len(windows)):
        starts[i, windows[i]["start_positions"]] = ends[i, windows[i]["end_positions"]] = 9.0
    answers = find_answers(windows, starts, ends)
    assert [answer.text if answer.no_answer_score < 0 else None for answer in answers] == wanted
    assert [answer.no_answer_probability > 0.5 for answer in answers] == [False, False, True, False]


def test_a_text_without_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    """Catches an empty search."""
    windows = _windows([_question(context=" ")], tokenizer)
    assert len(windows) == 1
    (answer,) = find_answers(windows, np.zeros((1, 48)), np.zeros((1, 48)))
    assert (answer.text, answer.candidates, answer.no_answer_probability) == ("", (), 1.0)


def test_no_answer_probability() -> None:
    """Catches a sign the wrong way round, and an overflow where the model is very sure."""
    found = [Answer("q", "text", score, ()).no_answer_probability for score in (0.0, -1e4, 1e4, np.log(3.0))]
    assert found == pytest.approx([0.5, 0.0, 1.0, 0.75])
