"""The evaluations as ``evaluate`` modules, offline and by path."""

from pathlib import Path

import evaluate
import pytest

from hf_megatron.errors import DataError
from hf_megatron.paper.evaluation import MODULES, evaluate_lambada, evaluate_wikitext103, module_path
from tests.evaluation.models import PASSAGES, TEXT, load


def test_modules_compute_what_the_functions_do(model_dir: Path, tmp_path: Path) -> None:
    """Catches a module that cannot be loaded without a network, or that loses its options or the order of its data."""
    model, tokenizer = load(model_dir)
    lambada, wikitext = (evaluate.load(module_path(name), cache_dir=str(tmp_path)) for name in MODULES)
    found = lambada.compute(data=PASSAGES, model=model, tokenizer=tokenizer)
    expected = vars(evaluate_lambada(model, tokenizer, PASSAGES))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    lines = TEXT.splitlines(keepends=True)
    found = wikitext.compute(data=lines, model=model, tokenizer=tokenizer, stride=16)
    expected = vars(evaluate_wikitext103(model, tokenizer, TEXT, stride=16))
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert found["stride"] == 16


def test_unknown_modules_are_refused() -> None:
    """Catches a path to a file that does not exist."""
    with pytest.raises(DataError, match="lambada, wikitext103"):
        module_path("glue")
