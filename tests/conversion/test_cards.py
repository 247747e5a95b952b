"""Model cards: those of the paper's models, and the one a converted checkpoint gets that has none."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_megatron.architectures.presets import PRESETS
from hf_megatron.planning import ModelShape
from hf_megatron.planning.memory import local_numel
from hf_megatron_conversion import convert
from tests.conversion.checkpoints import save_stock
from tests.repository import ROOT

_OF_THE_PAPER = [name for name, preset in PRESETS.items() if preset.is_of_paper]
_CARDS = ROOT / "model_cards"


def test_committed_cards_are_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches cards that a change of presets, planner or recipe has left behind; run model_cards/generate.py."""
    monkeypatch.setattr("sys.argv", ["generate.py", "--output", str(tmp_path)])
    runpy.run_path(str(_CARDS / "generate.py"), run_name="__main__")
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert written == {f"{name}.md": (_CARDS / f"{name}.md").read_text(encoding="utf-8") for name in _OF_THE_PAPER}


def _check(card: ModelCard, headings: tuple[str, ...]) -> None:
    """What huggingface_hub checks without a network: a YAML header of the fields it knows, and a text."""
    data = card.data.to_dict()
    assert {"library_name", "pipeline_tag", "tags"} <= set(data)
    assert data["library_name"] == "transformers"
    assert all(isinstance(tag, str) for tag in data["tags"])
    assert "model-index" not in data  # no figure that was not measured here
    assert tuple(re.findall(r"^## (.*)$", card.text, re.MULTILINE)) == headings
    assert "{" not in card.text  # a field of the template left empty


@pytest.mark.parametrize("name", _OF_THE_PAPER)
def test_metadata_and_content(name: str) -> None:
    """Catches a header that the Hub would refuse, and a card of another model's size."""
    card = ModelCard.load(_CARDS / f"{name}.md", ignore_metadata_errors=False)
    _check(card, ("Architecture", "Memory", "Training", "Evaluation", "Intended use", "Limits"))
    assert card.data.pipeline_tag == ("text-generation" if name.startswith("gpt2") else "fill-mask")
    assert card.data.license == "apache-2.0"
    count, _ = local_numel(ModelShape.from_config(PRESETS[name].config), 1)
    assert f"| parameters | {count:,} |" in card.text
    assert f'.from_preset("{name}")' in card.text


def test_a_checkpoint_without_a_card_gets_one(tied: Path, tmp_path: Path) -> None:
    """Catches a card of a conversion alone, which says nothing of the model, and one that replaces the author's."""
    convert(tied, tmp_path / "hub", to="hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md", ignore_metadata_errors=False)
    _check(card, ("Architecture", "Conversion"))
    assert card.data.license is None  # nobody knows
    assert "| parameters | 64,464 |" in card.text
    convert(tmp_path / "hub", tmp_path / "tp", to="tp", tp_size=2)
    assert (tmp_path / "tp/README.md").read_text().count("## Architecture") == 1


def test_a_model_that_the_planner_does_not_know_gets_a_card_too(tmp_path: Path) -> None:
    """Catches a conversion that fails for want of a figure in its card."""
    source = save_stock(tmp_path / "stock", activation_function="quick_gelu")
    convert(source, tmp_path / "hub", to="hub")
    assert "| activation | quick_gelu |" in (tmp_path / "hub/README.md").read_text()
