"""The list of planted defects still fits the source and the tests; `make test-mutants` tries them."""

import ast

import pytest

from tests.mutants import Defect, defects
from tests.repository import ROOT


@pytest.mark.parametrize("defect", [pytest.param(defect, id=defect.title) for defect in defects()])
def test_every_defect_can_be_planted(defect: Defect) -> None:
    """Catches a list that rots: a text that is gone or occurs twice, a defect that is none, a test that was renamed."""
    planted = ast.parse(defect.planted())
    assert ast.dump(planted) != ast.dump(ast.parse((ROOT / defect.file).read_text(encoding="utf-8")))
    file, _, function = defect.test.partition("::")
    tests = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert function in [node.name for node in tests if isinstance(node, ast.FunctionDef)]


def test_titles_tell_defects_apart() -> None:
    """Catches a defect that cannot be chosen by its title."""
    titles = [defect.title for defect in defects()]
    assert len(set(titles)) == len(titles)
