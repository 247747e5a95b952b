"""Rules for every file of the repository that no linter checks."""

import ast
import re
from pathlib import Path

from tests.repository import ROOT, repository_files

_CODE = [path for path in repository_files() if path.suffix == ".py"]
_LIBRARY = [path for path in _CODE if path.relative_to(ROOT).parts[0] in ("hf_megatron", "conversion")]
# The start of an absolute path into somebody's home or working directory.
_PERSONAL_PATH = re.compile(r"(?<![\w.~/:}-])/(?:home|root|Users|work)/|[A-Z]:\\Users\\")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_personal_paths() -> None:
    """Catches paths of the machine something was written on: they work nowhere else."""
    found = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if _PERSONAL_PATH.search(line)
    ]
    assert found == []


def test_source_is_ascii() -> None:
    """Catches look-alike letters and invisible characters."""
    assert [_name(path) for path in _CODE if not path.read_text(encoding="utf-8").isascii()] == []


def test_files_stay_small() -> None:
    """Catches a module of the library over 400 lines, the size at which one head no longer holds it."""
    sizes = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in _LIBRARY}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def _lines_of_code(function: ast.FunctionDef) -> int:
    first = function.body[0]
    docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    end = function.end_lineno or function.lineno
    return end - function.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if docstring else 0)


def test_functions_stay_small() -> None:
    """Catches a function of the library over 60 lines, its docstring not counted."""
    found = [
        f"{_name(path)}:{node.lineno}: {node.name}"
        for path in _LIBRARY
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and _lines_of_code(node) > 60
    ]
    assert found == []
