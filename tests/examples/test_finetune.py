"""The fine-tuning examples: they learn what there is to learn, write what they promise, and do so by any launcher."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_megatron import MegatronBertConfig, MegatronBertForQuestionAnswering
from tests.examples.commands import launch, losses, run_here
from tests.models.reference import Pool

_FACTS = [
    ("finds a module", "What does the import statement find?"),
    ("binds a name", "What else does it do with what it finds?"),
    ("evaluates an expression", "What does the assert statement do first?"),
    ("raises an exception", "What does it do where that is false?"),
]
_TEXT = "The import statement finds a module and then binds a name. The assert statement evaluates an expression, and "
_TEXT += "raises an exception where that is false."
_COPIES = 20  # of what there is to learn, in place of epochs, each of which ends with a checkpoint
_FEW_COPIES = 10  # where it need not be learned: as many steps as lie between two log entries
_SIZES = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
_LEARN = ["--learning-rate=3e-3", "--batch=4", "--length=48"]


def _squad(directory: Path, version: str, copies: int = _COPIES) -> list[str]:
    """An official file of four questions, of which two have no answer in version 2.0, and one with copies of them."""
    questions = [
        {
            "id": f"q{i}",
            "question": question,
            "answers": [{"text": answer, "answer_start": _TEXT.index(answer)}] if version == "1.1" or i < 2 else [],
        }
        for i, (answer, question) in enumerate(_FACTS)
    ]
    for name, count in (("dev", 1), ("train", copies)):
        paragraphs = [{"context": _TEXT, "qas": questions * count}]
        content = {"version": version, "data": [{"title": "Python", "paragraphs": paragraphs}]}
        (directory / f"{name}.json").write_text(json.dumps(content))
    files = [f"--train={directory / 'train.json'}", f"--validation={directory / 'dev.json'}"]
    return [f"--version={version}", *files, "--stride=16", "--question-length=20", *_LEARN]


def _race(directory: Path, copies: int = _COPIES) -> list[str]:
    for split, count in (("dev", 1), ("train", copies // 2)):
        for level in ("middle", "high"):
            (directory / split / level).mkdir(parents=True)
            content = {
                "id": f"{level}1.txt",
                "article": _TEXT,
                "questions": [question for _, question in _FACTS] * count,
                "options": [[answer for answer, _ in _FACTS]] * 4 * count,
                "answers": ["A", "B", "C", "D"] * count,
            }
            (directory / split / level / "1.txt").write_text(json.dumps(content))
    validation = ["--validation", str(directory / "dev"), str(directory / "dev/high")]
    return [f"--train={directory / 'train'}", *validation, "--option-length=24", *_LEARN]


def _pairs(directory: Path, task: str) -> list[str]:
    """Pairs whose classes the first word tells."""
    header, classes = {
        "mnli": ("index\tsentence1\tsentence2\tgold_label", ("entailment", "neutral", "contradiction")),
        "qqp": ("id\tquestion1\tquestion2\tis_duplicate", ("0", "1")),
    }[task]
    words = ["import", "assert", "raise"]
    rows = [f"{i}\t{words[i % len(classes)]} {i}\tstatement {i}\t{classes[i % len(classes)]}" for i in range(48)]
    for name, count in (("train", 48), ("dev_matched", 12)):
        (directory / f"{name}.tsv").write_text("\n".join([header, *rows[:count]]) + "\n")
    return [task, f"--train={directory / 'train.tsv'}", "--validation", str(directory / "dev_matched.tsv"), *_LEARN]


def _metrics(output: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return metrics


@pytest.mark.parametrize("version", ["2.0", pytest.param("1.1", marks=pytest.mark.slow)])
def test_squad_learns_its_answers(tmp_path: Path, tiny_bert: str, version: str) -> None:
    """Catches labels, logits and words that do not belong together, and an answer to what is taken for unanswerable."""
    arguments = [*_squad(tmp_path, version), f"--model={tiny_bert}", f"--output={tmp_path / 'out'}", "--epochs=2"]
    run_here("finetune_squad", *arguments)
    metrics = _metrics(tmp_path / "out")
    names = ("exact_match", "f1") if version == "1.1" else ("exact", "HasAns_f1", "NoAns_f1", "best_f1")
    assert {name: metrics[name] for name in names} == dict.fromkeys(names, 100.0)
    predictions = json.loads((tmp_path / "out/predictions.json").read_text())
    assert predictions == {f"q{i}": answer if version == "1.1" or i < 2 else "" for i, (answer, _) in enumerate(_FACTS)}
    assert type(MegatronBertForQuestionAnswering.from_pretrained(tmp_path / "out")) is MegatronBertForQuestionAnswering
    if version == "2.0":
        odds = json.loads((tmp_path / "out/null_odds.json").read_text())
        assert [odds[f"q{i}"] > 0 for i in range(4)] == [False, False, True, True]


def test_race_learns_its_options(tmp_path: Path, tiny_bert: str) -> None:
    """Catches options and labels that do not belong together, and splits or levels that go missing."""
    arguments = [*_race(tmp_path), f"--model={tiny_bert}", f"--output={tmp_path / 'out'}", "--epochs=3"]
    run_here("finetune_race", *arguments)
    assert _metrics(tmp_path / "out") == {
        "dev": {"accuracy": 1.0, "accuracy_high": 1.0, "accuracy_middle": 1.0},
        "high": {"accuracy": 1.0, "accuracy_high": 1.0},
    }


@pytest.mark.parametrize("task", ["qqp", pytest.param("mnli", marks=pytest.mark.slow)])
def test_pairs_learn_their_classes(tmp_path: Path, tiny_bert: str, task: str) -> None:
    """Catches classes that are mixed up between training and testing, or without their names in the saved model."""
    arguments = [*_pairs(tmp_path, task), f"--model={tiny_bert}", f"--output={tmp_path / 'out'}", "--epochs=4"]
    run_here("finetune_sentence_pairs", *arguments)
    assert _metrics(tmp_path / "out") == {"dev_matched": {"accuracy": 1.0}}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["id2label"]["0"] == {"mnli": "entailment", "qqp": "not_duplicate"}[task]


def test_data_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_bert: str) -> None:
    """Catches columns and splits by other names than the data sets have on the Hub."""
    answers = {"text": ["finds a module"], "answer_start": [21]}
    squad = {"id": "q0", "title": "Python", "context": _TEXT, "question": _FACTS[0][1], "answers": answers}
    race = {"example_id": "high1.txt", "article": _TEXT, "answer": "B", "question": "It _ .", "options": list("abcd")}
    mnli = {"premise": "a", "hypothesis": "b", "label": 1, "idx": 0}
    hub = {("rajpurkar/squad",): squad, ("ehovy/race", "all"): race, ("nyu-mll/glue", "mnli"): mnli}

    def load_dataset(*name: str) -> datasets.DatasetDict:
        rows = datasets.Dataset.from_list([hub[name]])
        splits = ("train", "validation", "test", "validation_matched", "validation_mismatched")
        return datasets.DatasetDict(dict.fromkeys(splits, rows))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    common = [f"--model={tiny_bert}", "--epochs=1", "--batch=1", "--length=64"]
    run_here("finetune_squad", *common, "--question-length=20", f"--output={tmp_path / 'squad'}")
    run_here("finetune_race", *common, "--option-length=24", f"--output={tmp_path / 'race'}")
    run_here("finetune_sentence_pairs", "mnli", *common, f"--output={tmp_path / 'mnli'}")
    assert set(_metrics(tmp_path / "squad")) == {"exact_match", "f1"}
    assert set(_metrics(tmp_path / "race")) == {"validation", "test"}
    assert set(_metrics(tmp_path / "mnli")) == {"validation_matched", "validation_mismatched"}


_EXAMPLES = {
    "finetune_squad": lambda directory: _squad(directory, "2.0", _FEW_COPIES),
    "finetune_race": lambda directory: _race(directory, _FEW_COPIES),
    "finetune_sentence_pairs": lambda directory: _pairs(directory, "mnli"),
}


@pytest.mark.parametrize(
    ("name", "launcher", "processes"),
    [
        ("finetune_squad", "live ranks", 2),
        pytest.param("finetune_sentence_pairs", "live ranks", 4, marks=pytest.mark.slow),
        # An example has no code of its own for a launcher; accelerate launches one of those that pretrain.
        pytest.param("finetune_squad", "python", 1, marks=pytest.mark.slow),
        pytest.param("finetune_race", "torchrun", 2, marks=pytest.mark.slow),
    ],
)
def test_launchers(pool: Pool, tmp_path: Path, tiny_bert: str, name: str, launcher: str, processes: int) -> None:
    """Catches processes that do not find each other, and ranks, or groups of them, that learn something else."""
    arguments = [*_EXAMPLES[name](tmp_path), f"--model={tiny_bert}", "--epochs=1", "--tp=2"]
    if launcher == "python":
        arguments.remove("--tp=2")
    on_ranks = [*arguments, f"--output={tmp_path / 'ranks'}"]
    if launcher == "live ranks":
        pool(processes).run(run_here, name, *on_ranks, timeout=240)
    else:
        launch(launcher, name, *on_ranks, processes=processes)
    run_here(name, *[a for a in arguments if a != "--tp=2"], f"--output={tmp_path / 'one'}")
    expected = losses(tmp_path / "one")
    assert expected
    assert losses(tmp_path / "ranks") == pytest.approx(expected, rel=1e-3)
    assert (tmp_path / "ranks/model.safetensors").is_file(), "a model in shards, which stock classes do not load"
    ours, theirs = _metrics(tmp_path / "ranks"), _metrics(tmp_path / "one")
    assert ours == (pytest.approx(theirs, abs=1e-2) if name == "finetune_squad" else theirs)


@pytest.mark.parametrize(
    ("example", "options", "told"),
    [
        ("squad", ["--train={file}"], "--train and --validation go together"),
        ("race", ["--validation={file}"], "--train and --validation go together"),
        ("sentence_pairs", ["mnli", "--train={file}", "--validation=absent.tsv"], "there is no absent.tsv"),
        ("squad", [], "--length 384 is more than the model's 64 positions"),
        ("race", ["--length=65"], "--length 65 is more than the model's 64 positions"),
        ("sentence_pairs", ["qqp", "--length=64", "--tp=2"], "--tp 2 does not divide the 1 processes"),
    ],
)
def test_arguments_are_checked_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], example: str, options: list[str], told: str
) -> None:
    """Catches an AttributeError after a model and a data set were loaded, or an index that is out of range in one."""
    file = tmp_path / "train.json"
    file.touch()
    MegatronBertConfig(**_SIZES, max_position_embeddings=64).save_pretrained(tmp_path / "model")  # no weights at all
    given = [option.format(file=file) for option in options]
    with pytest.raises(SystemExit) as caught:
        run_here(f"finetune_{example}", *given, f"--model={tmp_path / 'model'}", f"--output={tmp_path / 'out'}")
    assert caught.value.code == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
