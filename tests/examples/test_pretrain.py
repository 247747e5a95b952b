"""The pretraining examples: they learn, resume, and learn the same on ranks."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from hf_megatron import MegatronBertForPreTraining, MegatronGPT2LMHeadModel
from hf_megatron.errors import DestinationError
from hf_megatron.paper.data.text_sources import open_sources
from hf_megatron.paper.data.tokenizing import tokenize_to
from tests.examples.commands import launch, losses, run_here
from tests.models.reference import Pool

_TINY = ["--learning-rate=5e-3", "--layers=2", "--hidden=32", "--heads=2", "--length=32", "--batch=8", "--steps=60"]
_TINY += ["--vocab-size=500"]


@pytest.mark.parametrize("placement", ["pre", pytest.param("post", marks=pytest.mark.slow)])
def test_bert_learns(tmp_path: Path, text_files: list[str], placement: str) -> None:
    """Catches an example that no longer runs or learns, or saves no whole model with its tokenizer."""
    output = tmp_path / "out"
    arguments = [*_TINY, f"--output={output}", f"--layernorm-placement={placement}", "--text", *text_files]
    run_here("pretrain_bert", *arguments)
    first, _, last = losses(output)
    assert last < first - 0.1
    assert json.loads((output / "config.json").read_text())["layernorm_placement"] == placement
    model = AutoModelForPreTraining.from_pretrained(output)
    assert type(model) is MegatronBertForPreTraining
    batch = AutoTokenizer.from_pretrained(output)("the statement", "is executed", return_tensors="pt")
    assert model(**batch).prediction_logits.shape[-1] <= 500


def test_gpt2_learns_and_resumes(tmp_path: Path, text_files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an example that no longer runs or learns, a perplexity of something else, and a run that starts anew."""
    output = tmp_path / "out"
    arguments = [*_TINY, f"--output={output}", "--text", *text_files, "--validation", text_files[0]]
    run_here("pretrain_gpt2", *arguments)
    first, _, last = losses(output)
    assert last < first - 0.3
    perplexity = float(capsys.readouterr().out.split()[-1])
    assert 2 < perplexity < 200
    model = AutoModelForCausalLM.from_pretrained(output)
    assert type(model) is MegatronGPT2LMHeadModel
    assert model.config.eos_token_id == AutoTokenizer.from_pretrained(output).eos_token_id
    run_here("pretrain_gpt2", *arguments, "--steps=80", "--resume")
    assert losses(output)[:3] == pytest.approx([first, losses(output)[1], last])
    assert len(losses(output)) == 4


@pytest.mark.slow
def test_gpt2_learns_the_same_from_token_files(tmp_path: Path, text_files: list[str]) -> None:
    """Catches token files that give other batches than their texts, and documents that are kept apart by nothing."""
    run_here("pretrain_gpt2", *_TINY, f"--output={tmp_path / 'texts'}", "--text", *text_files)
    data = tmp_path / "data"
    tokenize_to(data, open_sources(text_files), str(tmp_path / "texts"))
    found = []
    for i, options in enumerate(([], ["--separate-documents"])):
        run_here("pretrain_gpt2", *_TINY, f"--output={tmp_path / str(i)}", "--data", str(data), *options)
        found.append(losses(tmp_path / str(i)))
    assert found[0] == losses(tmp_path / "texts")
    assert found[1] != found[0]
    assert found[1] == pytest.approx(found[0], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_gpt2", "pretrain_bert"])
def test_a_restart_with_fewer_ranks(
    pool: Pool, tmp_path: Path, text_files: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Catches a restarted run that another number of ranks cannot go on with, begins anew, or trains on other data."""
    output = tmp_path / "out"
    arguments = [*_TINY, "--save-steps=20", f"--output={output}", "--text", *text_files]
    pool(4).run(run_here, name, *arguments, "--tp=2", timeout=240)
    expected = losses(output)
    tokenizer = (output / "tokenizer.json").read_bytes()
    shutil.rmtree(output / "checkpoint-60")
    with pytest.raises(DestinationError, match=r"checkpoint-40.*--resume"):
        run_here(name, *arguments)
    (output / ".start-refused").unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_here(name, *arguments)
    assert losses(output) == pytest.approx(expected, abs=5e-3)
    assert losses(output)[:2] == expected[:2], "it began anew"
    assert (output / "tokenizer.json").read_bytes() == tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "processes", "options"),
    [
        ("pretrain_bert", 2, []),
        # Two groups of two; within one epoch, at whose end the last batch is filled up where there are several groups.
        ("pretrain_gpt2", 4, ["--batch=2", "--steps=20"]),
        ("pretrain_gpt2", None, []),
    ],
)
def test_launchers(
    pool: Pool, tmp_path: Path, text_files: list[str], name: str, processes: int | None, options: list[str]
) -> None:
    """Catches processes that do not find each other, ranks that learn something else, and a batch twice as large."""
    arguments = [*_TINY, *options, "--text", *text_files]
    run_here(name, *arguments, f"--output={tmp_path / 'one'}")
    # Its tokenizer, for the trainer of one breaks ties differently in each process.
    on_ranks = [*arguments, f"--tokenizer={tmp_path / 'one'}", f"--output={tmp_path / 'ranks'}", "--tp=2"]
    if processes is None:
        launch("accelerate", name, *on_ranks)
    else:
        pool(processes).run(run_here, name, *on_ranks, timeout=240)
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "ranks") == pytest.approx(expected, abs=5e-3)  # rounding, which training amplifies
    assert expected
