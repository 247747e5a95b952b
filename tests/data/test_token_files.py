"""Token files as Megatron-LM and fairseq write them: all that is of the format is read, and all else refused."""

import os
import pickle
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_megatron.errors import DataError
from hf_megatron.paper.data import PackedDocuments, ShuffledBlend, TokenFile
from hf_megatron.paper.data.token_files import smallest_dtype, write_index
from tests.data.indexed import CODES, write_pair

_END = 99
_DOCUMENTS = [[1, 2, 3, _END], [4, _END], [], [5, 6, 7, 8, 9, 10, _END], [11, _END]]
_TOKENS = [token for document in _DOCUMENTS for token in document]


@pytest.mark.parametrize("kind", ["MMIDIDX", "TNTIDX"])
@pytest.mark.parametrize("dtype", CODES)
def test_every_dtype_and_index(tmp_path: Path, kind: str, dtype: str) -> None:
    """Catches a dtype or a kind of index that is not read, or read as another."""
    cases: list[dict[str, Any]] = [{}, {"documents": [0, 2, 5]}, {"documents": ()}]
    cases += [{"modes": [0, 1, 0, 0, 1]}] * (kind == "MMIDIDX")
    for i, case in enumerate(cases):
        prefix = tmp_path / f"{i}.of.text"
        write_pair(prefix, _DOCUMENTS, dtype, kind=kind, **case)
        for name in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
            tokens = TokenFile(name)
            assert (tokens.dtype, len(tokens), tokens.num_sequences) == (np.dtype(dtype), len(_TOKENS), 5)
            assert tokens.num_documents == (2 if i == 1 else 5)
            assert tokens.read(0, len(tokens)).tolist() == _TOKENS
        assert tokens.read(3, 6).tolist() == _TOKENS[3:6]
        tokens.require_ends(_END)
        with pytest.raises(DataError, match="do not end with token 3"):
            tokens.require_ends(3)
        assert pickle.loads(pickle.dumps(tokens)).read(2, 5).tolist() == _TOKENS[2:5]


def test_float64_under_the_code_of_float32(tmp_path: Path) -> None:
    """Catches files of before code 7 meant float32, and numbers that are no token ids taken for some."""
    write_pair(tmp_path / "old", _DOCUMENTS, "float64", code=7)
    assert TokenFile(tmp_path / "old").read(0, 4).tolist() == _DOCUMENTS[0]
    for value in (1.5, float("nan"), float("inf")):
        write_pair(tmp_path / "wrong", [[1, value]], "float32")  # type: ignore[list-item]
        with pytest.raises(DataError, match="no token ids, from token 0"):
            TokenFile(tmp_path / "wrong").read(0, 2)


def test_the_same_batches_as_its_text(tmp_path: Path) -> None:
    """Catches sequences of a file that differ from those of the same documents in memory."""
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 98, size).tolist() for size in generator.integers(1, 40, 100)]
    write_pair(tmp_path / "pair", [[*document, _END] for document in documents])
    options: dict[str, Any] = {"length": 16, "end_of_document": _END, "separate_documents": True, "vocab_size": 100}
    from_text = ShuffledBlend([PackedDocuments(documents, **options)], seed=3, multiple_of=8)
    from_file = ShuffledBlend([PackedDocuments(TokenFile(tmp_path / "pair"), **options)], seed=3, multiple_of=8)
    assert len(from_text) == len(from_file) > 100
    for epoch in (0, 1):
        from_text.set_epoch(epoch)
        from_file.set_epoch(epoch)
        for i in range(len(from_text)):
            expected, actual = from_text[i], from_file[i]
            assert {name: value.tolist() for name, value in actual.items()} == {
                name: value.tolist() for name, value in expected.items()
            }


def test_what_we_write_is_the_format(tmp_path: Path) -> None:
    """Catches an index of ours that differs from what the description of the format gives, in any byte."""
    for dtype, vocab_size in (("uint16", 65499), ("int32", 65500)):
        write_pair(tmp_path / "theirs", _DOCUMENTS, dtype)
        np.array([len(document) for document in _DOCUMENTS], "<i4").tofile(tmp_path / "lengths")
        write_index(tmp_path / "ours.idx", tmp_path / "lengths", smallest_dtype(vocab_size))
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


@pytest.mark.parametrize("kind", ["MMIDIDX", "TNTIDX"])
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_index_is_refused_or_harmless(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Catches any error but ours, and any token beyond the file's, from an index with changed, cut or added bytes."""
    write_pair(tmp_path / "pair", _DOCUMENTS, kind=kind)
    index = tmp_path / "pair.idx"
    raw = bytearray(index.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.sampled_from([0, 1, 2, 127, 128, 255]))
    index.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2, 20, 0]))])
    with suppress(DataError):
        tokens = TokenFile(tmp_path / "pair")
        assert tokens.read(0, len(tokens)).nbytes == 8 * len(tokens)


@pytest.mark.parametrize("kind", ["MMIDIDX", "TNTIDX"])
def test_every_number_of_an_index_counts(tmp_path: Path, kind: str) -> None:
    """Catches an index whose lengths, starts, dimensions or documents are not looked at."""
    write_pair(tmp_path / "pair", _DOCUMENTS, kind=kind)
    index = tmp_path / "pair.idx"
    raw = index.read_bytes()
    accepted = []
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1
        index.write_bytes(changed)
        try:
            TokenFile(tmp_path / "pair")
        except DataError:
            continue
        accepted.append(place)
    # Of documents between the first and the last nobody can say where they should begin.
    documents = range(len(raw) - 8 * 5, len(raw) - 8)
    assert set(accepted) <= set(documents)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda prefix: (prefix / "t.idx").write_bytes(b"\x89PNG" * 20), "begins with b'.x89PNG"),
        (lambda prefix: (prefix / "t.idx").unlink(), "t.idx is missing; token files are two"),
        (lambda prefix: (prefix / "t.bin").unlink(), "t.bin is missing; token files are two"),
        (lambda prefix: (prefix / "t.bin").write_bytes(bytes(30)), "ends at byte 30, and the .bin beside it has 30"),
        (lambda prefix: (prefix / "t.bin").write_bytes(b""), "no tokens"),
        (lambda prefix: subprocess.run(["sh", "-c", "rm t.bin; mkfifo t.bin"], cwd=prefix), "is a pipe, not a file"),
        (lambda prefix: subprocess.run(["sh", "-c", "rm t.idx; mkdir t.idx"], cwd=prefix), "is a directory, not a"),
    ],
)
def test_foreign_files_are_refused_by_name(tmp_path: Path, change: Any, told: str) -> None:
    """Catches an error that does not say which file is wrong and why, and a pipe that is waited for."""
    write_pair(tmp_path / "t", [*_DOCUMENTS, [3]])
    change(tmp_path)
    with pytest.raises(DataError, match=told.replace("30", r"\d+")) as raised:
        TokenFile(tmp_path / "t")
    assert str(tmp_path) in str(raised.value)


def test_a_file_that_changes_is_an_error(tmp_path: Path) -> None:
    """Catches tokens of another file, or the end of the process, where the file was cut while it is read."""
    write_pair(tmp_path / "t", _DOCUMENTS)
    tokens, fresh = TokenFile(tmp_path / "t"), TokenFile(tmp_path / "t")
    assert tokens.read(0, 2).tolist() == [1, 2]
    os.truncate(tmp_path / "t.bin", 4)
    with pytest.raises(DataError, match="became shorter"):
        tokens.read(0, len(_TOKENS))
    with pytest.raises(DataError, match="became shorter"):
        fresh.read(0, 2)


def test_large_indices_are_looked_at_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that reads all of a large index, or leaves out its ends."""
    monkeypatch.setattr("hf_megatron.paper.data.token_files._BLOCK", 2)
    monkeypatch.setattr("hf_megatron.paper.data.token_files._BLOCKS", 3)
    write_pair(tmp_path / "t", [[i, _END] for i in range(90)])
    read, raw = [], (tmp_path / "t.idx").read_bytes()
    pread = os.pread

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        read.append(count)
        return pread(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    TokenFile(tmp_path / "t")
    assert sum(read) < len(raw)
    for at in (34, 34 + 4 * 89, 34 + 12 * 90 - 8, len(raw) - 8):  # first and last length, last start and document
        changed = bytearray(raw)
        changed[at] ^= 1
        (tmp_path / "t.idx").write_bytes(changed)
        with pytest.raises(DataError, match=r"damaged|ends at byte"):
            TokenFile(tmp_path / "t")


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """Catches a file of another tokenizer, which would fail inside the embedding, or on a GPU end the process."""
    write_pair(tmp_path / "t", _DOCUMENTS)
    packed = PackedDocuments(TokenFile(tmp_path / "t"), length=4, end_of_document=_END, vocab_size=99)
    with pytest.raises(DataError, match=r"t\.bin has tokens 1 to 99 from token 0 on, and the vocabulary has 99"):
        packed[0]
