"""Texts to token files: in parallel, and going on where it was interrupted.

The main process reads texts and writes tokens in their order; others, if there is enough to do, tokenize batches of
them. After each batch a journal beside the unfinished directory says up to where in which source its tokens are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import AutoTokenizer

from hf_megatron.checkpoint import AtomicDirectory
from hf_megatron.checkpoint.atomic_directory import directories_in
from hf_megatron.checkpoint.budgets import MAX_TOKENIZER_JSON_BYTES, require_files_within
from hf_megatron.checkpoint.regular_file import open_regular
from hf_megatron.checkpoint.write_lock import clear
from hf_megatron.errors import CheckpointError, DataError, DestinationError
from hf_megatron.paper.data.text_sources import Source
from hf_megatron.paper.data.token_files import smallest_dtype, write_index

_logger = logging.getLogger(__name__)

_BATCH_CHARACTERS = 1 << 20
_JOURNAL_BYTES = 1024  # more than it has
_BLOCK_BYTES = 1 << 20  # that are read at a time
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt")
_PROCESS_BYTES = 32 << 20  # of text that are worth another process, which takes seconds to start
Progress = Callable[[int, int, int], None]
"""Told how much of how much is done, in units of the sources, and how many tokens were made."""


@dataclass(frozen=True)
class Tokenization:
    """What was written; with ``dry_run`` what would be, and how long one process would take, by the first texts."""

    destination: str
    documents: int
    tokens: int
    bytes_written: int
    dtype: str
    vocab_size: int
    end_of_document: int
    processes: int
    seconds: float
    tokens_per_second: float
    dry_run: bool


class _Encoder:
    """Tokens of texts, with a token after each; one in each process."""

    def __init__(self, tokenizer: str, end_of_document: str | None) -> None:
        self._name = tokenizer
        with _errors_of(tokenizer):
            files = (path for path in Path(tokenizer).glob("*") if path.suffix in _TOKENIZER_SUFFIXES)
            require_files_within(MAX_TOKENIZER_JSON_BYTES, files)
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            ids = self.tokenizer.get_vocab()
        token = self.tokenizer.eos_token if end_of_document is None else end_of_document
        if token not in ids:
            raise DataError(
                f"the tokenizer {tokenizer} has no token {token!r} to end documents with; name one with "
                "--end-of-document."
            )
        self.end_of_document, self.vocab_size = int(ids[token]), 1 + max(ids.values())
        self.dtype = smallest_dtype(self.vocab_size)

    def __call__(self, texts: list[str]) -> tuple[bytes, bytes]:
        """The tokens of all texts that have any, and how many each has, as int32."""
        with _errors_of(self._name):
            encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            documents = [[*ids, self.end_of_document] for ids in encoded["input_ids"] if len(ids)]
            tokens = np.array(list(chain.from_iterable(documents)), self.dtype)
        return tokens.tobytes(), np.array([len(ids) for ids in documents], "<i4").tobytes()

    def digest(self) -> str:
        """Of what decides the tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = repr(self.tokenizer.get_vocab()) if backend is None else backend.to_str()
        return hashlib.sha256(f"{self.end_of_document} {rules}".encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files."""
        with _errors_of(self._name, OSError):
            self.tokenizer.save_pretrained(directory)


@contextmanager
def _errors_of(tokenizer: str, *passed: type[Exception]) -> Iterator[None]:
    """Errors of other libraries, which are of all kinds, as a DataError that names the tokenizer."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust's, which is no Exception
        if isinstance(error, passed) or not (isinstance(error, Exception) or is_panic):
            raise
        raise DataError(f"{tokenizer} is no tokenizer that transformers can use: {error}") from error


_encoder: _Encoder | None = None  # of a worker process


def _start_worker(tokenizer: str, end_of_document: str | None) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are enough
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says when to end
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a worker"
    # Nothing else ends a worker whose main process was killed.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _encoder = _Encoder(tokenizer, end_of_document)


def _end_with(process: BaseProcess) -> None:
    process.join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[bytes, bytes]:
    assert _encoder is not None, "the worker was started"
    return _encoder(texts)


class _Place(NamedTuple):
    """How far the sources are read, and what there is of it."""

    source: int
    position: int
    tokens: int
    documents: int
    checksums: tuple[int, int]  # CRC-32 of the tokens and of the lengths


_BEGINNING = _Place(0, 0, 0, 0, (0, 0))


def tokenize_to(
    destination: str | os.PathLike[str],
    sources: Sequence[Source],
    tokenizer: str,
    *,
    end_of_document: str | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total, tokens: None,
) -> Tokenization:
    """Write ``tokens.bin``, ``tokens.idx`` and the tokenizer into a directory, which appears complete or not at all.

    Args:
        destination: The directory.
        sources: Where the texts come from; each text is a document, and those without a token are left out.
        tokenizer: A directory or repository.
        end_of_document: The token after each document; the tokenizer's eos token by default.
        processes: How many tokenize; by default as many as there are cores, but fewer for little text. One is this
            process, in which the tokenizer has its own threads.
        overwrite: Replace what is there.
        resume: Go on with the same work that was interrupted, and let another go on with this.
        dry_run: Write nothing, and extrapolate from the first batch of texts.
        progress: Called after each batch.

    Raises:
        DataError: A source or the tokenizer cannot be read, or there is no token in the sources.
        DestinationError: The destination exists, holds a source or more than tokens, or cannot be written.
    """
    began = time.monotonic()
    target = AtomicDirectory(destination, replace=overwrite, resume=resume)
    _require_replaceable(target.destination, sources)
    encoder = _Encoder(tokenizer, end_of_document)
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, sum(source.num_bytes for source in sources) // _PROCESS_BYTES))

    def result(place: _Place, new_tokens: int, seconds: float) -> Tokenization:
        size = place.tokens * encoder.dtype.itemsize + 34 + 20 * place.documents + 8
        facts = (str(encoder.dtype), encoder.vocab_size, encoder.end_of_document, processes)
        speed = new_tokens / max(seconds, 1e-9)
        return Tokenization(str(destination), place.documents, place.tokens, size, *facts, seconds, speed, dry_run)

    if dry_run:
        place, seconds = _estimate(encoder, sources)
        return result(place, place.tokens, seconds)
    job = hashlib.sha256(json.dumps([encoder.digest(), [source.identity for source in sources]]).encode()).hexdigest()
    with target:
        try:
            before, place = _write(target, job, sources, encoder, (tokenizer, end_of_document), processes, progress)
            if not place.tokens:
                raise DataError("there is no token in " + ", ".join(source.name for source in sources) + ".")
            write_index(target.path / "tokens.idx", target.container / "lengths", encoder.dtype)
            encoder.save(target.path)
            _require_replaceable(target.destination, sources)  # which may have got more than tokens since
            target.publish()
        except OSError as error:
            raise target.failure(error) from error
        except BrokenProcessPool as error:
            raise DataError(
                "a process that tokenized was ended, for want of memory perhaps: take fewer with --processes."
            ) from error
        finally:
            if target.resumes and target.is_to_remove and (target.container / "journal").exists():
                target.is_to_remove = False
                _logger.warning("What is complete is left in %s for --resume.", target.container)
    return result(place, place.tokens - before, time.monotonic() - began)


def _require_replaceable(destination: Path, sources: Sequence[Source]) -> None:
    """DestinationError if replacing the directory would delete a source, or what was not written here."""
    for source in sources:
        path = Path(source.name).resolve()
        if path.exists() and (path == destination or destination in path.parents):
            raise DestinationError(f"The destination {destination} holds the source {path}; choose another.")
    if destination.exists() and any(destination.iterdir()) and not (destination / "tokens.idx").is_file():
        raise DestinationError(f"The destination {destination} holds no tokens, and will not be overwritten.")
    if kept := [path.name for path in directories_in(destination)]:
        raise DestinationError(
            f"The destination {destination} holds directories ({', '.join(kept[:5])}), and will not be overwritten. "
            "Remove it yourself if nothing in it is needed."
        )


def _write(
    target: AtomicDirectory,
    job: str,
    sources: Sequence[Source],
    encoder: _Encoder,
    start: tuple[str, str | None],
    processes: int,
    progress: Progress,
) -> tuple[int, _Place]:
    """Write the tokens and the lengths; the number of tokens that were there already, and what is there now."""
    journal, total = target.container / "journal", sum(source.size for source in sources)
    paths = (target.path / "tokens.bin", target.container / "lengths")
    place = _resumed(target, job, paths, encoder.dtype.itemsize)
    before = place.tokens
    if before:
        _logger.info("Going on after %s tokens of %s documents.", f"{before:,}", f"{place.documents:,}")
    with paths[0].open("ab") as data, paths[1].open("ab") as lengths:
        for source, position, (tokens, sizes) in _encoded(_batches(sources, place), encoder, start, processes):
            data.write(tokens)
            lengths.write(sizes)
            data.flush()
            lengths.flush()
            made = place.tokens + len(tokens) // encoder.dtype.itemsize, place.documents + len(sizes) // 4
            checksums = zlib.crc32(tokens, place.checksums[0]), zlib.crc32(sizes, place.checksums[1])
            place = _Place(source, position, *made, checksums)
            fresh = journal.with_name("journal.new")
            fresh.write_bytes(_entry(job, json.dumps(place).encode()))
            fresh.replace(journal)
            progress(sum(s.size for s in sources[:source]) + position, total, place.tokens - before)
    return before, place


def _entry(job: str, place: bytes) -> bytes:
    """What the journal says, behind a digest that neither other work nor a damaged journal has."""
    return hashlib.sha256(job.encode() + place).hexdigest().encode() + b" " + place


def _noted(journal: Path, job: str) -> _Place:
    """What the journal says; the beginning if there is none, or it is damaged or of other work."""
    try:
        with open_regular(journal) as file:
            entry = file.read(_JOURNAL_BYTES)
    except (OSError, CheckpointError):
        return _BEGINNING
    place = entry.partition(b" ")[2]
    return _Place(*json.loads(place)) if entry == _entry(job, place) else _BEGINNING


def _resumed(target: AtomicDirectory, job: str, paths: tuple[Path, Path], itemsize: int) -> _Place:
    """Where to go on: where the journal says if the files begin with what it knows of, or else at the beginning.

    What an interrupted batch has written is cut off, and what is of other work deleted.
    """
    place = _noted(target.container / "journal", job)
    sizes = (place.tokens * itemsize, place.documents * 4)
    if not place.tokens or not all(map(_begins_with, paths, sizes, place.checksums)):
        if target.resumes:
            clear(target.container)
            target.path.mkdir()
        return _BEGINNING
    clear(target.path, kept=paths[0].name)
    for path, size in zip(paths, sizes, strict=True):
        os.truncate(path, size)
    return place


def _begins_with(path: Path, size: int, checksum: int) -> bool:
    """Whether a file has so many bytes of this checksum, and perhaps more."""
    found = 0
    try:
        with open_regular(path) as file:
            while size and (block := file.read(min(size, _BLOCK_BYTES))):
                found, size = zlib.crc32(block, found), size - len(block)
    except (OSError, CheckpointError):
        return False
    return not path.is_symlink() and not size and found == checksum


def _batches(sources: Sequence[Source], place: _Place) -> Iterator[tuple[int, int, list[str]]]:
    """About a million characters of texts at a time, with the source and the position behind them."""
    for number in range(place.source, len(sources)):
        texts: list[str] = []
        characters, position = 0, place.position if number == place.source else 0
        try:
            for text, behind in sources[number].texts(position):
                texts.append(text)
                characters, position = characters + len(text), behind
                if characters >= _BATCH_CHARACTERS:
                    yield number, position, texts
                    texts, characters = [], 0
        except OSError as error:
            raise DataError(f"{sources[number].name} cannot be read: {error}") from error
        if texts:
            yield number, position, texts


def _encoded(
    batches: Iterator[tuple[int, int, list[str]]], encoder: _Encoder, start: tuple[str, str | None], processes: int
) -> Iterator[tuple[int, int, tuple[bytes, bytes]]]:
    """The tokens of each batch, in order; batches are read as far ahead as keeps the processes busy."""
    if processes == 1:
        for number, position, texts in batches:
            yield number, position, encoder(texts)
        return
    context = multiprocessing.get_context("spawn")  # threads, which a fork would not survive, may be there
    pool = ProcessPoolExecutor(processes, context, _start_worker, start)
    waiting: deque[tuple[int, int, Future[tuple[bytes, bytes]]]] = deque()
    try:
        for number, position, texts in batches:
            waiting.append((number, position, pool.submit(_encode, texts)))
            if len(waiting) > 2 * processes:
                number, position, future = waiting.popleft()
                yield number, position, future.result()
        while waiting:
            number, position, future = waiting.popleft()
            yield number, position, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _estimate(encoder: _Encoder, sources: Sequence[Source]) -> tuple[_Place, float]:
    """What there will be if all texts are like those of the first batch, and the seconds it takes this process."""
    for number, position, texts in _batches(sources, _BEGINNING):
        began = time.monotonic()
        tokens, sizes = encoder(texts)
        seconds = time.monotonic() - began
        done = sum(source.size for source in sources[:number]) + position
        share = sum(source.size for source in sources) / done
        made = round(len(tokens) // encoder.dtype.itemsize * share), round(len(sizes) // 4 * share)
        return _Place(0, 0, *made, (0, 0)), seconds * share
    return _BEGINNING, 0.0
