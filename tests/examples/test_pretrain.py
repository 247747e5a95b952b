"""The pretraining examples: they learn, resume, and learn the same on ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForPreTraining, AutoTokenizer

from hf_megatron import MegatronBertForPreTraining, MegatronGPT2LMHeadModel
from tests.examples.commands import launch, losses, run_here
from tests.models.reference import Pool

_TINY = {"layers": 2, "hidden": 32, "heads": 2, "length": 32, "batch": 8, "steps": 60, "vocab-size": 500}
_BERT = ["--learning-rate=5e-3", *(f"--{name}={value}" for name, value in _TINY.items())]
_GPT2 = _BERT


def _trained_tokenizer(output: Path, *others: Path) -> None:
    """Give other runs the tokenizer of one: its trainer breaks ties differently in each process."""
    for other in others:
        AutoTokenizer.from_pretrained(output).save_pretrained(other)


@pytest.mark.parametrize("placement", ["pre", pytest.param("post", marks=pytest.mark.slow)])
def test_bert_learns(tmp_path: Path, text_files: list[str], placement: str) -> None:
    """Catches an example that no longer runs or learns, or saves no whole model with its tokenizer."""
    output = tmp_path / "out"
    arguments = [*_BERT, f"--output={output}", f"--layernorm-placement={placement}", "--text", *text_files]
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
    arguments = [*_GPT2, f"--output={output}", "--text", *text_files, "--validation", text_files[0]]
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
@pytest.mark.parametrize(("name", "launcher"), [("pretrain_bert", "live ranks"), ("pretrain_gpt2", "accelerate")])
def test_launchers(pool: Pool, tmp_path: Path, text_files: list[str], name: str, launcher: str) -> None:
    """Catches a launcher whose processes do not find each other, and ranks that learn something else than one process
    does."""
    arguments = [*_BERT, "--text", *text_files]
    run_here(name, *arguments, f"--output={tmp_path / 'one'}")
    on_ranks = [*arguments, f"--tokenizer={tmp_path / 'one'}", f"--output={tmp_path / 'ranks'}", "--tp=2"]
    if launcher == "live ranks":
        pool(2).run(run_here, name, *on_ranks, timeout=240)
    else:
        launch(launcher, name, *on_ranks)
    expected = losses(tmp_path / "one")
    assert losses(tmp_path / "ranks") == pytest.approx(expected, abs=5e-3)  # rounding, which training amplifies


@pytest.mark.slow
def test_two_groups_of_two_ranks(pool: Pool, tmp_path: Path, text_files: list[str]) -> None:
    """Catches a batch that is twice as large, or seen twice, with data parallelism."""
    # Within one epoch, at whose end the last batch is filled up where there are several groups.
    arguments = [*_GPT2, "--batch=2", "--steps=20", "--text", *text_files]
    run_here("pretrain_gpt2", *arguments, f"--output={tmp_path / 'one'}")
    on_ranks = [*arguments, f"--tokenizer={tmp_path / 'one'}", f"--output={tmp_path / 'ranks'}", "--tp=2"]
    pool(4).run(run_here, "pretrain_gpt2", *on_ranks, timeout=240)
    assert losses(tmp_path / "one")
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "one"), abs=5e-3)
