"""What the documents tell people to type works.

Every fenced bash or python block of README.md and docs/*.md says in an HTML comment on the line above what becomes of
it here:

    <!-- run -->               it is executed. The blocks of a document run in order in one scratch copy of the
                               repository, so that a block can use what an earlier one has made
    <!-- file: train.py -->    it is saved under that name in the scratch copy, for a later block to run
    <!-- not run: REASON -->   it is not executed, for a reason a reader would accept

Lines that call `make` are not executed, as that would set up an environment and start this very test again; what make
would do is looked at instead.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.repository import ROOT, repository_files

_DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(
    r"^(?P<above>[^\n]*)\n(?P<indent> *)```(?P<language>bash|python)\n(?P<code>.*?)^ *```$", re.M | re.S
)
_MODE = re.compile(r"<!-- (?P<mode>run|file: (?P<name>\S+)|not run: (?P<reason>\S.*)) -->")
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_MAKE_LINE = re.compile(r"^make (?P<target>[a-z-]+).*\n", re.M)
_BLOCK_TIMEOUT = 240  # seconds
# What `make TARGET` has to do, for the targets that documents promise something about.
_MAKE_COMMANDS = {
    "check": "pytest -m",
    "install": "",
    "quickstart": "hf-megatron quickstart",
    "test": 'pytest -m "not slow and not gpu"',
    "test-all": 'pytest -m "not gpu"',
}


@dataclass(frozen=True)
class Block:
    """A fenced block and what its comment says; `mode` is empty where there is no such comment."""

    line: int
    language: str
    code: str
    mode: str
    file_name: str | None

    def make_targets(self) -> list[str]:
        return _MAKE_LINE.findall(self.code) if self.language == "bash" else []

    def command(self) -> list[str]:
        if self.language == "python":
            return [sys.executable, "-c", self.code]
        return ["bash", "-euo", "pipefail", "-c", _MAKE_LINE.sub("", self.code)]


def blocks_of(text: str) -> list[Block]:
    """The bash and python blocks of a Markdown text, in order."""
    blocks = []
    for match in _BLOCK.finditer("\n" + text):
        found = _MODE.fullmatch(match["above"].strip())
        mode, name = (found["mode"], found["name"]) if found else ("", None)
        line = text.count("\n", 0, match.start("language") - 1) + 1
        blocks.append(Block(line, match["language"], textwrap.dedent(match["code"]), mode, name))
    return blocks


def _run(block: Block, directory: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = f"{directory}{os.pathsep}{directory / 'conversion'}"
    done = subprocess.run(
        block.command(),
        cwd=directory,
        env={**os.environ, "PATH": path, "PYTHONPATH": code},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_BLOCK_TIMEOUT,
    )
    assert done.returncode == 0, f"the block of line {block.line} failed:\n{block.code}\nIt printed:\n{done.stdout}"


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_every_block_says_what_becomes_of_it(document: Path) -> None:
    """Catches a block that silently escapes being executed."""
    assert [block.line for block in blocks_of(document.read_text(encoding="utf-8")) if not block.mode] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "document",
    # Each is a minute of processes that import torch.
    [pytest.param(path, marks=[] if path.name == "README.md" else pytest.mark.slow) for path in _DOCUMENTS],
    ids=lambda path: path.name,
)
def test_blocks_work(document: Path, tmp_path: Path) -> None:
    """Catches commands and code that no longer do what the document shows."""
    for source in repository_files():
        target = tmp_path / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    for block in blocks_of(document.read_text(encoding="utf-8")):
        if block.file_name is not None:
            (tmp_path / block.file_name).write_text(block.code, encoding="utf-8")
        elif block.mode == "run":
            _run(block, tmp_path)


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_do_what_is_stated(document: Path) -> None:
    """Catches a documented `make` target that is gone or does something else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    for block in blocks_of(document.read_text(encoding="utf-8")):
        for target in block.make_targets():
            command = ["make", "--dry-run", target]
            done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            assert _MAKE_COMMANDS.get(target, "") in done.stdout


@pytest.mark.parametrize("document", _DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Catches links to files of the repository that were moved or never written."""
    links = _LINK.findall(document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_readme_is_short_and_readable_where_the_repository_is_not() -> None:
    """Catches a README nobody reads to its end, links that lead nowhere on PyPI, and named files that nobody has."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert _LINK.findall(text) == []
    named = re.findall(r"`((?:docs|benchmarks)/\w+\.md|examples/|[A-Z]+\.(?:md|cff))`", text)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []


_EXAMPLE = """\
<!-- run -->
```bash
make test
echo "seen" > made-by-bash
```

- In a list:

  <!-- not run: needs a GPU -->
  ```bash
  exit 1
  ```

<!-- file: script.py -->
```python
assert not open("made-by-bash").read(), "this one fails"
```

```python
unmarked()
```
"""


def test_the_blocks_of_a_document_are_found(tmp_path: Path) -> None:
    """Catches a harness that overlooks blocks, swallows errors, or would run the tests from within the tests."""
    blocks = blocks_of(_EXAMPLE)
    found = [(block.line, block.language, block.mode) for block in blocks]
    assert found[:2] == [(2, "bash", "run"), (10, "bash", "not run: needs a GPU")]
    assert found[2:] == [(15, "python", "file: script.py"), (19, "python", "")]
    assert (blocks[0].make_targets(), blocks[1].code, blocks[2].file_name) == (["test"], "exit 1\n", "script.py")
    _run(blocks[0], tmp_path)  # there is no Makefile here: `make test` would fail
    with pytest.raises(AssertionError, match=r"the block of line 15 failed(.|\n)*this one fails"):
        _run(blocks[2], tmp_path)
