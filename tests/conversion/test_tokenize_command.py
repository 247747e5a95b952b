"""``hf-megatron tokenize`` as a user or a script meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, GPT2TokenizerFast

from hf_megatron.errors import DataError, DestinationError
from hf_megatron.paper.data import PackedDocuments, TokenFile
from hf_megatron.paper.data.text_sources import open_sources
from hf_megatron.paper.data.tokenizing import tokenize_to
from tests.conversion.commands import Commands
from tests.conversion.fake_hub import serving
from tests.data.indexed import write_pair
from tests.repository import environment

_TEXTS = [topics[name] for name in sorted(topics)[:12]]
_TEXTS[3:3] = ["", "\u00e9t\u00e9 \U0001f600"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    GPT2TokenizerFast().train_new_from_iterator(_TEXTS, 300, show_progress=False).save_pretrained(directory)
    return directory


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    file = tmp_path / "texts.jsonl"
    file.write_text("\n\n".join(json.dumps({"n": i, "text": text}) for i, text in enumerate(_TEXTS)))
    return file


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_megatron.paper.data.tokenizing._BATCH_CHARACTERS", 5000)


def _documents(tokenizer: Path) -> list[list[int]]:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    encoded = (loaded(text)["input_ids"] for text in _TEXTS)
    return [[*ids, loaded.eos_token_id] for ids in encoded if ids]


def _contents(directory: Path) -> tuple[bytes, bytes]:
    return (directory / "tokens.bin").read_bytes(), (directory / "tokens.idx").read_bytes()


def test_every_source_gives_its_texts(tmp_path: Path, tokenizer: Path, lines: Path, command: Commands) -> None:
    """Catches tokens that are not the texts', an empty document, files other than Megatron-LM's, and keys gone missing.

    The expected files come from a writer of its own.
    """
    write_pair(tmp_path / "expected", _documents(tokenizer))
    expected = tuple(Path(f"{tmp_path / 'expected'}{end}").read_bytes() for end in (".bin", ".idx"))
    files = [tmp_path / f"{i}.txt" for i in range(len(_TEXTS))]
    for file, text in zip(files, _TEXTS, strict=True):
        file.write_text(text, encoding="utf-8")
    data = datasets.Dataset.from_dict({"text": _TEXTS})
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "train.parquet")
    for i, sources in enumerate(([lines], files, [tmp_path / "saved"], [tmp_path / "folder"])):
        output = tmp_path / f"out{i}"
        code, result, err = command.run("tokenize", *sources, output, "--tokenizer", tokenizer)
        assert code == 0, err
        assert _contents(output) == expected
        assert result["bytes_written"] == sum(map(len, expected))
        assert (result["documents"], result["tokens"]) == (len(_TEXTS) - 1, len(expected[0]) // 2)
        assert len(AutoTokenizer.from_pretrained(output)) == result["vocab_size"]
    tokens = TokenFile(output)
    tokens.require_ends(result["end_of_document"])
    options: dict[str, Any] = {"length": 32, "end_of_document": result["end_of_document"]}
    packed = PackedDocuments(tokens, **options)
    from_text = PackedDocuments([document[:-1] for document in _documents(tokenizer)], **options)
    assert len(packed) == len(from_text)
    assert all(packed[i]["input_ids"].equal(from_text[i]["input_ids"]) for i in range(len(packed)))
    assert "--overwrite" in command.refusal("tokenize", lines, output, "--tokenizer", tokenizer)
    code, dry, _ = command.run("tokenize", lines, tmp_path / "dry", "--tokenizer", tokenizer, "--dry-run")
    assert (code, dry["dry_run"], (tmp_path / "dry").exists()) == (0, True, False)
    assert dry["tokens"] == pytest.approx(result["tokens"], rel=0.5)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_work_goes_on(tmp_path: Path, tokenizer: Path, lines: Path, processes: int) -> None:
    """Catches tokens lost, doubled or made again after an interruption at any batch, and a half directory in place."""
    expected, sources = tmp_path / "expected", [str(lines), str(tmp_path / "more.txt")]
    Path(sources[1]).write_text(_TEXTS[0], encoding="utf-8")
    tokenize_to(expected, open_sources(sources), str(tokenizer))
    output, interrupted = tmp_path / "out", 0

    def interrupt(done: int, total: int, tokens: int) -> None:
        if done < total and (processes == 1 or interrupted < 2):  # starting processes takes seconds
            raise KeyboardInterrupt

    while not output.exists():
        with suppress(KeyboardInterrupt):
            options: dict[str, Any] = {"processes": processes, "resume": True, "progress": interrupt}
            done = tokenize_to(output, open_sources(sources), str(tokenizer), **options)
        if not output.exists():
            interrupted += 1
            journal = tmp_path / ".out.incomplete" / "journal"
            assert journal.exists()
            with (tmp_path / ".out.incomplete" / "out" / "tokens.bin").open("ab") as file:
                file.write(b"what a killed process had begun")
    assert interrupted >= 2
    assert _contents(output) == _contents(expected)
    assert done.tokens_per_second * done.seconds < 0.95 * done.tokens  # the rest was there
    assert [path.name for path in tmp_path.glob(".out*")] == []


def test_other_work_does_not_go_on(tmp_path: Path, tokenizer: Path, lines: Path) -> None:
    """Catches tokens of one source or tokenizer that are finished with those of another."""

    def interrupt(done: int, total: int, tokens: int) -> None:
        raise KeyboardInterrupt

    output, expected = tmp_path / "out", tmp_path / "expected"
    with pytest.raises(KeyboardInterrupt):
        tokenize_to(output, open_sources([str(lines)]), str(tokenizer), resume=True, progress=interrupt)
    lines.write_text(json.dumps({"text": _TEXTS[5]}) + "\n")
    for directory in (output, expected):
        tokenize_to(directory, open_sources([str(lines)]), str(tokenizer), resume=True)
    assert _contents(output) == _contents(expected)
    with pytest.raises(KeyboardInterrupt):
        tokenize_to(tmp_path / "other", open_sources([str(lines)]), str(tokenizer), progress=interrupt)
    assert list(tmp_path.glob(".other*")) == []  # without resume nothing is kept


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("journal", lambda journal: b""),
        ("journal", lambda journal: journal[:-1]),
        ("journal", lambda journal: journal[64:]),
        ("journal", lambda journal: b"\xff" * len(journal)),
        ("journal", lambda journal: b"[" * 100_000),
        ("journal", lambda journal: journal.replace(b"[0, ", b"[1, ")),
        ("lengths", lambda lengths: lengths[:-1]),
        ("lengths", lambda lengths: b"\7" + lengths[1:]),
        ("out/tokens.bin", lambda tokens: tokens[:-1]),
        ("out/tokens.bin", lambda tokens: b"\xff" + tokens[1:]),
    ],
)
def test_damaged_leftovers_are_begun_anew(
    tmp_path: Path, tokenizer: Path, lines: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    """Catches foreign errors and wrong tokens where a journal, or what it knows of, is not what was written."""
    expected, output, text = tmp_path / "expected", tmp_path / "out", tmp_path / "more.txt"
    text.write_text(_TEXTS[0] * 2, encoding="utf-8")
    sources = open_sources([str(text), str(lines)])
    tokenize_to(expected, sources, str(tokenizer))

    def interrupt(done: int, total: int, tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_to(output, sources, str(tokenizer), resume=True, progress=interrupt)
    file = tmp_path / ".out.incomplete" / name
    file.write_bytes(damage(file.read_bytes()))
    made: list[int] = []
    tokenize_to(output, sources, str(tokenizer), resume=True, progress=lambda done, total, tokens: made.append(tokens))
    assert _contents(output) == _contents(expected)
    assert made[-1] == len(_contents(expected)[0]) // 2  # all of it was made again


def _children(process: int) -> Iterator[int]:
    for line in Path(f"/proc/{process}/task/{process}/children").read_text().split():
        yield int(line)
        yield from _children(int(line))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_work_leaves_no_process_and_goes_on(
    tmp_path: Path, tokenizer: Path, lines: Path, how: signal.Signals
) -> None:
    """Catches workers that outlive the command, and a journal that knows of tokens which are not there."""
    lines.write_text((lines.read_text() + "\n") * 60)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "hf_megatron", "tokenize", str(lines), str(output), "--tokenizer", str(tokenizer)]
    command += ["--processes", "2", "--resume"]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / ".out.incomplete" / "journal", time.monotonic() + 240
    while not journal.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = set(_children(process.pid))
    process.send_signal(how)
    assert process.wait(timeout=120) == (-how if how == signal.SIGKILL else 130)
    assert len(children) >= 2
    while any(Path(f"/proc/{child}").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [child for child in children if Path(f"/proc/{child}").exists()] == []
    assert journal.exists()
    assert not output.exists()
    subprocess.run(command, env=environment(), check=True)
    whole = tmp_path / "whole"
    tokenize_to(whole, open_sources([str(lines)]), str(tokenizer))
    assert _contents(output) == _contents(whole)


@pytest.mark.parametrize(
    ("sources", "options", "told"),
    [
        ({"a.jsonl": b'{"text": 1}'}, [], "in the line at byte 0, has 1 in the place of a text"),
        ({"a.jsonl": b'{"text": "a"}\n{"txt": "a"}'}, [], "in the line at byte 14, has no object with 'text'"),
        ({"a.jsonl": b'{"text": "a"}\n{'}, [], "in the line at byte 14, has no JSON"),
        ({"a.jsonl": b"[" * 100_000}, [], "has no JSON"),
        ({"a.jsonl": b'{"text": "\\ud800"}'}, [], "half a character"),
        ({"a.jsonl": b'{"text": "\xff"}'}, [], "no UTF-8 text"),
        ({"a.txt": b"\xff"}, [], "no UTF-8 text"),
        ({"a.txt": b""}, [], "there is no token in"),
        ({"a.txt": b"a", "b.pdf": b"a"}, [], "b.pdf ends with none of .txt, .json and .jsonl"),
        ({"a.txt": b"a", "absent.txt": None}, [], "absent.txt is no file"),
        ({"absent.txt": None}, [], "absent.txt is no file"),
        ({"nobody/nothing": None}, [], "no data set that can be read"),
        ({"a.txt": b"a"}, ["--end-of-document", "<end>"], "no token '<end>'"),
        ({"a.txt": b"a"}, ["--tokenizer", "nobody/nothing"], "nobody/nothing is no tokenizer"),
    ],
)
def test_refusals(
    tmp_path: Path, tokenizer: Path, sources: dict[str, bytes | None], options: list[str], told: str, command: Commands
) -> None:
    """Catches errors that do not say what is wrong and where, and that leave something behind."""
    for name, content in sources.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    names = [tmp_path / name if "." in name else name for name in sources]
    arguments = ["tokenize", *names, tmp_path / "out", "--tokenizer", tokenizer, *options]
    assert told in command.refusal(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(n for n, c in sources.items() if c is not None)


def test_only_tokens_are_overwritten(tmp_path: Path, tokenizer: Path, lines: Path, command: Commands) -> None:
    """Catches a corpus that is replaced by its tokens, and a training run beside them that is deleted."""
    corpus, tokens = tmp_path / "corpus", tmp_path / "tokens"
    corpus.mkdir()
    source = Path(shutil.copy(lines, corpus))
    options = ("--tokenizer", tokenizer, "--overwrite")
    assert "holds the source" in command.refusal("tokenize", source, corpus, *options)
    assert "holds no tokens" in command.refusal("tokenize", lines, corpus, *options)
    assert source.is_file()
    assert command.run("tokenize", source, tokens, *options)[0] == 0
    assert command.run("tokenize", source, tokens, *options)[0] == 0
    (tokens / ".git").mkdir()
    assert "holds directories (.git)" in command.refusal("tokenize", source, tokens, *options)


def test_a_directory_that_appears_meanwhile_stays(tmp_path: Path, tokenizer: Path, lines: Path) -> None:
    """Catches a look at the destination before the work alone."""
    tokens, sources = tmp_path / "tokens", open_sources([str(lines)])
    tokenize_to(tokens, sources, str(tokenizer))

    def appear(*_: int) -> None:
        (tokens / "run").mkdir(exist_ok=True)

    with pytest.raises(DestinationError, match=r"holds directories \(run\)"):
        tokenize_to(tokens, sources, str(tokenizer), overwrite=True, progress=appear)
    assert (tokens / "run").is_dir()


@pytest.mark.slow
def test_a_data_set_on_the_hub(tmp_path: Path, tokenizer: Path) -> None:
    """Catches a data set's configuration, split or column that does not reach ``datasets``, and tokens of another."""
    files, card = {}, "---\nconfigs:\n"
    for number, name in enumerate(("de", "en")):
        card += f"- config_name: {name}\n  data_files:\n"
        for split in ("train", "test"):
            lines = [json.dumps({"text": "", "body": text}) for text in _TEXTS[number + len(split) :]]
            files[f"{name}/{split}.jsonl"] = "\n".join(lines).encode()
            card += f"  - split: {split}\n    path: {name}/{split}.jsonl\n"
    (tmp_path / "same.jsonl").write_bytes(files["en/test.jsonl"])
    tokenize_to(tmp_path / "same", open_sources([str(tmp_path / "same.jsonl")], column="body"), str(tokenizer))
    command = [sys.executable, "-m", "hf_megatron", "tokenize", "owner/name", "out", "--tokenizer", str(tokenizer)]
    command += ["--config", "en", "--split", "test", "--column", "body"]
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with serving("owner/name", {"README.md": (card + "---\n").encode(), **files}) as (address, asked):
        changes = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), **online}
        subprocess.run(command, env=environment(**changes), cwd=tmp_path, check=True)
    assert any(path.endswith("/en/test.jsonl") for path in asked)
    assert _contents(tmp_path / "out") == _contents(tmp_path / "same")


def test_a_worker_that_is_ended_is_named(tmp_path: Path, tokenizer: Path, lines: Path) -> None:
    """Catches an error of another library's where a worker is killed, as for want of memory."""

    def end_workers(done: int, total: int, tokens: int) -> None:
        for child in _children(os.getpid()):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)

    if not sys.platform.startswith("linux"):
        pytest.skip("looks for processes in /proc")
    lines.write_text((lines.read_text() + "\n") * 10)
    with pytest.raises(DataError, match="take fewer with --processes"):
        tokenize_to(tmp_path / "out", open_sources([str(lines)]), str(tokenizer), processes=2, progress=end_workers)
