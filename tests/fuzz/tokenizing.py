"""What ``hf-megatron tokenize`` reads, damaged: texts, what it has written, and what was left of interrupted work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import datasets
import numpy as np
import pytest
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2TokenizerFast

from hf_megatron.errors import HfMegatronError
from hf_megatron.paper.data import TokenFile
from hf_megatron.paper.data.text_sources import open_sources
from hf_megatron.paper.data.tokenizing import tokenize_to
from tests.fuzz.checks import FindError
from tests.fuzz.conversions import attempt, written
from tests.fuzz.damages import NAMES, SPECIALS, flipped
from tests.fuzz.directories import SECRET, Files, Special, read
from tests.fuzz.documents import edited_json, large_json, raw_value
from tests.fuzz.pickles import INTEGERS, TEXTS, Draw, pick, rarely
from tests.fuzz.token_files import require_sound, wrong_file

_TEXTS = ["One text, and one more.", "", "\u00e9t\u00e9 \U0001f600\n", "<|endoftext|> in a text", "\0\x1b[31m\t"]


@cache
def _tokenizer() -> str:
    directory = TemporaryDirectory()
    _kept.append(directory)
    GPT2TokenizerFast().train_new_from_iterator(_TEXTS, 300, show_progress=False).save_pretrained(directory.name)
    return directory.name


_kept: list[TemporaryDirectory[str]] = []  # until the process ends


class _Fixed:
    """The same source wherever it is, so that work goes on that another process has begun."""

    name, size, num_bytes, identity = "fixed", len(_TEXTS), 100, ["fixed"]

    def texts(self, start: int) -> Iterator[tuple[str, int]]:
        yield from ((_TEXTS[i], i + 1) for i in range(start, len(_TEXTS)))


def _tokenized(destination: Path, sources: Any, tokenizer: str = "", **options: Any) -> TokenFile:
    """The tokens that were written, in batches of a text or two."""
    with patch("hf_megatron.paper.data.tokenizing._BATCH_CHARACTERS", 20):
        tokenize_to(destination, sources, tokenizer or _tokenizer(), processes=1, **options)
    return TokenFile(destination)


# --- What was written.


def _interrupt(done: int, total: int, tokens: int) -> None:
    if 1 < done < total:
        raise KeyboardInterrupt


@cache
def _directories() -> tuple[Files, Files, bytes]:
    """A directory that is complete, one that is not, and the tokens."""
    with TemporaryDirectory() as root:
        complete = _tokenized(Path(root, "out"), [_Fixed()])
        with pytest.raises(KeyboardInterrupt):
            _tokenized(Path(root, "new"), [_Fixed()], resume=True, progress=_interrupt)
        files = read(Path(root))
        whole = {name: content for name, content in files.items() if name.startswith("out/")}
        part = {name.replace("new", "out"): content for name, content in files.items() if name not in whole}
        return whole, part, complete.path.read_bytes()


def complete_directory() -> Files:
    return _directories()[0]


def interrupted_directory() -> Files:
    return _directories()[1]


@st.composite
def token_directories(draw: Draw) -> Files:
    """A directory of tokens, complete or not, with one to three things wrong."""
    files = dict(pick(draw, [complete_directory(), interrupted_directory()]))
    for _ in range(draw(st.integers(1, 3))):
        name = pick(draw, sorted(files) or ["out/tokens.bin"])
        match pick(draw, ["content"] * 4 + ["wrong", "delete", "rename", "add"]):
            case "content":
                files[name] = _changed(draw, name, files.get(name, b""))
            case "wrong":
                files[name] = wrong_file(draw, files.get(name, b""))
            case "delete":
                files.pop(name, None)
            case "rename":
                files[str(Path(name).parent / pick(draw, NAMES))] = files.pop(name, b"")
            case "add":
                places = ["out/", ".out.incomplete/", ".out.incomplete/out/"]
                path = pick(draw, places) + pick(draw, [*NAMES, "tokens.bin", "journal", "lengths"])
                files[path] = pick(draw, [b"", b"{}", files.get(name, b""), *SPECIALS])
    return files


def _changed(draw: Draw, name: str, content: bytes | Special) -> bytes | Special:
    """A file of the same kind with something wrong in it."""
    if not isinstance(content, bytes):
        return content
    if rarely(draw, 100) and not name.endswith(".json"):  # which is transformers' to read
        return large_json(draw)
    with suppress(ValueError, RecursionError):
        if name.endswith("journal"):
            return _other_place(draw, content)
        if isinstance(found := json.loads(content), dict):
            return edited_json(draw, found)
    return flipped(draw, content)


def _other_place(draw: Draw, journal: bytes) -> bytes:
    """A journal with another number in it."""
    numbers = re.split(rb"(\d+)", journal)
    at = draw(st.integers(0, len(numbers) - 1))
    numbers[at] = pick(draw, [str(draw(INTEGERS)).encode(), raw_value(draw).encode("utf-8", "replace")])
    return b"".join(numbers)


def check_token_directory(files: Files, directory: Path) -> bool:
    """What is accepted is sound; interrupted work ends in the tokens of its texts, or is refused."""
    source = written(files, directory)
    place, again = source / "out", directory / "again"
    if place.exists():
        tokens = attempt(directory, lambda: TokenFile(place))
        made = attempt(directory, lambda: _tokenized(again, [_Fixed()], str(place)))
        if not isinstance(made, HfMegatronError):
            require_sound(made, again / "tokens.idx")
        _require_nothing_of_refused(made, again)
        if isinstance(tokens, HfMegatronError):
            return False
        require_sound(tokens, place / "tokens.idx")
        return not isinstance(made, HfMegatronError)
    made = attempt(directory, lambda: _tokenized(place, [_Fixed()], resume=True))
    if (directory / "secret").read_bytes() != SECRET:
        raise FindError("a file outside was changed", str((directory / "secret").read_bytes())[:200])
    if isinstance(made, HfMegatronError):
        if place.exists():
            raise FindError("refused work leaves a directory", str(made))
        return False
    if made.path.read_bytes() != _directories()[2]:
        raise FindError("other tokens than those of the texts", str(made.path.read_bytes())[:200])
    require_sound(made, place / "tokens.idx")
    if (left := sorted(path.name for path in place.iterdir())) != sorted(Path(name).name for name in _directories()[0]):
        raise FindError("other files than those of the work", str(left))
    return True


def _require_nothing_of_refused(made: TokenFile | HfMegatronError, destination: Path) -> None:
    """FindError if anything is beside the destination, or there is one of what was refused."""
    left = [path.name for path in destination.parent.glob(f".{destination.name}*")]
    if left or (isinstance(made, HfMegatronError) and destination.exists()):
        raise FindError("something is left behind", f"{left} {made}")


# --- Texts.


_PIECES = [b"a" * 10**6, b" " * 10**6, b"\n" * 10**5, b"0123456789" * 10**5, b"\xff", b"\xed\xa0\x80", b"\xf0\x9f\x98"]
_PIECES += [b"\xef\xbb\xbf", b"\xc0\x80", b"\0", b"\x1b[31m", b"\xe2\x80\xae", b"\r", b"\r\n", b"\n", b"\x85", b"\t"]
_PIECES += ["\u0301".encode() * 10**4, "\U0001f600".encode() * 10**5, b"<|endoftext|>" * 1000, b"'s 're" * 10**4, b""]
_LINES = [b"[" * 10**6, b'{"text": ' * 10**5, b'{"text": "', b'{"text": "a"} {"text": "b"}', b"null", b'"text"', b"[]"]
_LINES += [
    b'{"a": [' + b"[]," * 10**6 + b'[]], "text": "a"}',
    b'{"text": "' + b'\\"' * 10**6,
    b"{" * 10**5,
    b"\xfe\xff",
]
_LINES += [b'{"a": [' + b"[]," * 12 * 10**6 + b'[]], "text": "a"}', b'{"text": "' + b"\\u00e9" * 10**5 + b'"}']
_SIZES = [2**27, 2**28, 2**30, 2**40]


def _line(draw: Draw) -> bytes:
    """A line of JSON, or nearly."""
    if rarely(draw, 12):
        return pick(draw, _LINES)
    record = {"id": 1, "text": draw(TEXTS), "meta": {"a": 1}}
    if rarely(draw, 8):
        record["text"] = pick(draw, [p for p in _PIECES if p.isascii()]).decode()
    if not rarely(draw, 3):
        return json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return edited_json(draw, record, ["text", "id"]).replace(b"\n", pick(draw, [b"\n", b" "]))


@st.composite
def texts(draw: Draw) -> Files:
    """One to three files of texts, or a data set, of which some are damaged."""
    if rarely(draw, 10):
        return _data_set(draw)
    files: Files = {}
    for number in range(draw(st.integers(1, 3))):
        name = f"{number}{pick(draw, ['.txt', '.jsonl', '.jsonl', '.jsonl', '.json'])}"
        if rarely(draw, 15):
            files[name] = pick(draw, [*SPECIALS, *(Special("zeros", size=size) for size in _SIZES)])
        elif name.endswith(".txt"):
            pieces = [pick(draw, _PIECES) for _ in range(draw(st.integers(0, 3)))]
            files[name] = b"".join([*pieces, draw(TEXTS).encode("utf-8", "surrogatepass")])
        else:
            end = pick(draw, [b"\n", b"\n", b"\n\n", b"\r\n", b" \n"])
            files[name] = end.join(_line(draw) for _ in range(draw(st.integers(0, 4))))
    return files


@cache
def data_sets() -> tuple[Files, Files]:
    """One that was saved, and a file of parquet."""
    with TemporaryDirectory() as root:
        data = datasets.Dataset.from_dict({"text": _TEXTS * 3})
        data.save_to_disk(f"{root}/saved")
        data.to_parquet(f"{root}/folder/train.parquet")
        files = read(Path(root))
        saved = {name: content for name, content in files.items() if name.startswith("saved/")}
        return saved, {name: content for name, content in files.items() if name not in saved}


def _data_set(draw: Draw) -> Files:
    files = dict(data_sets()[draw(st.integers(0, 9)) == 0])
    name = pick(draw, sorted(files))
    files[name] = pick(draw, [_changed, lambda draw, _, content: wrong_file(draw, content)])(draw, name, files[name])
    return files


def check_texts(files: Files, directory: Path) -> bool:
    """What is accepted has the tokens of its texts; what is refused leaves nothing behind."""
    source, output = written(files, directory), directory / "out"
    names = sorted(path for path in files if "/" not in path) or sorted({path.split("/")[0] for path in files})
    paths = [str(source / name) for name in names]
    with patch("datasets.config.HF_DATASETS_CACHE", directory / "cache"):
        made = attempt(directory, lambda: _tokenized(output, open_sources(paths)))
    _require_nothing_of_refused(made, output)
    if isinstance(made, HfMegatronError):
        return False
    require_sound(made, output / "tokens.idx")
    contents = [files[name] for name in names if "/" not in name and name in files]
    if contents and all(isinstance(content, bytes) and len(content) < 10**5 for content in contents):
        _require_tokens(made, list(_expected(files, names)))
    return True


def _expected(files: Files, names: list[str]) -> Iterator[str]:
    for name in names:
        content = files[name]
        assert isinstance(content, bytes)
        if name.endswith(".txt"):
            yield content.decode()
        else:
            yield from (json.loads(line)["text"] for line in content.split(b"\n") if line.strip())


def _require_tokens(made: TokenFile, documents: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer())
    ids = [tokenizer(document)["input_ids"] for document in documents]
    expected = np.array([token for tokens in ids if tokens for token in [*tokens, tokenizer.eos_token_id]])
    if not np.array_equal(made.read(0, len(made)), expected):
        raise FindError("other tokens than those of the texts", f"{documents}")


def healthy_texts() -> Files:
    lines = b"\n".join(json.dumps({"text": text}).encode() for text in _TEXTS)
    return {"0.jsonl": lines, "1.txt": "\n".join(_TEXTS).encode()}
